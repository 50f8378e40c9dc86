"""A model's or a checkpoint's convolutions at one time: what was measured of them, and their filters to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from convsim_init.layers.memory import Memory, memories
from convsim_init.metrics.measure import measure_and_find
from convsim_init.report.report import Report


@dataclass(frozen=True)
class Snapshot:
    """Convolutions at one time."""

    label: str  # for people, for instance "before"
    report: Report  # of `measure`
    banks: dict[str, Tensor] = field(repr=False)  # of each layer measured, [G, M, C, *kernel_size] on the CPU
    memory: set[Memory] = field(default_factory=set, repr=False)  # of what the weights are stored in or computed from

    def select(self, include: Sequence[str], exclude: Sequence[str] = ()) -> Snapshot:
        """The snapshot of the layers alone that `Report.select` chooses."""
        report = self.report.select(include, exclude)
        names = {layer.name for layer in report.layers}
        return replace(self, report=report, banks={name: bank for name, bank in self.banks.items() if name in names})


def take_snapshot(label: str, source: nn.Module | Mapping[str, Tensor], *, copy: bool = False) -> Snapshot:
    """Measure a model or a state dict and keep its filters, or a copy of them if they are about to change."""
    report, layers = measure_and_find(source)
    measured = {layer.name for layer in report.layers if layer.before}
    banks = {layer.name: layer.bank().cpu() for layer in layers if layer.name in measured}
    if copy:
        banks = {name: bank.clone() for name, bank in banks.items()}
    memory = {part for layer in layers for part in memories(layer.weight.sources)}
    return Snapshot(label, report, banks, memory)
