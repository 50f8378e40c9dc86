"""Weights of any scale and kind: finite results, or a layer left untouched with the reason."""

import pytest
import torch
from random_layers import KINDS, draw, violations
from torch import nn

from convsim_init import Outcome, Settings, convsim_, initialize_, measure, save_checkpoint
from convsim_init.errors import InputError
from convsim_init.functional.bank import filter_norms
from convsim_init.optim.descent import descend

SEEDS = range(10**6, 10**6 + 180)


@pytest.mark.parametrize("chunk", range(6))
def test_what_must_hold_of_random_layers(chunk):
    broken = [f"seed {seed}: {violation}" for seed in SEEDS[chunk::6] for violation in violations(seed)]
    assert broken == []


def test_a_start_that_cannot_be_lowered_is_kept():
    assert list(violations(4887)) == []  # its gradient is nothing but rounding, and was followed far off


def test_the_random_layers_are_of_every_kind():
    drawn = [draw(seed) for seed in SEEDS]
    assert {kind for _, _, kind in drawn} == set(KINDS)
    assert len({model["treated"].weight.dtype for model, _, _ in drawn}) == 4
    assert len({type(model["treated"]) for model, _, _ in drawn}) == 6


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e300], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_result_does_not_depend_on_the_scale(scale, dtype):
    if dtype is torch.float32 and not 1e-31 < scale < 1e31:
        pytest.skip("beyond the range of float32")
    weight = torch.randn(12, 4, 3, 3, dtype=dtype)
    scaled = weight * scale
    settings = Settings(steps=3)
    moved = convsim_(scaled, settings=settings) / scale
    torch.testing.assert_close(moved, convsim_(weight, settings=settings), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e-30, 1e200, 1e300], ids=str)
def test_norms_neither_vanish_nor_overflow(scale):
    bank = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    bank[0, 0, 0] = torch.tensor([3.0, 4.0], dtype=torch.float64) * scale
    torch.testing.assert_close(filter_norms(bank)[0], torch.tensor([5 * scale, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_one_layer_that_is_not_finite_is_left_alone_and_nothing_is_written(odd, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[0].weight[1, 2, 0, 0] = odd
    before = model[0].weight.detach().clone()
    report = initialize_(model, settings=Settings(steps=3))
    assert [layer.outcome for layer in report.layers] == [Outcome.FAILED, Outcome.INITIALIZED]
    assert "infinities or NaN" in report.layers[0].reason
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(InputError, match="infinities or NaN"):
        save_checkpoint(model, tmp_path / "a.safetensors", report=report)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e80, 1e120, 1e200], ids=str)
def test_measures_of_extreme_weights_are_numbers(scale):
    (layer,) = measure({"a.weight": torch.randn(4, 3, 3, 3, dtype=torch.float64) * scale}).layers
    assert layer.before["normalized_similarity"] == pytest.approx(0.25, abs=0.2)
    assert layer.before["similarity"] >= 0


def test_large_filters_that_are_not_alike_have_no_similarity():
    weight = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    weight[0, 0], weight[1, 1] = 1e160, 1e160
    assert measure({"a.weight": weight}).layers[0].before["similarity"] == 0


@pytest.mark.parametrize("scale", [1e-25, 1e20], ids=str)
def test_losses_of_free_norms_keep_the_scale_of_extreme_weights(scale):
    bank = torch.randn(1, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    settings = Settings(norm="free", steps=2)
    for loss, plain in zip(descend(bank * scale, settings).losses, descend(bank, settings).losses, strict=True):
        assert loss == pytest.approx(plain * scale**4, rel=1e-3)
