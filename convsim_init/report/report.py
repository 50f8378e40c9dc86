"""The report of a run as data: what became of each layer, and its measures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from numbers import Integral, Real
from statistics import fmean
from typing import Any

from convsim_init.errors import InputError
from convsim_init.report.patterns import check_patterns, matches
from convsim_init.report.table import Table, report_cells, report_table, shape_text
from convsim_init.report.text import quoted
from convsim_init.settings import Channels, ChannelsChoice, Settings

Measures = dict[str, float]
ORDER = (  # of the entries of a report as plain data
    "model", "seed", "base", "calibrated", "options", "settings", "layers", "totals",
    "seconds", "processes", "device", "file", "file_bytes", "remarks",
)  # fmt: skip
RECORD = ("name", "kind", "shape", "outcome", "reason", "channels", "factor", "steps", "seconds")  # then measures


class Outcome(str, Enum):
    """What became of a layer.

    Examples:
        >>> ci.Outcome("skipped") is ci.Outcome.SKIPPED
        True
    """

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
        reason: Why, where it was not simply initialized, and where all its channels were compared or nothing was known
            of a normalization behind it.
        steps: Steps of the descent.
        seconds: Time it took.
        before: Measures by name, such as ``similarity`` and ``normalized_similarity`` over all filter pairs, before or,
            where nothing was to be changed, as it is; empty if not treated.
        after: The same after, and ``norm_ratio``: the filters' L2 norms after over before, their mean.
        losses: The minimized loss at the start and after each step.
        factor: Factor that its weight was scaled by afterwards, as `calibrate_` does; None if it was not.
        channels: Kernels that were compared: of ``"matched"`` channels or ``"all"``; None if it was not to be treated.
        twin: Where `initializing` saw its weight before; `reason` then ends with it, and `to_dict` leaves it out.

    Examples:
        >>> layer = ci.measure(nn.Sequential(nn.Conv2d(3, 16, 3))).layers[0]
        >>> layer.name, layer.kind, layer.shape
        ('0', 'Conv2d', [16, 3, 3, 3])
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
    factor: float | None = None
    channels: Channels | None = None
    twin: str = field(default="", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, without the losses."""
        data = asdict(self)
        del data["losses"], data["twin"]
        return data | {"outcome": self.outcome.value}


@dataclass(repr=False)
class Report:
    """What became of a model; shown as a table by ``print``, in a REPL and in a notebook.

    Attributes:
        settings: What was asked for.
        layers: Every convolution, in the model's order.
        seconds: Time for all of it.
        model: Spec of the model, if it was built by name.
        seed: Seed of its weights, if they were drawn here.
        base: Scheme that its convolutions were drawn anew by; ``"model"`` if they were left.
        file: The checkpoint, if one was written.
        file_bytes: Its size.
        remarks: What else the reader should know, such as the library of a model, a sentence each.
        processes: How many the layers were divided over.
        calibrated: Shape of the noise that layers were calibrated on afterwards; None if they were not.
        options: What else the command was given that changes its files, such as ``include``, by the options' names.
        device: Where layers were computed, such as ``"cpu"`` or ``"cuda:0"``; None of `plan` and `measure`.

    Examples:
        >>> report = ci.initialize_(nn.Sequential(nn.Conv2d(3, 16, 3)))
        >>> totals = report.totals
        >>> totals["after"]["normalized_similarity"] < totals["before"]["normalized_similarity"]
        True
    """

    settings: Settings
    layers: list[LayerReport]
    seconds: float = 0.0
    model: str | None = None
    seed: int | None = None
    base: str = "model"
    file: str | None = None
    file_bytes: int | None = None
    remarks: list[str] = field(default_factory=list)
    processes: int = 1
    calibrated: list[int] | None = None
    device: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> ChannelsChoice:
        """Kernels compared, if the same in all layers; else, or where nothing was to be treated, the setting."""
        used = {layer.channels for layer in self.layers if layer.channels is not None}
        (channels,) = used if len(used) == 1 else (self.settings.channels,)
        return channels

    @property
    def totals(self) -> dict[str, Any]:
        """Number of layers by outcome, and the measures of the treated or measured ones.

        ``similarity`` is the sum over layers; the others are means over the layers that have them.
        """
        outcomes = Counter(layer.outcome for layer in self.layers)
        return {
            "layers": len(self.layers),
            **{outcome.value: outcomes[outcome] for outcome in Outcome if outcomes[outcome]},
            "before": _combine([layer.before for layer in self.layers]),
            "after": _combine([layer.after for layer in self.layers]),
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON; numbers that are not finite, which it does not have, are None."""
        return json_ready(self._data())  # type: ignore[no-any-return]

    def _data(self) -> dict[str, Any]:
        layers = [layer.to_dict() for layer in self.layers]
        # Without the layers, of which asdict would copy every loss.
        data = asdict(replace(self, layers=[])) | {"layers": layers, "totals": self.totals}
        return {name: data[name] for name in ORDER}

    def to_records(self) -> list[dict[str, str | int | float | None]]:
        """One flat dict a layer, all with the same keys, for instance for ``pandas.DataFrame``.

        The measures' names end in ``_before`` and ``_after``, or stand alone where nothing was changed. What a layer
        does not have is None.
        """
        changed = any(layer.after for layer in self.layers)
        before, after = ("_before", "_after") if changed else ("", "")
        named = [{name + before: value for name, value in layer.before.items()} for layer in self.layers]
        named_after = [{name + after: value for name, value in layer.after.items()} for layer in self.layers]
        blank = dict.fromkeys(name for measures in (*named, *named_after) for name in measures)
        plain = [{name: data[name] for name in RECORD} for data in (layer.to_dict() for layer in self.layers)]
        rows = zip(plain, named, named_after, strict=True)
        return [row | {"shape": shape_text(row["shape"])} | blank | old | new for row, old, new in rows]

    def select(self, include: Sequence[str], exclude: Sequence[str] = ()) -> Report:
        """The report of the layers that match the first shell patterns, or all, and none of the others.

        Each pattern must match a layer.
        """
        for argument, patterns in (("include", include), ("exclude", exclude)):
            check_patterns(argument, patterns, [layer.name for layer in self.layers])
        chosen = [layer for layer in self.layers if not include or matches(layer.name, include)]
        left = [layer for layer in chosen if not matches(layer.name, exclude)]
        if exclude and not left:
            raise InputError(f"exclude: expected patterns that leave a layer, got {', '.join(map(quoted, exclude))}")
        return replace(self, layers=left)

    def sorted_by(self, measure: str) -> Report:
        """The report with its layers in falling order of a measure; those without it last."""

        def key(layer: LayerReport) -> float:
            return -(layer.after or layer.before).get(measure, -math.inf)

        return replace(self, layers=sorted(self.layers, key=key))

    def with_measures(self, before: Report, after: Report) -> Report:
        """The report with measures of its treated layers added where it has none itself."""
        old, new = ({layer.name: layer.before for layer in report.layers} for report in (before, after))
        layers = list(self.layers)
        for index, layer in enumerate(layers):
            if layer.after:
                known, known_after = old.get(layer.name, {}), new.get(layer.name, {})
                layers[index] = replace(layer, before=known | layer.before, after=known_after | layer.after)
        return replace(self, layers=layers)

    def with_factors(self, factors: Mapping[str, float]) -> Report:
        """The report after weights were scaled by these factors, by the names of their layers."""
        layers = []
        for layer in self.layers:
            factor = factors.get(layer.name)
            after = dict(layer.after)
            if factor is not None and after:
                after["similarity"] *= (factor * factor) * (factor * factor)  # factor**4 raises where this is inf
                after["norm_ratio"] *= factor
            layers.append(replace(layer, after=after, factor=factor))
        return replace(self, layers=layers)

    @property
    def table(self) -> Table:
        """The report as people read it."""
        return report_table(self._data())

    @property
    def cells(self) -> list[str]:
        """The report in a few words, one text each: outcomes, changes of the normalized similarity, time."""
        return report_cells(self._data())

    def __str__(self) -> str:
        return self.table.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table.html()


def json_ready(value: Any) -> Any:
    """Plain data with NumPy's numbers as Python's, and with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [json_ready(inner) for inner in value]
    if isinstance(value, int) or not isinstance(value, Real):
        return value
    number = int(value) if isinstance(value, Integral) else float(value)
    return number if math.isfinite(number) else None


def _combine(measures: list[Measures]) -> Measures:
    names = dict.fromkeys(name for layer in measures for name in layer)
    values = {name: [layer[name] for layer in measures if name in layer] for name in names}
    return {name: sum(values[name]) if name == "similarity" else fmean(values[name]) for name in names}
