"""`initialize_` for a model, `convsim_` for a single weight, and `plan`, which changes nothing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from convsim_init.errors import InputError
from convsim_init.functional.bank import all_finite, bank_weight, computing_bank, computing_device, full_precision
from convsim_init.layers.find import find_layers
from convsim_init.layers.layer import Layers
from convsim_init.layers.memory import refuse_fake_mode
from convsim_init.layers.names import unwrap
from convsim_init.layers.remarks import model_remarks, share_remarks
from convsim_init.layers.symbolic.normalized import decide_channels
from convsim_init.layers.weights import StoredWeight
from convsim_init.optim.descent import Stop, descend
from convsim_init.parallel.partition import cost, own_layers, share
from convsim_init.parallel.processes import Ranks
from convsim_init.parallel.threads import Team
from convsim_init.report.report import LayerReport, Outcome, Report
from convsim_init.report.text import quoted_layer, some
from convsim_init.settings import DEFAULT_DEVICE, Settings, check_settings
from convsim_init.tracking.copies import watch_copies
from convsim_init.tracking.history import History, open_histories, sample_layer
from convsim_init.treat import bank_obstacle, treat

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"  # of the cost: layers differ in it a thousandfold


@torch.no_grad()
def convsim_(weight: Tensor, *, groups: int = 1, transposed: bool = False, settings: Settings | None = None) -> Tensor:
    """Lower the Convolutional Similarity of a convolution's weight, in place, like the functions of `torch.nn.init`.

    The weight must be drawn already, because its filters are moved from where they are. It may have any device and
    memory format; the computation runs on the CPU, in float32, or in float64 for a float64 weight. By default kernels
    of the same input channel are compared, which suits a convolution that a normalization follows. A weight alone does
    not show that: where none follows, pass ``settings=Settings(channels="all")``, as `initialize_` does by itself.

    Args:
        weight: ``[out_channels, in_channels / groups, *kernel_size]``, or, if ``transposed``,
            ``[in_channels, out_channels / groups, *kernel_size]``; float16, bfloat16, float32 or float64.
        groups: Groups of the convolution.
        transposed: Whether the weight is that of a transposed convolution.
        settings: Optimization settings. Default: `Settings()`.

    Returns:
        ``weight``. It is unchanged if its filters form no pair (a single filter, one filter per group, zero filters),
        if its kernels have one tap, all channels are compared and norms are preserved, because the norms then fix the
        similarity, or if its kernels are larger than some 45×45.

    Raises:
        InputError: If the weight's dtype or shape does not fit, or if it or the loss holds infinities or NaN.

    Examples:
        >>> weight = torch.nn.init.kaiming_normal_(torch.empty(16, 8, 3, 3))
        >>> before = ci.convolutional_similarity(weight, normalized=True)
        >>> after = ci.convolutional_similarity(ci.convsim_(weight), normalized=True)
        >>> bool(after < before / 5)
        True
    """
    refuse_fake_mode()
    settings = check_settings(settings)
    if not isinstance(weight, Tensor):
        raise InputError(
            f"expected a convolution's weight, got {type(weight).__name__}: pass a tensor like conv.weight"
        )
    obstacle = StoredWeight(weight, trained=False).obstacle(read_only=False)
    if obstacle is not None:
        raise InputError(f"expected a convolution's weight that can be changed, got one that cannot: {obstacle.text}")
    # A slice of a parameter has a grad_fn, too, although writing to it reaches the parameter.
    owner = weight._base if weight._is_view() and weight._base is not None else weight
    if owner.grad_fn is not None:
        raise InputError(
            "expected a parameter or a part of one, got a weight that is computed, whose change would be lost: pass "
            "the model to initialize_, which sets what it is computed from"
        )
    here = weight.to(DEFAULT_DEVICE)
    bank = computing_bank(here, groups=groups, transposed=transposed, channels=settings.compared_channels)
    if not all_finite(bank):
        raise InputError("expected a weight of finite numbers, got infinities or NaN; draw it anew first")
    if bank_obstacle(bank, settings) is None:
        with full_precision(bank.device), Team.for_device(bank.device) as team:
            descent = descend(bank, settings, team=team)
        if descent.stop is Stop.NON_FINITE:
            raise InputError(f"expected a weight that can be optimized, got one for which {descent.stop.value}")
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

    This includes transposed convolutions and subclasses of PyTorch's, of any rank, on any device and in any memory
    format. Some layers are left as they are, with the reason in the report: frozen ones, those without a pair of
    filters (depthwise ones), 1×1 layers that no normalization follows (unless matched channels or free norms are asked
    for), those without a usable weight, and those not selected.
    A module or weight used twice is treated once. ``requires_grad``, dtype, device, memory format and the random state
    of the caller stay as they were. The same weights and settings give the same result.

    By default ``Settings.channels`` depends on whether a normalization follows the layer, which a symbolic trace of a
    copy of the model without data finds out. Where that fails, and where the model itself is a convolution, channels
    are matched; the report says where the trace failed.

    What counts is the weight that the forward pass uses: behind a parametrization, weight_norm or a class that
    standardizes its weight, the parameters are set so that the forward pass uses the optimized weight. Where they
    cannot be, the layer is reported as approximated, or, if it does not improve, restored and reported as skipped.

    Args:
        model: Any module; wrappers such as DistributedDataParallel and torch.compile are looked through. Or a state
            dict, whose tensors are then changed; its layers are inferred from names and shapes, as in `measure`.
        settings: Optimization settings. Default: `Settings()`.
        include: Shell patterns of layer names, such as ``"layer4.*"``; where any are given, others are left alone.
        exclude: Shell patterns of layer names to leave alone.
        device: Device to compute on. Default: the CPU, wherever the weights are, because no GPU has been measured to
            be faster; Apple's MPS stands for the CPU, too. Weights stay on their device.
        progress: Show a progress bar on stderr.
        group: Processes of `torch.distributed` to divide the layers over, such as ``torch.distributed.group.WORLD``.
            Each of them must make this call with the same model and arguments, and gets the weights that one process
            alone would compute. Default: None; the process works alone.

    Returns:
        What became of each layer. Where none was treated, a warning says so, too.

    Raises:
        InputError: If there is no convolution, a pattern matches none, or the processes of the group do not start from
            the same weights and settings.
        RunError: If a process of the group has died.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3))
        >>> report = ci.initialize_(model, exclude=["3"])
        >>> [(layer.name, layer.outcome.value, layer.reason) for layer in report.layers]
        [('0', 'initialized', None), ('3', 'skipped', 'excluded')]
    """
    settings = check_settings(settings)
    layers = find_layers(model, include, exclude)
    report = initialize_layers(model, layers, settings, device, progress=progress, group=group)
    if not any(layer.after for layer in report.layers):
        reasons = [f"{quoted_layer(layer.name)} {layer.outcome.value}, {layer.reason}" for layer in report.layers]
        warnings.warn(f"no convolution was treated: {some(reasons, 1)}", stacklevel=2)
    return report


def initialize_layers(
    model: nn.Module | Mapping[str, object],
    layers: Layers,
    settings: Settings,
    device: torch.device | str | None,
    *,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
    within: History | None = None,
) -> Report:
    """Initialize the layers and record the result in every open `initializing` context; `within` is the caller's."""
    started = time.perf_counter()
    place = _checked_device(device)
    # Read once: a context that another thread opens from now on saw no samples of this call.
    histories = list(open_histories)
    samples = [sample_layer(layer) for layer in layers] if histories else []
    ranks = Ranks(group)
    own = own_layers(layers, settings, ranks)
    find_parted = watch_copies(model, layers)  # now, while copies are still equal
    remarks = model_remarks(model, layers)
    decisions, channel_remarks = decide_channels(layers, settings)
    costs = {layer.name: cost(layer) for layer in own}
    # Made only if it is shown: even a disabled bar leaves tqdm's monitor thread behind.
    make_bar = partial(tqdm, total=sum(costs.values()), desc="layers", bar_format=BAR, leave=False)
    reports: dict[str, LayerReport] = {}
    holding = [layer.device for layer in own]
    with make_bar() if progress else nullcontext() as bar, Team.for_device(place, holding=holding) as team:
        treat_layer = partial(treat, decisions=decisions, device=place, on_step=team.checkpoint)
        for layer_report in team.as_completed(treat_layer, own):
            reports[layer_report.name] = layer_report
            if bar is not None:
                bar.update(costs[layer_report.name])
    shared = share(layers, reports, ranks, device=device)
    seconds = time.perf_counter() - started
    remarks += [*channel_remarks, *find_parted(), *share_remarks(model, layers, _treated(shared))]
    report = Report(settings, shared, seconds, processes=ranks.size, device=str(place), remarks=remarks)
    name = type(unwrap(model) if isinstance(model, nn.Module) else model).__name__
    noted = [history.note(name, layers, samples, report, chosen=history is not within) for history in histories]
    report.remarks += dict.fromkeys(remark for remarks in noted for remark in remarks)
    return report


@torch.no_grad()
def plan(
    model: nn.Module | Mapping[str, object],
    *,
    settings: Settings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Report:
    """Report what `initialize_` would do, and change nothing; layers that it would treat are reported as planned."""
    settings = check_settings(settings)
    started = time.perf_counter()
    layers = find_layers(model, include, exclude)
    decisions, channel_remarks = decide_channels(layers, settings)
    device = torch.device(DEFAULT_DEVICE)
    reports = [replace(treat(layer, decisions=decisions, device=device), seconds=0.0) for layer in layers]
    remarks = [*model_remarks(model, layers), *channel_remarks, *share_remarks(model, layers, _treated(reports))]
    return Report(settings, reports, time.perf_counter() - started, remarks=remarks)


def _treated(reports: Sequence[LayerReport]) -> set[str]:
    """Names of the layers that were treated, or would be."""
    return {report.name for report in reports if report.after or report.outcome is Outcome.PLANNED}


def _checked_device(device: torch.device | str | None) -> torch.device:
    try:
        found = torch.empty(0, device=device or DEFAULT_DEVICE).device
    except Exception as error:  # its type depends on what is wrong with the device
        raise InputError(f"expected a device that is here, such as 'cpu', got {device!r}: {error}") from error
    if found.type == "meta":
        raise InputError(f"expected a device to compute on, got {device!r}: leave it out")
    return computing_device(found)
