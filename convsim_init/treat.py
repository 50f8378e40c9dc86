"""What is done to one layer: its similarity is lowered, and what the forward pass then uses is checked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convsim_init.functional.bank import all_finite, computing_device, filter_norms, full_precision
from convsim_init.layers.find import pair_obstacle
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.layer import Layer
from convsim_init.layers.weights import RefusedError, StoredWeight
from convsim_init.metrics.measure import measure_bank
from convsim_init.optim.descent import Stop, descend
from convsim_init.report.report import LayerReport, Outcome
from convsim_init.report.text import error_text
from convsim_init.settings import Channels, Settings

NORM_TOLERANCE = 1e-3  # relative change of a filter's norm that does not count, beyond the precision of its dtype


@torch.no_grad()
def treat(
    layer: Layer,
    *,
    decisions: Mapping[str, tuple[Settings, str | None]],
    device: torch.device,
    on_step: Callable[[], None] | None = None,
) -> LayerReport:
    """Lower the similarity of a layer's filters in place, and report how; without `on_step` only report the plan.

    The decisions of `decide_channels` are, by the names of layers, their settings and the reason for their channels.
    """
    started = time.perf_counter()
    report = LayerReport(layer.name, layer.kind, layer.shape, Outcome.SKIPPED)
    if layer.obstacle is not None:
        report = replace(report, reason=layer.obstacle.text, twin=layer.obstacle.twin)
    else:
        # The second for the layer's own code, which runs where the weight is.
        with full_precision(device), full_precision(computing_device(layer.device)):
            report = _lower(layer, report, *decisions[layer.name], device, on_step)
    return replace(report, reason=layer.explained(report.reason), seconds=time.perf_counter() - started)


def _lower(
    layer: Layer,
    report: LayerReport,
    settings: Settings,
    channels_reason: str | None,
    device: torch.device,
    on_step: Callable[[], None] | None,
) -> LayerReport:
    channels = settings.compared_channels
    report = replace(report, channels=channels)
    bank = layer.bank(channels, device)
    if not all_finite(bank):
        return replace(report, outcome=Outcome.FAILED, reason="left as it was: its weight holds infinities or NaN")
    if (obstacle := bank_obstacle(bank, settings)) is not None:
        return replace(report, reason=obstacle)
    if on_step is None:
        return replace(report, outcome=Outcome.PLANNED, reason=channels_reason)
    mask = layer.mask(channels, device)
    descent = descend(bank, settings, mask=mask, on_step=on_step)
    report = replace(report, steps=descent.steps, losses=descent.losses)
    if descent.stop is Stop.NON_FINITE:
        return replace(report, outcome=Outcome.FAILED, reason=f"left as it was: {descent.stop.value}")
    mask_reason = None if mask is None else f"within its mask, {float(mask.float().mean()):.0%} of the entries"
    return _write(layer, report, bank, descent.bank, channels, [channels_reason, mask_reason])


def _write(
    layer: Layer, report: LayerReport, bank: Tensor, lowered: Tensor, channels: Channels, reasons: Sequence[str | None]
) -> LayerReport:
    """Write a lowered bank to its layer, but restore the weight if what the forward pass then uses is no better."""
    # Now, because the bank may share the memory that is written to.
    before, norms = measure_bank(bank, channels), filter_norms(bank)
    with holding_weights_lock():
        restore = layer.weight.backup()
        try:
            difference = layer.write(lowered)
            used = layer.bank(channels, bank.device)  # by the forward pass, from now on
            failure = None if all_finite(used) else "makes infinities or NaN of the new weight"
        except RefusedError as error:
            restore()
            return replace(report, reason=str(error))
        except Exception as error:  # whatever the layer's own code raises
            failure = f"ended with {error_text(error)}"
        if failure is not None:
            restore()
            return replace(report, outcome=Outcome.FAILED, reason=f"left as it was: its own code {failure}")
    after, used_norms = measure_bank(used, channels), filter_norms(used)
    compared = list(before)
    # The lowered norms, not those before: a descent with free norms changes them on purpose.
    norm_change = float(((used_norms - filter_norms(lowered)).abs() / norms)[norms > 0].max())
    dtype = layer.weight.sources[0].dtype
    if norm_change > NORM_TOLERANCE + torch.finfo(dtype).eps:
        cause = f"the range of {dtype}" if isinstance(layer.weight, StoredWeight) else "its forward pass"
        difference = difference or f"{cause} changes the norms of filters by up to {norm_change:.1%}"
        compared.remove("similarity")  # smaller norms alone would lower it
    # One lower measure is enough: with free norms the normalized one may rise while the raw one falls.
    if not any(after[name] < before[name] for name in compared):
        with holding_weights_lock():
            restore()
        cause = f"{difference} and" if difference else "the new weight"
        return replace(report, reason=f"left as it was: {cause} is no better")
    after["norm_ratio"] = float((used_norms / norms)[norms > 0].mean())
    outcome = Outcome.APPROXIMATED if difference else Outcome.INITIALIZED
    reason = ": ".join(filter(None, [*reasons, difference])) or None
    return replace(report, outcome=outcome, reason=reason, before=before, after=after)


def bank_obstacle(bank: Tensor, settings: Settings) -> str | None:
    """Why the similarity of a bank ``[G, M, C, *kernel_size]`` cannot be lowered with these settings."""
    if (obstacle := pair_obstacle(bank)) is not None:
        return obstacle
    all_channels = settings.compared_channels == "all" or bank.shape[2] == 1
    if all_channels and settings.norm == "preserve" and math.prod(bank.shape[3:]) == 1:
        return "kernels of one tap, compared over all channels: at fixed norms there is nothing to lower"
    return None
