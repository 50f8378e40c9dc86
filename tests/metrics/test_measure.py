"""The measures: against sampled feature maps and direct sums, at known extremes, and of whole models."""

import copy
import itertools
import math

import pytest
import torch
from largest import LargestTensor
from torch import nn
from torch.nn.utils import parametrizations

import convsim_init as ci
from convsim_init.functional.bank import computing_bank, filter_bank
from convsim_init.metrics.expected import (
    SPECTRA,
    VALUES_PER_BLOCK,
    covariance_rows,
    directions,
    effective_rank,
    expected_correlation,
    mean_correlation,
)
from convsim_init.metrics.measure import measure_bank, measure_features

MEASURES = [
    "similarity",
    "normalized_similarity",
    "feature_correlation_white",
    "feature_correlation_natural",
    "effective_rank_white",
    "effective_rank_natural",
]

# Against sampling: a layer, and the points an axis of the fields it is run on

SAMPLED = {
    "3x3": (nn.Conv2d, (3, 6, 3), {}, 64),
    "3x3 one channel": (nn.Conv2d, (1, 5, 3), {}, 64),
    "1x1": (nn.Conv2d, (4, 6, 1), {}, 64),
    "1x1 more filters than channels": (nn.Conv2d, (2, 7, 1), {}, 64),
    "5x5": (nn.Conv2d, (2, 4, 5), {}, 64),
    "7x7 stem": (nn.Conv2d, (3, 8, 7), {}, 64),
    "1x5": (nn.Conv2d, (3, 5, (1, 5)), {}, 64),
    "4x2": (nn.Conv2d, (3, 4, (4, 2)), {}, 64),
    "two filters": (nn.Conv2d, (3, 2, 3), {}, 64),
    "grouped": (nn.Conv2d, (4, 6, 3), {"groups": 2}, 64),
    "grouped 1x1": (nn.Conv2d, (6, 9, 1), {"groups": 3}, 64),
    "transposed": (nn.ConvTranspose2d, (3, 5, 3), {}, 64),
    "transposed grouped": (nn.ConvTranspose2d, (4, 6, (2, 3)), {"groups": 2}, 64),
    "1-D": (nn.Conv1d, (3, 6, 5), {}, 64),
    "1-D long": (nn.Conv1d, (1, 4, 31), {}, 64),
    "1-D grouped": (nn.Conv1d, (4, 6, 3), {"groups": 2}, 64),
    "1-D transposed": (nn.ConvTranspose1d, (3, 5, 4), {}, 64),
    "3-D": (nn.Conv3d, (2, 4, 3), {}, 16),
    "3-D non-cubic": (nn.Conv3d, (2, 5, (1, 3, 2)), {}, 16),
    "3-D transposed grouped": (nn.ConvTranspose3d, (4, 4, 2), {"groups": 2}, 16),
}


def fields(samples, channels, rank, side, spectrum):
    """Periodic Gaussian fields of that spectrum and variance 1, ``[samples, channels, side, ...]``."""
    noise = torch.randn(samples, channels, *[side] * rank, dtype=torch.float64)
    if spectrum == "white":
        return noise
    axes = tuple(range(-rank, 0))
    frequencies = torch.meshgrid(*[torch.fft.fftfreq(side, d=1 / side, dtype=torch.float64)] * rank, indexing="ij")
    amplitude = sum(f**2 for f in frequencies).clamp(min=1).rsqrt()
    amplitude[(0,) * rank] = 0
    shaped = torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) * amplitude, dim=axes).real
    return shaped / amplitude.square().mean().sqrt()


def covariances(layer, inputs):
    """Covariance of the layer's feature maps in each sample, where the kernel lies within it: ``[samples, M, M]``."""
    maps = layer(inputs)
    if layer.transposed:
        inside = tuple(slice(k - 1, -(k - 1) or None) for k in layer.kernel_size)
        maps = maps[(..., *inside)]
    maps = maps.flatten(2)
    return maps @ maps.mT / maps.shape[-1]  # their mean is known to be zero


def correlations_of(covariance, pairs):
    deviations = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    return (covariance / deviations[..., None, :] / deviations[..., None])[..., pairs[0], pairs[1]]


def rank_of(covariance):
    shares = torch.linalg.eigvalsh(covariance).clamp(min=0)
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp() / covariance.shape[-1]


def jackknife(samples, statistic):
    """A statistic of the mean of samples, without its bias of first order, and its standard error."""
    count = len(samples)
    every = statistic(samples.mean(0))
    without = statistic((samples.sum(0) - samples) / (count - 1))
    error = ((count - 1) * (without - without.mean(0)).square().mean(0)).sqrt()
    return count * every - (count - 1) * without.mean(0), error


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", SAMPLED)
@torch.no_grad()
def test_the_closed_form_agrees_with_sampled_feature_maps(name, spectrum):
    kind, sizes, options, side = SAMPLED[name]
    layer = kind(*sizes, bias=False, dtype=torch.float64, **options)
    rank = len(layer.kernel_size)
    samples = {1: 2048, 2: 256, 3: 128}[rank]
    sampled = covariances(layer, fields(samples, layer.in_channels, rank, side, spectrum))

    bank = filter_bank(layer.weight, groups=layer.groups, transposed=layer.transposed)
    rows = covariance_rows(bank, spectrum, grid=side)
    units, _ = directions(rows)
    expected = torch.block_diag(*(units @ units.mT))
    group = torch.arange(layer.out_channels) // bank.shape[1]
    pairs = torch.triu_indices(layer.out_channels, layer.out_channels, 1)

    every, errors = jackknife(sampled, lambda covariance: correlations_of(covariance, pairs))
    assert ((every - expected[pairs[0], pairs[1]]) / errors).abs().max() < 4.5  # of some 500 pairs

    pairs = pairs[:, group[pairs[0]] == group[pairs[1]]]
    # |x| of a noisy x is too large on average; with the sign it is expected to have, it is not.
    signs = expected[pairs[0], pairs[1]].sign()
    mean, error = jackknife(sampled, lambda covariance: (correlations_of(covariance, pairs) * signs).mean(-1))
    assert abs(mean - mean_correlation(units)) < 3 * error
    assert error < 0.02

    mean, error = jackknife(sampled, rank_of)
    assert abs(mean - effective_rank(rows)) < 3 * error
    assert error < 0.02


# Against the definition


def autocorrelation(shift, spectrum, side=64):
    """Of a field of variance 1, as a sum of cosines."""
    if spectrum == "white" or not any(shift):
        return float(not any(shift))
    total = norm = 0.0
    for frequency in itertools.product(range(-side // 2, side // 2), repeat=len(shift)):
        if any(frequency):
            power = 1 / sum(f * f for f in frequency)
            total += power * math.cos(2 * math.pi * sum(f * s for f, s in zip(frequency, shift, strict=True)) / side)
            norm += power
    return total / norm


def naive_covariance(bank, spectrum):
    """Of all feature maps of a bank ``[G, M, C, *kernel_size]``, one pair of kernels and of taps at a time."""
    groups, filters, channels, *kernel_size = bank.shape
    taps = list(itertools.product(*(range(k) for k in kernel_size)))
    shifts = {tuple(t - u for t, u in zip(a, b, strict=True)) for a in taps for b in taps}
    r = {shift: autocorrelation(shift, spectrum) for shift in shifts}
    covariance = torch.zeros(groups * filters, groups * filters, dtype=bank.dtype)
    for g, i, j, c in itertools.product(range(groups), range(filters), range(filters), range(channels)):
        for a, b in itertools.product(taps, repeat=2):
            shift = tuple(t - u for t, u in zip(a, b, strict=True))
            covariance[g * filters + i, g * filters + j] += bank[(g, i, c, *a)] * bank[(g, j, c, *b)] * r[shift]
    return covariance


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("shape", "groups", "transposed"),
    [
        ((4, 2, 3, 3), 1, False),
        ((6, 1, 1, 4), 2, False),
        ((4, 3, 2, 1), 2, True),
        ((3, 2, 1, 1), 1, False),
        ((2, 9), 1, False),
        ((3, 2, 5), 1, True),
        ((1, 2, 3, 3), 1, False),
    ],
    ids=str,
)
def test_measures_are_their_definition(shape, groups, transposed, spectrum):
    weight = torch.randn(shape, dtype=torch.float64)
    bank = filter_bank(weight, groups=groups, transposed=transposed)
    covariance = naive_covariance(bank, spectrum)
    deviations = covariance.diagonal().sqrt()
    expected = covariance / deviations / deviations[:, None]
    correlation = expected_correlation(bank, spectrum)
    torch.testing.assert_close(correlation, expected)
    group = torch.arange(len(expected)) // bank.shape[1]
    within = [
        expected[i, j].abs().item() for i, j in itertools.combinations(range(len(expected)), 2) if group[i] == group[j]
    ]
    measures = measure_features(bank)
    mean = sum(within) / max(1, len(within))
    assert measures[f"feature_correlation_{spectrum}"] == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert measures[f"effective_rank_{spectrum}"] == pytest.approx(rank_of(covariance).item(), rel=1e-9)
    single = measure_features(bank.float())
    assert single == pytest.approx(measures, rel=1e-4, abs=1e-6)


# Properties


def of(weight, groups=1):
    bank = filter_bank(weight, groups=groups)
    return measure_bank(bank) | measure_features(bank)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scale", [1e-30, 0.1, 1e15])
def test_scale_changes_only_the_raw_similarity(scale, groups):
    weight = torch.randn(8, 4, 3, 3)
    expected, found = of(weight, groups), of(weight * scale, groups)
    del expected["similarity"], found["similarity"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_scale_and_sign_of_a_filter_change_no_correlation():
    weight = torch.randn(8, 4, 3, 3)
    factors = torch.tensor([1, -1, 3, -0.1, 1e-20, 1e3, -1e-3, 1])[:, None, None, None]
    expected, found = of(weight), of(weight * factors)
    for name in ("normalized_similarity", "feature_correlation_white", "feature_correlation_natural"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    signs = of(weight * factors.sign())
    assert signs == pytest.approx(expected, rel=1e-5)
    assert found["effective_rank_white"] < 0.5 * expected["effective_rank_white"]  # one filter outweighs the rest


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[torch.tensor([3, 0, 5, 1, 7, 2, 4, 6])],
        lambda weight: weight[:, torch.tensor([2, 0, 3, 1])],
        lambda weight: weight.flip(2, 3),
        lambda weight: weight.transpose(2, 3),
        lambda weight: weight.to(memory_format=torch.channels_last),
    ],
    ids=["order of filters", "order of channels", "mirrored", "turned", "channels last"],
)
def test_what_leaves_the_measures_as_they_are(change):
    weight = torch.randn(8, 4, 3, 3)
    assert of(change(weight)) == pytest.approx(of(weight), rel=1e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
class TestExtremes:
    def test_identical_filters(self, spectrum):
        measures = of(torch.randn(1, 3, 3, 3).expand(8, 3, 3, 3))
        assert measures[f"feature_correlation_{spectrum}"] == pytest.approx(1, rel=1e-6)
        assert measures[f"effective_rank_{spectrum}"] == pytest.approx(1 / 8, rel=1e-4)

    def test_disjoint_channels(self, spectrum):
        weight = torch.zeros(6, 6, 3, 3)
        weight[range(6), range(6)] = torch.randn(3, 3)
        measures = of(weight)
        assert measures["similarity"] == measures[f"feature_correlation_{spectrum}"] == 0
        assert measures[f"effective_rank_{spectrum}"] == pytest.approx(1, rel=1e-6)

    def test_zero_filters_form_no_pair_and_are_no_dimension(self, spectrum):
        weight = torch.randn(5, 3, 3, 3)
        weight[3:] = 0
        expected, found = of(weight[:3]), of(weight)
        assert found[f"feature_correlation_{spectrum}"] == pytest.approx(expected[f"feature_correlation_{spectrum}"])
        rank = f"effective_rank_{spectrum}"
        assert 5 * found[rank] == pytest.approx(3 * expected[rank], rel=1e-5)
        assert expected_correlation(filter_bank(weight), spectrum)[3:].eq(0).all()

    def test_all_zero(self, spectrum):
        measures = of(torch.zeros(5, 3, 3, 3))
        assert set(measures.values()) == {0.0}


def test_orthogonal_filters_are_uncorrelated_on_white_input_and_only_there():
    weight = torch.zeros(8, 2, 3, 3)
    nn.init.orthogonal_(weight)
    measures = of(weight)
    assert measures["feature_correlation_white"] < 1e-6
    assert measures["effective_rank_white"] == pytest.approx(1, rel=1e-5)
    assert measures["feature_correlation_natural"] > 0.05
    assert measures["effective_rank_natural"] < 0.9


def test_pairs_of_different_groups_are_not_counted():
    weight = torch.randn(4, 2, 3, 3)
    twice = torch.cat([weight, weight])
    single, grouped = of(weight), of(twice, groups=2)
    assert grouped["similarity"] == pytest.approx(2 * single.pop("similarity"), rel=1e-5)
    assert {name: grouped[name] for name in single} == pytest.approx(single, rel=1e-5)
    correlation = expected_correlation(filter_bank(twice, groups=2))
    assert correlation[:4, 4:].eq(0).all()
    torch.testing.assert_close(correlation[4:, 4:], expected_correlation(filter_bank(weight)))


def test_a_kernel_as_large_as_the_grid_has_no_answer_where_it_is_constant():
    bank = torch.randn(1, 3, 1, 64)
    bank[0, 2] = 1
    correlation = expected_correlation(bank)
    assert correlation[2].eq(0).all()
    assert correlation[0, 1] != 0
    assert expected_correlation(torch.randn(1, 3, 1, 100)).isfinite().all()


@pytest.mark.parametrize(("shape", "groups"), [((8192, 4, 3, 3), 1), ((8192, 2, 1, 1), 2), ((8192, 1, 3, 3), 1024)])
def test_memory_does_not_grow_with_the_square_of_the_filters(shape, groups):
    weight = torch.randn(shape)
    with LargestTensor() as largest:
        of(weight, groups)
    assert largest.values <= max(VALUES_PER_BLOCK, 3 * weight.numel())


@pytest.mark.parametrize("shape", [(2500, 2, 1, 1), (1300, 1, 2, 2)])
def test_blocks_leave_out_no_pair(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    correlation = expected_correlation(filter_bank(weight)).abs()
    mean = (correlation.sum() - correlation.trace()) / (shape[0] * (shape[0] - 1))
    assert of(weight)["feature_correlation_natural"] == pytest.approx(mean.item(), rel=1e-9)


# Of models and state dicts


def zoo():
    return nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 6, 3),
            "frozen": nn.Conv2d(4, 6, 3).requires_grad_(False),
            "pointwise": nn.Conv2d(4, 6, 1, bias=False),
            "grouped": nn.Conv2d(8, 6, 3, groups=2),
            "transposed": nn.ConvTranspose1d(4, 6, 3, groups=2),
            "sixteen": nn.Conv3d(2, 4, 2, dtype=torch.bfloat16),
            "sixty_four": nn.Conv2d(4, 6, 3, dtype=torch.float64),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "single": nn.Conv2d(4, 1, 3),
            "norm": nn.BatchNorm2d(4),
            "linear": nn.Linear(4, 4),
        }
    )


def test_a_model_is_measured_layer_by_layer_and_left_as_it_was():
    model = zoo()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = ci.measure(model)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert [layer.name for layer in report.layers] == [name for name in model if name not in ("norm", "linear")]
    assert report.settings == ci.Settings()
    for layer in report.layers:
        module = model[layer.name]
        assert (layer.kind, layer.shape) == (type(module).__name__, list(module.weight.shape))
        assert (layer.after, layer.steps, layer.losses) == ({}, 0, [])
        if layer.name in ("depthwise", "single"):
            assert layer.outcome is ci.Outcome.SKIPPED
            assert "one filter" in layer.reason
            assert layer.before == {}
            continue
        assert (layer.outcome, layer.reason) == (ci.Outcome.MEASURED, None)
        assert list(layer.before) == MEASURES
        weight = module.weight.detach()
        options = {"groups": module.groups, "transposed": module.transposed}
        raw = ci.convolutional_similarity(weight, **options).item()
        assert layer.before["similarity"] == pytest.approx(raw, rel=1e-4)
        correlation = expected_correlation(computing_bank(weight, **options))
        size = len(correlation) // module.groups
        pairs = [
            correlation[g + i, g + j].abs().item()
            for g in range(0, len(correlation), size)
            for i, j in itertools.combinations(range(size), 2)
        ]
        mean = sum(pairs) / len(pairs)
        assert layer.before["feature_correlation_natural"] == pytest.approx(mean, rel=1e-4)


def test_what_it_measures_before_and_after_is_what_initialize_reports():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    before = ci.measure(model).layers[0].before
    (changed,) = ci.initialize_(model, settings=ci.Settings(steps=3, channels="matched")).layers
    after = ci.measure(model).layers[0].before
    for measured, reported in ((before, changed.before), (after, changed.after)):
        for name in ("similarity", "normalized_similarity"):
            assert measured[name] == pytest.approx(reported[name], rel=1e-6)
    assert after["feature_correlation_natural"] < before["feature_correlation_natural"]


def test_a_state_dict_is_measured_by_the_shapes_of_its_tensors():
    model = nn.ModuleDict({name: module for name, module in zoo().items() if name not in ("grouped", "transposed")})
    by_model = {layer.name: layer for layer in ci.measure(model).layers}
    report = ci.measure(model.state_dict())
    assert [layer.name for layer in report.layers] == list(by_model)
    for layer in report.layers:
        assert (layer.kind, layer.shape) == (by_model[layer.name].kind, by_model[layer.name].shape)
        if layer.name == "depthwise":
            assert (layer.outcome, layer.before) == (ci.Outcome.SKIPPED, {})
            assert "looks depthwise" in layer.reason
        else:
            assert layer.outcome is by_model[layer.name].outcome
            assert layer.before == by_model[layer.name].before
            assert "shape" in layer.reason or layer.reason == "only one filter"


def test_keys_and_tensors_of_a_state_dict():
    state = {
        "weight": torch.randn(4, 3, 3, 3),
        "int.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8),
        "meta.weight": torch.ones(4, 3, 3, 3, device="meta"),
        "normed.weight_v": torch.randn(4, 3, 3, 3),
        "new.parametrizations.weight.original1": torch.randn(4, 3, 3, 3),
        "pruned.weight_orig": torch.randn(4, 3, 3, 3),
        "empty.weight": torch.ones(0, 3, 3, 3),
        "bilinear.bias": torch.ones(4, 3, 3),
        "four.weight": torch.ones(4, 3, 2, 2, 2, 2),
        "gamma": torch.ones(4, 3, 3, 3),
        "note": "text",
        "down_weight": torch.ones(4, 3, 3, 3),
    }
    report = ci.measure(state)
    reasons = {layer.name: layer.reason for layer in report.layers if layer.outcome is ci.Outcome.SKIPPED}
    assert [layer.name for layer in report.layers] == ["", "int", "meta", "normed", "new", "pruned", "empty"]
    assert report.layers[0].outcome is ci.Outcome.MEASURED
    assert "torch.int8" in reasons["int"]
    assert "meta" in reasons["meta"]
    assert "parametrized" in reasons["normed"]
    assert "parametrized" in reasons["new"]
    assert "parametrized" in reasons["pruned"]
    assert "empty" in reasons["empty"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (nn.Linear(3, 3), "got Linear, which has none"),
        ({}, "got an empty one"),
        ({"fc.weight": torch.ones(3, 3)}, "got 1 entries without any"),
        ("resnet18", "expected a module or its state dict, got str"),
    ],
    ids=["no convolutions", "empty", "no convolution weights", "text"],
)
def test_what_cannot_be_measured(source, message):
    with pytest.raises(ci.InputError, match=message):
        ci.measure(source)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_fail_and_the_others_are_measured(value):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = value
    first, second = ci.measure(model).layers
    assert (first.outcome, first.before) == (ci.Outcome.FAILED, {})
    assert "infinities or NaN" in first.reason
    assert second.outcome is ci.Outcome.MEASURED


def test_lazy_meta_and_shared_weights():
    model = nn.Sequential(
        nn.LazyConv2d(4, 3), nn.Conv2d(3, 4, 3, device="meta"), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    )
    model[3].weight = model[2].weight
    layers = ci.measure(model).layers
    assert [layer.outcome.value for layer in layers] == ["skipped", "skipped", "measured", "skipped"]
    assert "forward pass" in layers[0].reason
    assert "meta" in layers[1].reason
    assert "shares its weight with 2" in layers[3].reason


@pytest.mark.parametrize("training", [True, False])
def test_reading_a_parametrized_weight_changes_no_buffer(training):
    module = parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)).train(training)
    before = copy.deepcopy(module.state_dict())
    (layer,) = ci.measure(module).layers
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(part.training is training for part in module.modules())
    used = expected_correlation(filter_bank(module.eval().weight.detach())).abs()
    mean = (used.sum() - 8) / (8 * 7)
    assert layer.before["feature_correlation_natural"] == pytest.approx(mean.item(), rel=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_measures_the_same_under_any_mode_and_number_of_threads(mode):
    model = zoo()
    expected = [layer.before for layer in ci.measure(model).layers]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with mode():
            assert [layer.before for layer in ci.measure(model).layers] == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.cuda
def test_a_model_on_the_gpu_has_the_same_measures():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 1))
    expected = [layer.before for layer in ci.measure(model).layers]
    assert [layer.before for layer in ci.measure(model.cuda()).layers] == expected
