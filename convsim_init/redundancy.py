"""How redundant the filters of a layer, or of every layer of a model, are, in figures that scale cannot fool."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from convsim_init.correlation import (
    SPECTRA,
    Spectrum,
    covariance_rows,
    directions,
    effective_rank,
    mean_correlation,
    unit_filters,
)
from convsim_init.errors import InputError
from convsim_init.fourier import Fourier, Halves
from convsim_init.layers import Layer, find_layers, pair_obstacle
from convsim_init.parallel import Team
from convsim_init.report import LayerReport, Measures, Outcome, Report
from convsim_init.settings import Channels, Settings
from convsim_init.similarity import (
    accumulation_dtype,
    all_finite,
    count_pairs,
    filter_bank,
    filter_norms,
    full_precision,
    nonzero,
    partner_power,
    per_filter,
    power_spectrum,
)

KERNEL_RANKS = (1, 2, 3)
COMPUTED = (".weight_v", ".weight_orig", ".parametrizations.weight.original", ".parametrizations.weight.original1")
TOLD_BY_SHAPE = "taken from its shape for a convolution without groups, not transposed"


def measure(model_or_state_dict: nn.Module | Mapping[str, object]) -> Report:
    """How redundant the filters of every convolution are; nothing is changed.

    Measured are, over the pairs of filters within a group, ``similarity`` (raw) and ``normalized_similarity`` (0 to 1,
    blind to scale) of `convolutional_similarity`; ``feature_correlation_white`` and ``feature_correlation_natural`` (0
    to 1): the mean absolute correlation of two feature maps, expected over a random input of that spectrum; and
    ``effective_rank_white`` and ``effective_rank_natural`` (0 to 1): of the covariance of all feature maps of the
    layer, over their number. Filters that are zero form no pair, but they do count as feature maps.

    A state dict does not tell what its tensors are. Those of rank 3 to 5 under keys that end in ``weight`` are taken
    for weights of convolutions that are neither grouped nor transposed; those of shape ``[C, 1, ...]`` look depthwise
    and are skipped. Each layer's ``reason`` says so. Pass the model wherever you have it.

    Args:
        model_or_state_dict: Any module, wrapped or not, its frozen layers included; or a state dict.

    Returns:
        A report with one layer per convolution: ``measured``, with the measures in ``before``; ``skipped`` without a
        filter pair or a usable weight; or ``failed`` where it holds infinities or NaN. ``reason`` says why.

    Raises:
        InputError: If there is no convolution, or what was given is neither a module nor a state dict.
    """
    started = time.perf_counter()
    if isinstance(model_or_state_dict, nn.Module):
        sources = [_layer_source(layer) for layer in find_layers(model_or_state_dict, frozen=True)]
    elif isinstance(model_or_state_dict, Mapping):
        sources = list(_state_sources(model_or_state_dict))
        if not sources:
            many = f"{len(model_or_state_dict)} entries without any" if model_or_state_dict else "an empty one"
            raise InputError(f"expected a state dict with convolution weights, of rank 3 to 5, got {many}")
    else:
        raise InputError(f"expected a module or its state dict, got {type(model_or_state_dict).__name__}")
    largest_first = sorted(sources, key=lambda source: -math.prod(source.shape))
    with Team.for_devices(*(source.device for source in sources)) as team:
        reports = {report.name: report for report in team.as_completed(_measure, largest_first)}
    return Report(Settings(), [reports[source.name] for source in sources], time.perf_counter() - started)


@torch.no_grad()
def measure_bank(bank: Tensor, channels: Channels = "matched") -> Measures:
    """Similarity of the filters of a bank ``[G, M, C, *kernel_size]``, over all pairs.

    Returns:
        ``similarity``: the raw Convolutional Similarity; ``normalized_similarity``: the mean over pairs of the
        similarity of two filters over the product of their squared norms, blind to scale.
    """
    norms = filter_norms(bank)  # [G, M]
    unit = (bank / per_filter(nonzero(norms), bank)).to(bank.dtype)
    size = float(nonzero(norms.square().mean().sqrt()))  # in this unit large weights do not overflow
    energies = (norms / size).square().to(bank.dtype)[:, None]  # [G, 1, M]
    fourier = Fourier(bank.shape[3:], bank.dtype, bank.device)
    raw = normalized = 0.0
    for groups, _, weights in fourier.blocks(unit, whole=channels == "all"):
        spectrum = weights.new_empty(fourier.points, *weights.shape[1:])
        fourier.forward(Halves(weights), out=Halves(spectrum))
        power = power_spectrum(spectrum, channels)  # [F, g, c, M]
        normalized += float(torch.sum(power * partner_power(power, "all"))) / 2
        power = power * energies[groups]
        raw += float(torch.sum(power * partner_power(power, "all"))) / 2
    pairs = int(count_pairs(norms > 0, "all").clamp(min=1))
    return {"similarity": raw * size**4, "normalized_similarity": normalized / pairs}


@torch.no_grad()
def measure_features(bank: Tensor) -> Measures:
    """How alike the feature maps of a bank ``[G, M, C, *kernel_size]`` with matched channels are expected to be.

    Returns:
        For each spectrum of the input ``feature_correlation_<spectrum>``: the mean over pairs within a group of the
        absolute correlation; and ``effective_rank_<spectrum>``: of the covariance of all, over the number of filters.
    """
    norms = filter_norms(bank)  # [G, M]
    relative = (norms / nonzero(norms.max())).to(bank.dtype)
    unit = unit_filters(bank)
    found: dict[Spectrum, tuple[float, float]] = {}
    for spectrum in SPECTRA:
        if found and math.prod(bank.shape[3:]) == 1:  # a kernel of one tap answers to every spectrum alike
            found[spectrum] = found[SPECTRA[0]]
            continue
        rows, lengths = directions(covariance_rows(unit, spectrum))  # [G, M, C * T], [G, M]
        found[spectrum] = mean_correlation(rows), effective_rank(rows * (lengths * relative)[..., None])
    correlations = {f"feature_correlation_{spectrum}": found[spectrum][0] for spectrum in SPECTRA}
    return correlations | {f"effective_rank_{spectrum}": found[spectrum][1] for spectrum in SPECTRA}


class _Source(NamedTuple):
    """Where a layer's weight is to be had, and what is known of it without reading it."""

    name: str
    kind: str
    shape: list[int]
    device: torch.device
    obstacle: str | None
    note: str | None
    read: Callable[[], Tensor]


def _layer_source(layer: Layer) -> _Source:
    module = layer.module

    def read() -> Tensor:
        with _evaluating(module):
            return filter_bank(module.weight.detach(), groups=module.groups, transposed=module.transposed)

    with _evaluating(module):
        shape = layer.shape
    return _Source(layer.name, type(module).__name__, shape, layer.device, layer.obstacle, None, read)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Parametrizations such as spectral_norm write to their buffers whenever the weight is read in training mode."""
    parts = list(module.parametrizations.modules()) if parametrize.is_parametrized(module) else []  # type: ignore
    training = [part for part in parts if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _state_sources(state: Mapping[str, object]) -> Iterator[_Source]:
    for key, value in state.items():
        name, computed = _owner(str(key))
        if name is None or not isinstance(value, Tensor) or is_lazy(value) or value.dim() - 2 not in KERNEL_RANKS:
            continue
        obstacle = None
        if computed:
            obstacle = "parametrized: its weight is computed from what the state dict holds; measure the model instead"
        elif not value.is_floating_point():
            obstacle = f"its dtype {value.dtype} is not measured"
        elif value.is_meta:
            obstacle = "on the meta device, without data"
        elif value.shape[0] > 1 and value.shape[1] == 1:
            obstacle = "looks depthwise, by its shape alone; measure the model instead if it is not"
        read = partial(filter_bank, value.detach())
        yield _Source(name, f"Conv{value.dim() - 2}d", list(value.shape), value.device, obstacle, TOLD_BY_SHAPE, read)


def _owner(key: str) -> tuple[str | None, bool]:
    """The layer that a weight stands for under that key, and whether that layer computes its weight from it."""
    dotted = f".{key}"
    for ending in COMPUTED:
        if dotted.endswith(ending):
            return dotted.removesuffix(ending)[1:], True
    return (dotted.removesuffix(".weight")[1:], False) if dotted.endswith(".weight") else (None, False)


@torch.no_grad()
def _measure(source: _Source) -> LayerReport:
    started = time.perf_counter()
    outcome, measures = Outcome.SKIPPED, Measures()
    reason = source.obstacle or ("its weight is empty" if 0 in source.shape else None)
    if reason is None:
        with full_precision(source.device):
            outcome, reason, measures = _measure_weight(source.read())
    seconds = time.perf_counter() - started
    reason = reason or source.note
    return LayerReport(source.name, source.kind, source.shape, outcome, reason, seconds=seconds, before=measures)


def _measure_weight(bank: Tensor) -> tuple[Outcome, str | None, Measures]:
    bank = bank.to(accumulation_dtype(bank.dtype), memory_format=torch.contiguous_format)
    if not all_finite(bank):
        return Outcome.FAILED, "its weight holds infinities or NaN", {}
    obstacle = pair_obstacle(bank, "matched")
    if obstacle:
        return Outcome.SKIPPED, obstacle, {}
    return Outcome.MEASURED, None, measure_bank(bank) | measure_features(bank)
