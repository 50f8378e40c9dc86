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
from convsim_init.layers.remarks import divergence_remarks, frozen_twins, model_remarks
from convsim_init.layers.trial import LIVE
from convsim_init.layers.weights import RefusedError
from convsim_init.metrics.measure import measure_bank
from convsim_init.optim.descent import Stop, descend
from convsim_init.parallel.partition import own_layers, share
from convsim_init.parallel.processes import Ranks
from convsim_init.parallel.threads import Team
from convsim_init.report.report import LayerReport, Outcome, Report
from convsim_init.settings import Settings

NORM_CHANGE = 1e-3  # of a filter that counts as kept, beside the precision of its dtype
NOT_FINITE = "left as it was: its weight holds infinities or NaN"


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
        settings: Optimization settings. Default: `Settings()`.

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
    owner = weight._base if weight._is_view() and weight._base is not None else weight
    if owner.grad_fn is not None:
        raise InputError(
            "expected a parameter or a part of one, got a weight that is computed, whose change would be lost: pass "
            "the model to initialize_, which sets what it is computed from"
        )
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
    reported as approximated, or, if it does not improve, put back and skipped.

    Args:
        model: Any module; DistributedDataParallel and torch.compile wrappers are looked through. Or a state dict, whose
            tensors are then changed; its layers are inferred from names and shapes, as in `measure`.
        settings: Optimization settings. Default: `Settings()`.
        include: Shell patterns of layer names, such as ``"layer4.*"``; where any are given, others are left alone.
        exclude: Shell patterns of layer names to leave alone.
        device: Device to compute on. Default: that of each weight. Weights on Apple's MPS are computed
            with on the CPU.
        progress: Show a progress bar on stderr.
        group: Processes of `torch.distributed` to divide the layers over, such as ``torch.distributed.group.WORLD``.
            All of them must call, with the same model and arguments, and all get the weights that one
            alone would compute. Default: None; the process works alone.

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
    layers = find_layers(model, include, exclude)
    ranks = Ranks(group)
    own = own_layers(layers, ranks)
    twins = frozen_twins(layers)
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
    seconds, remarks = time.perf_counter() - started, [*model_remarks(model, layers), *divergence_remarks(twins)]
    return Report(settings, shared, seconds, processes=ranks.size, device=places, remarks=remarks)


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
    layers = find_layers(model, include, exclude)
    for layer in layers:
        reason, outcome = layer.obstacle, Outcome.SKIPPED
        if reason is None:
            bank = layer.bank(settings.channels)
            reason = pair_obstacle(bank, settings.channels)
            if not all_finite(bank):
                reason, outcome = NOT_FINITE, Outcome.FAILED
            elif reason is None:
                outcome = Outcome.PLANNED
        reports.append(LayerReport(layer.name, layer.kind, layer.shape, outcome, layer.explained(reason)))
    return Report(settings, reports, time.perf_counter() - started, remarks=model_remarks(model, layers))


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
        return replace(report, outcome=Outcome.FAILED, reason=NOT_FINITE)
    obstacle = pair_obstacle(bank, settings.channels)
    if obstacle:
        return replace(report, reason=obstacle)
    before, norms = measure_bank(bank, settings.channels), filter_norms(bank)
    mask = layer.mask(settings.channels, device)
    descent = descend(bank, settings, mask=mask, on_step=on_step)
    report = replace(report, steps=descent.steps, losses=descent.losses)
    if descent.stop is Stop.NON_FINITE:
        return replace(report, outcome=Outcome.FAILED, reason=f"left as it was: {descent.stop.value}")
    weight = bank_weight(descent.bank, groups=layer.groups, transposed=layer.transposed)
    with LIVE:
        put_back = layer.weight.backup()
        try:
            difference = layer.weight.write(weight)
            written = layer.bank(settings.channels, device)  # read back: what the forward pass uses now
        except RefusedError as error:
            put_back()
            return replace(report, reason=str(error))
        except Exception as error:  # whatever the layer's own code raises
            put_back()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return replace(report, outcome=Outcome.FAILED, reason=f"left as it was: its own code ended with {text}")
        if not all_finite(written):
            put_back()
            reason = "left as it was: its own code makes infinities or NaN of the new weight"
            return replace(report, outcome=Outcome.FAILED, reason=reason)
    after, kept = measure_bank(written, settings.channels), filter_norms(written)
    change = float(((kept - filter_norms(descent.bank)).abs() / norms)[norms > 0].max())
    if change > NORM_CHANGE + torch.finfo(layer.weight.sources[0].dtype).eps:
        difference = difference or f"its forward pass changes the norms of filters by up to {change:.1%}"
    gain = max(before[name] - after[name] for name in before)
    if gain < 0 or (difference and gain == 0):
        with LIVE:
            put_back()
        cause = f"{difference} and" if difference else "what it makes of the new weight"
        return replace(report, reason=f"left as it was: {cause} is no better")
    after["norm_ratio"] = float((kept / norms)[norms > 0].mean())
    outcome = Outcome.APPROXIMATED if difference else Outcome.INITIALIZED
    within = None if mask is None else f"within its mask, {float(mask.float().mean()):.0%} of the entries"
    remark = ": ".join(filter(None, [within, difference])) or None
    return replace(report, outcome=outcome, reason=remark, before=before, after=after)
