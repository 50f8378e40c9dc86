"""What happened, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import Enum
from statistics import fmean
from typing import Any

from convsim_init.settings import Settings

Measures = dict[str, float]


class Outcome(str, Enum):
    """What became of a layer."""

    INITIALIZED = "initialized"
    APPROXIMATED = "approximated"  # written, but the layer does not use quite what was written
    MEASURED = "measured"  # nothing was to be changed
    SKIPPED = "skipped"
    FAILED = "failed"  # attempted, and left as it was
    PLANNED = "planned"  # would be treated


@dataclass(frozen=True)
class LayerReport:
    """What became of one convolution.

    Attributes:
        name: Dotted name in the model.
        kind: Class of the module, for instance ``"Conv2d"``.
        shape: Shape of its weight.
        outcome: What became of it.
        reason: Why, where it was not simply initialized.
        steps: Steps of the descent.
        seconds: Time it took.
        before: ``similarity``, ``normalized_similarity`` over all filter pairs, before; empty if not treated.
        after: The same after, and ``norm_ratio``: the filters' L2 norms after over before, their mean.
        losses: The minimized loss at the start and after each step.
    """

    name: str
    kind: str
    shape: list[int]
    outcome: Outcome
    reason: str | None = None
    steps: int = 0
    seconds: float = 0.0
    before: Measures = field(default_factory=dict)
    after: Measures = field(default_factory=dict)
    losses: list[float] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, object]:
        """The report as plain data, without the losses."""
        data = asdict(self)
        del data["losses"]
        return data | {"outcome": self.outcome.value}


@dataclass
class Report:
    """What became of a model.

    Attributes:
        settings: What was asked for.
        layers: Every convolution, in the model's order.
        seconds: Time for all of it.
        model: Spec of the model, if it was built by name.
        seed: Seed of its weights, if it was built by name.
        file: The checkpoint, if one was written.
        file_bytes: Its size.
    """

    settings: Settings
    layers: list[LayerReport]
    seconds: float = 0.0
    model: str | None = None
    seed: int | None = None
    file: str | None = None
    file_bytes: int | None = None

    @property
    def totals(self) -> dict[str, Any]:
        """Number of layers by outcome, and the measures of the treated ones.

        ``similarity`` is the sum over layers; ``normalized_similarity`` and ``norm_ratio`` are means over layers.
        """
        outcomes = Counter(layer.outcome for layer in self.layers)
        treated = [layer for layer in self.layers if layer.after]
        return {
            "layers": len(self.layers),
            **{outcome.value: outcomes[outcome] for outcome in Outcome if outcomes[outcome]},
            "before": _combine([layer.before for layer in treated]),
            "after": _combine([layer.after for layer in treated]),
        }

    def to_dict(self) -> dict[str, object]:
        """The report as plain data, ready for JSON."""
        return {
            "model": self.model,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "layers": [layer.to_dict() for layer in self.layers],
            "totals": self.totals,
            "seconds": self.seconds,
            "file": self.file,
            "file_bytes": self.file_bytes,
        }


def _combine(measures: list[Measures]) -> Measures:
    names = measures[0] if measures else {}
    return {name: (sum if name == "similarity" else fmean)([one[name] for one in measures]) for name in names}
