"""The benchmark of kernels and feature maps: what it minimizes and what it measures."""

import naive
import pytest
import torch
import torch.nn.functional as F

from benchmarks.claims import pairs, real_layers


def test_each_draw_is_minimized_by_itself():
    kernels = torch.rand(3, 2, 9, dtype=torch.float64)
    together = pairs.descend(kernels, pairs.similarity, 0.01, preserve=False)
    alone = pairs.descend(kernels[1:2], pairs.similarity, 0.01, preserve=False)
    torch.testing.assert_close(together[1:2], alone)
    expected = sum(naive.convolutional_similarity(draw[:, None]) for draw in kernels)
    torch.testing.assert_close(pairs.similarity(kernels), expected)


@pytest.mark.parametrize("objective", pairs.OBJECTIVES)
def test_descent_lowers_its_objective_and_preserves_norms(objective):
    kernels = torch.rand(5, 2, 9, dtype=torch.float64)
    loss, rate = pairs.OBJECTIVES[objective]
    lowered = pairs.descend(kernels, loss, rate, preserve=True)
    assert loss(lowered) < 0.2 * loss(kernels)
    torch.testing.assert_close(lowered.norm(dim=-1), kernels.norm(dim=-1))


def test_cosines_are_those_of_full_convolutions():
    kernels, signals = torch.randn(2, 2, 9, dtype=torch.float64), torch.randn(2, 64, dtype=torch.float64)
    maps = torch.stack([
        F.conv1d(signal[None, None], draw.flip(-1)[:, None], padding=8)[0]
        for draw, signal in zip(kernels, signals, strict=True)
    ])  # fmt: skip
    expected = F.cosine_similarity(maps[:, 0].relu(), maps[:, 1].relu()).abs()
    torch.testing.assert_close(pairs.map_cosines(kernels, signals, F.relu), expected)


def test_a_row_for_everything():
    rows = list(pairs.rows(4))
    assert len(rows) == 2 * 2 * 2 * 4
    assert {len(row) for row in rows} == {len(pairs.COLUMNS)}


def test_noise_has_the_spectrum_it_is_named_for():
    power = torch.fft.fft2(real_layers.noise(40, natural=True)).abs().square().mean((0, 1))
    assert power[0, 0] < 1e-6 * power[0, 1]
    assert (power[0, 1] / power[0, 4]).item() == pytest.approx(16, rel=0.25)
    power = torch.fft.fft2(real_layers.noise(40, natural=False)).abs().square().mean((0, 1))
    assert (power[0, 1] / power[0, 4]).item() == pytest.approx(1, rel=0.25)


def test_the_cosine_of_feature_maps():
    maps = torch.tensor([[[1.0, 2.0, 3.0]], [[-2.0, -4.0, -6.0]], [[3.0, 0.0, -1.0]]]).transpose(0, 1)[..., None]
    assert real_layers.map_cosine(maps) == pytest.approx(1 / 3)
    first, third = maps[0, 0, :, 0], maps[0, 2, :, 0]
    expected = F.cosine_similarity(first - first.mean(), third - third.mean(), dim=0).abs()
    assert real_layers.map_cosine(maps, centred=True) == pytest.approx((1 + 2 * float(expected)) / 3)


def test_the_loss_of_ocnn_makes_filters_orthogonal_at_every_shift():
    weight = torch.randn(6, 8, 3, 3)

    def energy(filters):
        unit = F.normalize(filters.flatten(1)).view_as(filters)
        between = F.conv2d(unit, unit, padding=2).square().sum((2, 3))  # [M, M]
        return between.sum() - between.diagonal().sum()

    assert energy(real_layers.ocnn(weight)) < 0.2 * energy(weight)


def test_photographs_are_crops_of_zero_mean():
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    images = real_layers.photographs(0)
    assert images.shape == (real_layers.CROPS, 3, real_layers.SIDE, real_layers.SIDE)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
