"""A model's or a checkpoint's convolutions at one time: what was measured of them, and their filters to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.utils import parametrize

from convsim_init.layers import find_layers
from convsim_init.redundancy import measure
from convsim_init.report import Report
from convsim_init.similarity import filter_bank


@dataclass(frozen=True)
class Snapshot:
    """Convolutions at one time.

    Attributes:
        label: What people call it, for instance ``"before"``.
        report: Of `measure`.
        banks: The filters of each layer that was measured, ``[G, M, C, *kernel_size]`` on the CPU, G
            groups of M filters of C input channels. Layers whose weight is computed by a parametrization have none.
    """

    label: str
    report: Report
    banks: dict[str, Tensor] = field(repr=False)

    def select(self, include: Sequence[str]) -> Snapshot:
        """The snapshot of the layers alone whose names match one of these shell patterns; of all if there is none.

        Raises:
            InputError: If a pattern matches no layer.
        """
        report = self.report.select(include)
        names = {layer.name for layer in report.layers}
        return replace(self, report=report, banks={name: bank for name, bank in self.banks.items() if name in names})


def take_snapshot(label: str, source: nn.Module | Mapping[str, Tensor]) -> Snapshot:
    """Measure a model or a state dict and keep its filters: of a model, whose weights may change, a copy.

    Raises:
        InputError: If there is no convolution.
    """
    report = measure(source)
    measured = [layer.name for layer in report.layers if layer.before]
    banks = _copied(source) if isinstance(source, nn.Module) else _shared(source)
    return Snapshot(label, report, {name: banks[name] for name in measured if name in banks})


def _copied(model: nn.Module) -> dict[str, Tensor]:
    banks = {}
    for layer in find_layers(model, frozen=True):
        module = layer.module
        if layer.obstacle is None and not parametrize.is_parametrized(module, "weight"):
            weight = module.weight.detach().cpu().clone()
            banks[layer.name] = filter_bank(weight, groups=module.groups, transposed=module.transposed)
    return banks


def _shared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {f".{key}".removesuffix(".weight")[1:]: value for key, value in state.items() if _is_weight(key, value)}
    return {name: filter_bank(weight.detach().cpu()) for name, weight in weights.items()}


def _is_weight(key: str, value: Tensor) -> bool:
    return f".{key}".endswith(".weight") and value.dim() > 2 and value.is_floating_point() and value.numel() > 0
