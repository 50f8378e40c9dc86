"""A model's or a checkpoint's convolutions at one time: what was measured of them, and their filters to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from convsim_init.metrics.measure import measure_and_find
from convsim_init.report.report import Report


@dataclass(frozen=True)
class Snapshot:
    """Convolutions at one time.

    Attributes:
        label: Name for people, for instance ``"before"``.
        report: Result of `measure`.
        banks: The filters of each layer that was measured, ``[G, M, C, *kernel_size]`` on the CPU, G
            groups of M filters of C input channels.
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


def take_snapshot(label: str, source: nn.Module | Mapping[str, Tensor], *, copy: bool = False) -> Snapshot:
    """Measure a model or a state dict and keep its filters, or a copy of them if they are about to change.

    Raises:
        InputError: If there is no convolution.
    """
    report, layers = measure_and_find(source)
    measured = {layer.name for layer in report.layers if layer.before}
    banks = {layer.name: layer.bank().cpu() for layer in layers if layer.name in measured}
    if copy:
        banks = {name: bank.clone() for name, bank in banks.items()}
    return Snapshot(label, report, banks)
