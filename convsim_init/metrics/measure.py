"""How redundant the filters of a layer, or of every layer of a model, are, in figures that scale cannot fool."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from convsim_init.functional.bank import (
    all_finite,
    computing_device,
    count_pairs,
    filter_norms,
    full_precision,
    nonzero,
    unit_filters,
)
from convsim_init.functional.fourier import CACHED, cuts, real_fourier_basis
from convsim_init.functional.similarity import partner_power, power_spectrum, weights_at_once
from convsim_init.layers.find import find_layers, pair_obstacle
from convsim_init.layers.layer import Layer, Layers, largest_first
from convsim_init.layers.remarks import model_remarks
from convsim_init.metrics.expected import (
    SPECTRA,
    Spectrum,
    covariance_rows,
    directions,
    effective_rank,
    mean_correlation,
)
from convsim_init.parallel.threads import Team
from convsim_init.report.report import LayerReport, Measures, Outcome, Report
from convsim_init.settings import DEFAULT_DEVICE, Channels, Settings


def measure(model: nn.Module | Mapping[str, object]) -> Report:
    """How redundant the filters of every convolution are, computed on the CPU; nothing is changed.

    Measured are, over the pairs of filters within a group, ``similarity`` (raw) and ``normalized_similarity`` (blind to
    scale) of `convolutional_similarity`; ``feature_correlation_white`` and ``feature_correlation_natural`` (0 to 1):
    the mean absolute correlation of two feature maps, expected over a random input of that spectrum; and
    ``effective_rank_white`` and ``effective_rank_natural`` (0 to 1): of the covariance of all feature maps of the
    layer, over their number. Filters that are zero form no pair, but they do count as feature maps.

    A state dict does not tell what its tensors are. Those of rank 3 to 5 under the usual keys, such as ``conv.weight``,
    are taken for weights of convolutions without groups, transposed where the length of a bias says so; those of shape
    ``[C, 1, ...]`` look depthwise and are skipped, as are doubtful ones. Each layer's ``reason`` says what it was taken
    for. Pass the model wherever you have it.

    Args:
        model: Any module, wrapped or not, its frozen layers included; or a state dict.

    Returns:
        A report with one layer per convolution: ``measured``, with the measures in ``before``; ``skipped`` without a
        filter pair or a usable weight; or ``failed`` where it holds infinities or NaN. ``reason`` says why.

    Raises:
        InputError: If there is no convolution, or what was given is neither a module nor a state dict.

    Examples:
        >>> report = ci.measure(nn.Conv2d(3, 16, 3))
        >>> 0 < report.layers[0].before["feature_correlation_natural"] < 1
        True
    """
    return measure_and_find(model)[0]


def measure_and_find(source: nn.Module | Mapping[str, object]) -> tuple[Report, Layers]:
    """What `measure` returns, and the layers that it found."""
    started = time.perf_counter()
    layers = find_layers(source, read_only=True)
    device = torch.device(DEFAULT_DEVICE)
    with Team.for_device(device, holding=[layer.device for layer in layers]) as team:
        work = team.as_completed(partial(_measure, device=device), largest_first(layers))
        reports = {report.name: report for report in work}
    measured, remarks = [reports[layer.name] for layer in layers], model_remarks(source, layers)
    return Report(Settings(), measured, time.perf_counter() - started, remarks=remarks), layers


@torch.no_grad()
def measure_bank(bank: Tensor, channels: Channels = "matched") -> Measures:
    """Similarity of the filters of a bank ``[G, M, C, *kernel_size]``, over all pairs.

    Returns:
        ``similarity``: the raw Convolutional Similarity; ``normalized_similarity``: the mean over pairs of the
        similarity of two filters over the product of their squared norms, blind to scale.
    """
    norms = filter_norms(bank)  # [G, M]
    flat, lengths = bank.flatten(3), nonzero(norms)[..., None, None]  # [G, M, C, T], [G, M, 1, 1]
    size = float(nonzero(norms.max()))  # in this unit large weights do not overflow
    # A filter's power is |w|^2 times that of the unit filter: one spectrum serves both losses.
    energies = (norms / size).square().to(bank.dtype)[:, None]  # [G, 1, M]
    basis = real_fourier_basis(bank.shape[3:], bank.dtype, bank.device)  # [N, T]
    raw = normalized = 0.0
    for part in cuts(bank.shape, weights_at_once(bank, channels, CACHED)):
        kernels = (flat[part] / lengths[part.groups]).to(bank.dtype)  # [g, M, c, T]
        spectrum = torch.mm(basis, kernels.reshape(-1, kernels.shape[-1]).T).view(-1, *kernels.shape[:-1])
        power = power_spectrum(spectrum.transpose(2, 3), channels)  # [F, g, c, M]
        partners = partner_power(power, "all")
        normalized += float(torch.mul(power, partners, out=partners).sum()) / 2
        power *= energies[part.groups]
        partner_power(power, "all", out=partners)
        raw += float(torch.mul(power, partners, out=partners).sum()) / 2
    pairs = int(count_pairs(norms > 0, "all").clamp(min=1))
    raw = raw and raw * (size * size) * (size * size)  # no product of zero and infinity
    return {"similarity": raw, "normalized_similarity": normalized / pairs}


@torch.no_grad()
def measure_features(bank: Tensor) -> Measures:
    """How alike the feature maps of a bank ``[G, M, C, *kernel_size]`` with matched channels are expected to be.

    Returns:
        For each spectrum of the input ``feature_correlation_<spectrum>``: the mean over pairs within a group of the
        absolute correlation; and ``effective_rank_<spectrum>``: of the covariance of all, over the number of filters.
    """
    norms = filter_norms(bank)  # [G, M]
    relative = (norms / nonzero(norms.max())).to(bank.dtype)
    unit = unit_filters(bank, norms)
    found: dict[Spectrum, tuple[float, float]] = {}
    for spectrum in SPECTRA:
        if found and math.prod(bank.shape[3:]) == 1:  # a kernel of one tap answers to every spectrum alike
            found[spectrum] = found[SPECTRA[0]]
            continue
        rows, lengths = directions(covariance_rows(unit, spectrum))  # [G, M, C * T], [G, M]
        found[spectrum] = mean_correlation(rows), effective_rank(rows * (lengths * relative)[..., None])
    correlations = {f"feature_correlation_{spectrum}": found[spectrum][0] for spectrum in SPECTRA}
    return correlations | {f"effective_rank_{spectrum}": found[spectrum][1] for spectrum in SPECTRA}


@torch.no_grad()
def _measure(layer: Layer, *, device: torch.device) -> LayerReport:
    started = time.perf_counter()
    outcome, reason, measures = Outcome.SKIPPED, layer.obstacle and layer.obstacle.text, Measures()
    if reason is None:
        with full_precision(device), full_precision(computing_device(layer.device)):
            bank = layer.bank(device=device)
            if not all_finite(bank):
                outcome, reason = Outcome.FAILED, "its weight holds infinities or NaN"
            elif (reason := pair_obstacle(bank)) is None:
                outcome, measures = Outcome.MEASURED, measure_bank(bank) | measure_features(bank)
    seconds = time.perf_counter() - started
    reason = layer.explained(reason)
    return LayerReport(layer.name, layer.kind, layer.shape, outcome, reason, seconds=seconds, before=measures)
