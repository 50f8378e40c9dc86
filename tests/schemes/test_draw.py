"""Base weights drawn anew: the schemes of torch.nn.init with the right fans, for every kind of convolution."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import convsim_init as ci
from convsim_init.schemes.draw import DRAWS
from convsim_init.settings import ACTIVATIONS, BASES, SCHEMES

LAYERS = {
    "plain": nn.Conv2d(64, 96, 3),
    "grouped": nn.Conv2d(64, 96, 3, groups=4),
    "depthwise": nn.Conv2d(512, 512, 5, groups=512),
    "transposed": nn.ConvTranspose2d(96, 64, 3),
    "grouped transposed": nn.ConvTranspose2d(96, 64, 3, groups=4),
    "one dimension": nn.Conv1d(64, 96, 7),
    "bfloat16": nn.Conv2d(64, 96, 3, dtype=torch.bfloat16),
    "channels last": nn.Conv2d(64, 96, 3).to(memory_format=torch.channels_last),
    "weight_norm": parametrizations.weight_norm(nn.Conv2d(64, 96, 3)),
}


def test_there_is_a_scheme_for_every_name():
    assert set(DRAWS) == set(SCHEMES)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("base", BASES[1:])
def test_the_gain_is_the_activations(base, activation):
    plain, scaled = nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3)
    ci.draw_base_(plain, base)
    ci.draw_base_(scaled, f"{base}:{activation}")
    own = math.sqrt(2) if base.startswith("kaiming") else 1
    torch.testing.assert_close(scaled.weight, plain.weight * (nn.init.calculate_gain(activation) / own))
    if base == "kaiming_normal":
        nn.init.kaiming_normal_(plain.weight, nonlinearity=activation, generator=torch.Generator().manual_seed(0))
        slope = nn.init.calculate_gain(activation) / nn.init.calculate_gain(activation, 0)
        torch.testing.assert_close(scaled.weight, plain.weight * slope)


@pytest.mark.parametrize(
    "base", ["", "Orthogonal", "he", "model:relu", "model:None", ":relu", None, Path("orthogonal")]
)
def test_what_is_no_base_is_refused(base):
    with pytest.raises(ci.InputError, match="expected base to be model or one of kaiming_normal, "):
        ci.draw_base_(nn.Conv2d(3, 8, 3), base)


@pytest.mark.parametrize(
    "base", ["orthogonal:gelu", "orthogonal:None", "xavier_normal:fan_in", "kaiming_normal:relu:fan_in"]
)
def test_what_cannot_follow_a_scheme_is_refused(base):
    with pytest.raises(ci.InputError, match="expected base to end in at most fan_in or fan_out, "):
        ci.draw_base_(nn.Conv2d(3, 8, 3), base)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("base", ["kaiming_normal", "kaiming_uniform", "xavier_normal"])
def test_the_spread_is_that_of_the_filters_own_fans(base, name):
    module = LAYERS[name]
    taps = math.prod(module.kernel_size)
    fan_in = module.in_channels // module.groups * taps
    fan_out = module.out_channels // module.groups * taps
    expected = math.sqrt(2 / (fan_in + fan_out)) if base == "xavier_normal" else math.sqrt(2 / fan_in)
    assert ci.draw_base_(module, base) == [""]
    weight = module.weight.detach().float()
    assert float(weight.std()) == pytest.approx(expected, rel=0.05)
    assert abs(float(weight.mean())) < 0.1 * expected
    bounded = base == "kaiming_uniform"
    assert (float(weight.abs().max()) <= math.sqrt(3) * expected * 1.01) == bounded


STRIDED = {
    "plain": (nn.Conv2d(64, 96, 3), 64 * 9, 96 * 9),
    "strided": (nn.Conv2d(64, 96, 3, stride=2), 64 * 9, 96 * 9 / 4),
    "grouped": (nn.Conv2d(64, 96, 3, stride=(1, 2), groups=4), 16 * 9, 24 * 9 / 2),
    "transposed": (nn.ConvTranspose2d(96, 64, 4, stride=2), 96 * 16 / 4, 64 * 16),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform"])
def test_fans_count_strides(name, scheme):
    module, fan_in, fan_out = STRIDED[name]
    for fan, size in (("", fan_in), (":fan_in", fan_in), (":fan_out", fan_out)):
        ci.draw_base_(module, scheme + fan)
        assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / size), rel=0.03)


def test_a_strided_layer_keeps_the_variance_of_gradients_with_fan_out():
    module = nn.Conv2d(64, 96, 3, stride=2, padding=1, bias=False)
    ci.draw_base_(module, "kaiming_normal:fan_out")
    image = torch.randn(2, 64, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = module(image)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    assert float(image.grad.var()) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("kernel", [3, 4, (1, 5)])
def test_delta_orthogonal_layers_keep_norms(kernel):
    module = nn.Conv2d(8, 16, kernel, groups=2, padding="same", bias=False)
    ci.draw_base_(module, "delta_orthogonal")
    image = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(image).norm(), image.norm())
    assert int(module.weight.flatten(2).ne(0).sum(-1).max()) == 1


def test_orthogonal_filters_of_each_group():
    module = nn.ConvTranspose2d(32, 8, 3, groups=2)
    ci.draw_base_(module, "orthogonal")
    for group in module.weight.detach().unflatten(0, (2, 16)):  # [C, M, kH, kW]
        filters = group.transpose(0, 1).flatten(1)
        torch.testing.assert_close(filters @ filters.T, torch.eye(4), atol=1e-5, rtol=0)


def test_for_a_plain_layer_it_is_what_torch_draws():
    module, expected = nn.Conv2d(3, 8, 3), torch.empty(8, 3, 3, 3)
    ci.draw_base_(module, "kaiming_normal", seed=5)
    nn.init.kaiming_normal_(expected, generator=torch.Generator().manual_seed(5))
    assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("base", SCHEMES)
def test_memory_format_and_dtype_change_nothing_and_the_callers_state_is_left(base):
    state = torch.get_rng_state()
    modules = [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        nn.Conv2d(8, 8, 3, dtype=torch.float64),
        nn.Conv2d(8, 8, 3, dtype=torch.bfloat16),
    ]
    torch.set_rng_state(state)
    for module in modules:
        ci.draw_base_(module, base, seed=1)
        assert torch.equal(module.weight.to(modules[0].weight.dtype).to(module.weight.dtype), module.weight)
        assert torch.equal(modules[0].weight.to(module.weight.dtype), module.weight)
    assert torch.equal(torch.get_rng_state(), state)
    before = modules[0].weight.detach().clone()
    ci.draw_base_(modules[0], base, seed=2)
    assert not torch.equal(modules[0].weight, before)


def test_what_is_left_as_it_is():
    model = nn.ModuleDict(
        {
            "drawn": nn.Conv2d(4, 4, 3),
            "frozen": nn.Conv2d(4, 4, 3).requires_grad_(False),
            "zeros": nn.Conv2d(4, 4, 3),
            "excluded": nn.Conv2d(4, 4, 3),
            "linear": nn.Linear(4, 4),
        }
    )
    nn.init.zeros_(model["zeros"].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert ci.draw_base_(model, "orthogonal", exclude=["excluded"]) == ["drawn"]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"drawn.weight"}
    assert ci.draw_base_(model, "model") == []


def test_a_state_dict_is_drawn_in_place():
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    assert ci.draw_base_(state, "kaiming_normal") == ["0"]
    assert {key for key in state if not torch.equal(state[key], before[key])} == {"0.weight"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_function_that_draws_nothing_is_refused(scheme, monkeypatch):
    monkeypatch.setattr(nn.init, "orthogonal_", lambda weight, **_: weight)
    if scheme != "delta_orthogonal":  # which calls that
        monkeypatch.setitem(DRAWS, scheme, lambda weight, **_: weight)
    model = nn.Conv2d(3, 8, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ci.InputError, match=f"expected {scheme} of torch.nn.init to draw"):
        ci.draw_base_(model, scheme)
    assert torch.equal(model.weight, before)
