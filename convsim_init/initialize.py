"""Layers and descent together: a model, or one weight, is changed in place and told about in a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from convsim_init.errors import InputError
from convsim_init.functional.bank import (
    all_finite,
    bank_weight,
    computing_bank,
    computing_device,
    filter_norms,
    full_precision,
)
from convsim_init.layers.find import Layer, find_layers, pair_obstacle
from convsim_init.layers.weights import RefusedError
from convsim_init.metrics.measure import measure_bank
from convsim_init.optim.descent import Stop, descend
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

    Examples:
        >>> weight = torch.nn.init.kaiming_normal_(torch.empty(16, 8, 3, 3))
        >>> before = ci.convolutional_similarity(weight, normalized=True)
        >>> after = ci.convolutional_similarity(ci.convsim_(weight), normalized=True)
        >>> bool(after < before / 5)
        True
    """
    settings = settings or Settings()
    bank = computing_bank(weight, groups=groups, transposed=transposed, channels=settings.channels)
    if not all_finite(bank):
        raise InputError("expected a weight of finite numbers, got infinities or NaN; draw it anew first")
    if pair_obstacle(bank, settings.channels) is None:
        with full_precision(bank.device), Team.for_devices(bank.device) as team:
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
        device: Device to compute on. Default: that of each weight. Weights on Apple's MPS are computed
            with on the CPU.
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

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        >>> report = ci.initialize_(model, exclude=["2"])
        >>> [(layer.name, layer.outcome.value, layer.reason) for layer in report.layers]
        [('0', 'initialized', None), ('2', 'skipped', 'excluded')]
    """
    settings = settings or Settings()
    started = time.perf_counter()
    layers = find_layers(model, _patterns("include", include), _patterns("exclude", exclude))
    ranks = Ranks(group)
    own = own_layers(layers, ranks)
    reports: dict[str, LayerReport] = {}
    with (
        tqdm(total=len(own), desc="layers", unit="layer", disable=not progress, leave=False) as bar,
        Team.for_devices(*(computing_device(torch.device(device or layer.device)) for layer in layers)) as team,
    ):
        treat = partial(_treat, settings=settings, device=device, on_step=team.checkpoint)
        for report in team.as_completed(treat, own):
            reports[report.name] = report
            bar.update()
    shared = share(layers, reports, ranks, device=device)
    places = ", ".join(dict.fromkeys(str(computing_device(torch.device(device or layer.device))) for layer in layers))
    return Report(settings, shared, time.perf_counter() - started, processes=ranks.size, device=places)


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
    layer: Layer, *, settings: Settings, device: torch.device | str | None, on_step: Callable[[], None]
) -> LayerReport:
    """Lower the similarity of one layer's filters, write them, and report what the forward pass then uses."""
    started = time.perf_counter()
    report = LayerReport(layer.name, layer.kind, layer.shape, Outcome.SKIPPED, layer.obstacle)
    if layer.obstacle is None:
        with full_precision(computing_device(torch.device(device or layer.device))):
            report = _lower(layer, report, settings, device, on_step)
    return replace(report, reason=layer.explained(report.reason), seconds=time.perf_counter() - started)


def _lower(
    layer: Layer,
    report: LayerReport,
    settings: Settings,
    device: torch.device | str | None,
    on_step: Callable[[], None],
) -> LayerReport:
    bank = layer.bank(settings.channels, device)
    if not all_finite(bank):
        return replace(report, outcome=Outcome.FAILED, reason="left as it was: its weight holds infinities or NaN")
    obstacle = pair_obstacle(bank, settings.channels)
    if obstacle:
        return replace(report, reason=obstacle)
    before, norms = measure_bank(bank, settings.channels), filter_norms(bank)
    descent = descend(bank, settings, on_step=on_step)
    report = replace(report, steps=descent.steps, losses=descent.losses)
    if descent.stop is Stop.NON_FINITE:
        return replace(report, outcome=Outcome.FAILED, reason=f"left as it was: {descent.stop.value}")
    put_back = layer.weight.backup()
    try:
        difference = layer.weight.write(bank_weight(descent.bank, groups=layer.groups, transposed=layer.transposed))
    except RefusedError as error:
        return replace(report, outcome=Outcome.FAILED, reason=str(error))
    written = layer.bank(settings.channels, device)  # read back: what the forward pass uses now
    after = measure_bank(written, settings.channels)
    if difference and all(after[name] >= before[name] for name in before):
        put_back()
        return replace(report, reason=f"left as it was: {difference} and is no better")
    after["norm_ratio"] = float((filter_norms(written) / norms)[norms > 0].mean())
    outcome = Outcome.APPROXIMATED if difference else Outcome.INITIALIZED
    return replace(report, outcome=outcome, reason=difference, before=before, after=after)


def _patterns(option: str, patterns: Sequence[str]) -> Sequence[str]:
    if isinstance(patterns, str):
        raise InputError(f"{option}: expected a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
    return patterns
