"""Layers and descent together: a model, or one weight, is changed in place and told about in a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from convsim_init.errors import InputError
from convsim_init.functional.similarity import (
    all_finite,
    bank_weight,
    computing_bank,
    filter_norms,
    full_precision,
)
from convsim_init.layers.find import Layer, find_layers, pair_obstacle
from convsim_init.layers.weights import RefusedError
from convsim_init.metrics.measure import measure_bank
from convsim_init.optim.accelerated import descend_together
from convsim_init.optim.descent import Descent, Stop, descend
from convsim_init.parallel.partition import own_layers, share
from convsim_init.parallel.processes import Ranks
from convsim_init.parallel.threads import Team
from convsim_init.report.report import LayerReport, Outcome, Report
from convsim_init.settings import Settings


@torch.no_grad()
def convsim_(weight: Tensor, *, groups: int = 1, transposed: bool = False, settings: Settings | None = None) -> Tensor:
    """Lower the Convolutional Similarity of a convolution's weight, in place, like the functions of `torch.nn.init`.

    The weight must already be drawn: its filters are moved, not made. Any device and memory format; computed in
    float32 (float64 for float64) and copied back.

    Args:
        weight: ``[out_channels, in_channels / groups, *kernel_size]``, or, if ``transposed``,
            ``[in_channels, out_channels / groups, *kernel_size]``; float16, bfloat16, float32 or float64.
        groups: Groups of the convolution.
        transposed: Whether the weight is that of a transposed convolution.
        settings: How. Default: `Settings()`.

    Returns:
        ``weight``. Unchanged where its filters form no pair: a single filter, one filter per group, zero filters.

    Raises:
        InputError: If the weight's dtype or shape does not fit, or it holds infinities or NaN.
    """
    settings = settings or Settings()
    bank = computing_bank(weight, groups=groups, transposed=transposed, channels=settings.channels)
    if not all_finite(bank):
        raise InputError("expected a weight of finite numbers, got infinities or NaN; draw it anew first")
    if pair_obstacle(bank, settings.channels) is None:
        with full_precision(weight.device), Team.for_devices(weight.device) as team:
            descent = descend(bank, settings, team=team)
        weight.copy_(bank_weight(descent.bank, groups=groups, transposed=transposed))
    return weight


def initialize_(
    model: nn.Module | Mapping[str, object],
    *,
    settings: Settings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Report:
    """Lower the Convolutional Similarity of every convolution of a model, in place.

    Treated are the subclasses of PyTorch's convolutions, transposed ones too, of any rank, on any device and in any
    memory format. Left as they are, with the reason in the report: frozen layers, layers without a filter pair
    (depthwise ones, unless ``channels="all"``), layers without a usable weight, and those not selected. A module or
    weight used twice is treated once. ``requires_grad``, dtype, device, memory format and the random state of the
    caller stay as they were. The same weights and settings give the same result.

    What counts is the weight that the forward pass uses: behind a parametrization, weight_norm or a class that
    standardizes its weight, the parameters are chosen so that it is the one wanted. Where they cannot be, the layer is
    reported as approximated, or, if it came out no better, put back and skipped.

    Args:
        model: Any module; DistributedDataParallel and torch.compile wrappers are looked through. Or a state dict, whose
            tensors are then changed; what its layers are is told by name and shape, as in `measure`.
        settings: How. Default: `Settings()`.
        include: Shell patterns of layer names, such as ``"layer4.*"``; where any are given, others are left alone.
        exclude: Shell patterns of layer names to leave alone.
        device: Where to compute. Default: where each weight is.
        progress: Show a progress bar on stderr.
        group: Processes of `torch.distributed` to divide the layers over, such as ``torch.distributed.group.WORLD``.
            All of them must call, with the same model and arguments, and all come to have the weights that one alone
            would have. Default: None; the process works alone and talks to no other.

    Returns:
        What became of each layer.

    Raises:
        InputError: If there is no convolution, a pattern matches none, or the processes of the group do not start from
            the same weights.
        RunError: If one of them has died.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    layers = find_layers(model, _patterns("include", include), _patterns("exclude", exclude))
    ranks = Ranks(group)
    own = own_layers(layers, ranks)
    reports: dict[str, LayerReport] = {}
    with (
        tqdm(total=len(own), desc="layers", unit="layer", disable=not progress, leave=False) as bar,
        Team.for_devices(*(torch.device(device or layer.device) for layer in layers)) as team,
    ):
        together = descend_together(own, settings, device, on_step=team.checkpoint)
        treat = partial(_treat, together=together, settings=settings, device=device, checkpoint=team.checkpoint)
        for report in team.as_completed(treat, own):
            reports[report.name] = report
            bar.update()
    shared = share(layers, reports, ranks, device=device)
    return Report(settings, shared, time.perf_counter() - started, processes=ranks.size)


@torch.no_grad()
def plan(
    model: nn.Module | Mapping[str, object],
    *,
    settings: Settings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Report:
    """What `initialize_` would do, without doing it: layers to treat are reported as planned."""
    settings = settings or Settings()
    started = time.perf_counter()
    reports = []
    for layer in find_layers(model, _patterns("include", include), _patterns("exclude", exclude)):
        reason = layer.obstacle
        if reason is None:
            reason = pair_obstacle(layer.bank(settings.channels), settings.channels)
        outcome = Outcome.SKIPPED if reason else Outcome.PLANNED
        reports.append(LayerReport(layer.name, layer.kind, layer.shape, outcome, layer.explained(reason)))
    return Report(settings, reports, time.perf_counter() - started)


@torch.no_grad()
def _treat(
    layer: Layer,
    *,
    together: Mapping[str, tuple[Descent, float]],
    checkpoint: Callable[[], None],
    settings: Settings,
    device: torch.device | str | None,
) -> LayerReport:
    started = time.perf_counter()
    descent, spent = together.get(layer.name, (None, 0.0))
    outcome, reason, details = Outcome.SKIPPED, layer.obstacle, dict[str, Any]()
    if reason is None:
        with full_precision(torch.device(device or layer.device)):
            outcome, reason, details = _lower(layer, descent, checkpoint, settings, device)
    seconds, reason = spent + time.perf_counter() - started, layer.explained(reason)
    return LayerReport(layer.name, layer.kind, layer.shape, outcome, reason, seconds=seconds, **details)


def _lower(
    layer: Layer,
    descent: Descent | None,
    checkpoint: Callable[[], None],
    settings: Settings,
    device: torch.device | str | None,
) -> tuple[Outcome, str | None, dict[str, Any]]:
    bank = layer.bank(settings.channels, device)
    if not all_finite(bank):
        return Outcome.FAILED, "left as it was: its weight holds infinities or NaN", {}
    obstacle = pair_obstacle(bank, settings.channels)
    if obstacle:
        return Outcome.SKIPPED, obstacle, {}
    before, norms = measure_bank(bank, settings.channels), filter_norms(bank)
    descent = descent or descend(bank, settings, on_step=checkpoint)
    details: dict[str, Any] = {"steps": descent.steps, "losses": descent.losses}
    if descent.stop is Stop.NON_FINITE:
        return Outcome.FAILED, f"left as it was: {descent.stop.value}", details
    put_back = layer.weight.backup()
    try:
        difference = layer.weight.write(bank_weight(descent.bank, groups=layer.groups, transposed=layer.transposed))
    except RefusedError as error:
        return Outcome.FAILED, str(error), details
    written = layer.bank(settings.channels, device)
    norm_ratio = float((filter_norms(written) / norms)[norms > 0].mean())
    after = measure_bank(written, settings.channels)
    if difference and all(after[name] >= before[name] for name in before):
        put_back()
        return Outcome.SKIPPED, f"left as it was: {difference} and is no better", details
    details |= {"before": before, "after": after | {"norm_ratio": norm_ratio}}
    return Outcome.APPROXIMATED if difference else Outcome.INITIALIZED, difference, details


def _patterns(option: str, patterns: Sequence[str]) -> Sequence[str]:
    if isinstance(patterns, str):
        raise InputError(f"{option}: expected a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
    return patterns
