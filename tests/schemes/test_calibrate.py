"""Layers scaled to unit variance: which are, to what, and what is left as it was."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import convsim_init as ci
from convsim_init.schemes.calibrate import IMAGES, natural_noise

SHAPE = (3, 12, 10)


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(inplace=True), nn.ConvTranspose2d(8, 4, 2),
        nn.Dropout(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


class Branch(nn.Module):
    """Two convolutions beside a shortcut, times a factor."""

    def __init__(self, factor: float, last: float = 1.0) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.factor = nn.Parameter(torch.tensor(factor))
        nn.init.zeros_(self.two.bias)
        with torch.no_grad():
            self.two.weight *= last

    def forward(self, x):
        return x + self.factor * self.two(F.relu(self.one(x)))


def outputs_of(model, images):
    """The output of each convolution without its bias, by its name."""
    found = {}

    def note(name, module):
        def hook(module, inputs, output):
            found[name] = output - (0 if module.bias is None else module.bias[:, None, None])

        return module.register_forward_hook(hook)

    handles = [note(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("own", [False, True], ids=["noise", "a batch"])
def test_outputs_have_unit_variance_and_nothing_else_is_changed(own):
    images = 3 * torch.rand(5, *SHAPE) if own else natural_noise(SHAPE)
    model = plain()
    model(images)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    factors = ci.calibrate_(model, images) if own else ci.calibrate_(model, input_shape=SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in model.state_dict().items():
        name = key.removesuffix(".weight")
        assert torch.equal(value, before[key] * factors[name] if name in factors else before[key])
    outputs = outputs_of(model, images)
    assert list(factors) == list(outputs) == ["0", "2", "4"]
    for output in outputs.values():
        assert float(output.std()) == pytest.approx(1, rel=2e-3)


def test_residual_branches_stay_as_they_were_designed():
    zero_norm = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(zero_norm[1].weight)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Branch(0.0), Branch(1.0, last=0.0), Branch(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    nn.init.zeros_(model[6].weight)  # the classifier is zero, as in Fixup
    assert list(ci.calibrate_(model, input_shape=SHAPE)) == ["0", "3.one", "3.two"]
    with pytest.warns(UserWarning, match="^not scaled: 0: the model's output does not depend on its scale$"):
        assert ci.calibrate_(zero_norm, input_shape=(4, 8, 8)) == {}


def test_a_layer_that_is_called_twice_has_one_factor():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    factors = ci.calibrate_(nn.Sequential(shared, shared), input_shape=np.array([4, 8, 8]))
    assert list(factors) == ["0"]


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_weight_that_layers_share_has_one_factor(kind):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), kind(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    assert list(ci.calibrate_(model, input_shape=(4, 8, 8))) == ["0", "2"]
    outputs = outputs_of(model, natural_noise((4, 8, 8)))
    assert [float(outputs[name].std()) for name in "02"] == pytest.approx([1, 1], rel=2e-3)


def test_a_layer_behind_detach_is_scaled_for_what_reaches_it():
    class Detached(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).detach())

    model = Detached(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    assert list(ci.calibrate_(model, input_shape=SHAPE)) == ["1"]
    assert float(outputs_of(model, natural_noise(SHAPE))["1"].std()) == pytest.approx(1, rel=2e-3)


def test_a_lazy_model_is_refused_and_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(4, 3))
    with pytest.raises(ci.InputError, match=r"whose 1\.weight is lazy: run a forward pass first"):
        ci.calibrate_(model, input_shape=SHAPE)
    model(torch.zeros(1, *SHAPE))
    assert list(ci.calibrate_(model, input_shape=SHAPE)) == ["0", "1"]


def test_convolutions_of_classes_of_ones_own_are_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight)

    with pytest.warns(UserWarning, match="^not scaled: 0: no convolution of torch.nn$"):
        assert list(ci.calibrate_(nn.Sequential(Own(), nn.Conv2d(8, 8, 3)), input_shape=SHAPE)) == ["1"]
    with pytest.raises(ci.InputError, match="got calls in classes of your own or in a graph"):
        ci.calibrate_(Own(), input_shape=SHAPE)


@pytest.mark.parametrize(
    ("layer", "scaled"),
    [
        (parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), True),
        (parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)), False),
        (nn.Conv2d(3, 6, 3).requires_grad_(False), False),
        (nn.Conv2d(3, 6, 3, dtype=torch.bfloat16), True),
    ],
    ids=["weight_norm", "spectral_norm", "frozen", "bfloat16"],
)
def test_what_can_be_scaled(layer, scaled):
    model = nn.Sequential(layer).eval()  # while it is trained, spectral_norm changes its weight whenever that is read
    before = layer.weight.detach().clone()
    tells = layer.weight.requires_grad and not scaled  # a frozen layer was not to be scaled
    with pytest.warns(UserWarning, match="^not scaled: 0: what computes") if tells else nullcontext():
        factors = ci.calibrate_(model, input_shape=SHAPE)
    assert list(factors) == (["0"] if scaled else [])
    torch.testing.assert_close(layer.weight, before * factors.get("0", 1))


def test_layers_whose_weights_another_module_takes_are_left():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(2))

        def forward(self, x):
            for conv in self.convs:
                x = nn.functional.conv2d(x, conv.weight / 2)
            return x

    with pytest.warns(UserWarning, match="^not scaled: convs.0, convs.1: the model does not call it, though"):
        assert ci.calibrate_(Around(), torch.randn(2, 3, 8, 8)) == {}


def test_layers_are_chosen_by_their_names():
    model = plain()
    model(torch.zeros(1, *SHAPE))
    assert list(ci.calibrate_(model, input_shape=SHAPE, exclude=["2"])) == ["0", "4"]


def test_the_noise_has_the_spectrum_of_photographs():
    noise = natural_noise((2, 16, 16), seed=1)
    assert noise.shape == (IMAGES, 2, 16, 16)
    assert float(noise.std()) == pytest.approx(1)
    assert float(noise.mean((2, 3)).abs().max()) < 1e-5
    power = torch.fft.fftn(noise, dim=(2, 3)).abs().square().mean((0, 1))
    assert float(power[0, 1] / power[0, 4]) == pytest.approx(16, rel=0.7)
    assert not torch.equal(noise, natural_noise((2, 16, 16), seed=2))
    assert natural_noise((1, 50)).shape == (IMAGES, 1, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either images or an input_shape"),
        ({"images": torch.ones(1, 3, 8, 8), "input_shape": (3, 8, 8)}, "either images or an input_shape"),
        ({"images": [torch.ones(1, 3, 8, 8), 1]}, "images as one tensor, got list"),
        ({"images": (3, 8, 8)}, "images as one tensor, got tuple: .* a shape as input_shape"),
        ({"input_shape": (3,)}, "an input shape of channels and sizes"),
        ({"input_shape": (3, 1, 1)}, "an input shape of channels and sizes"),
        ({"input_shape": "3x8x8"}, "an input shape of channels and sizes such as .*, got '3x8x8'"),
        ({"input_shape": (3, 8.5, 8)}, "an input shape of channels and sizes"),
        ({"input_shape": 3}, "an input shape of channels and sizes"),
        ({"input_shape": (3, 2**40, 2**40)}, "an input shape of which 16 fit in memory, got .3, 1"),
        ({"input_shape": (3, 2**70, 8)}, "an input shape of which 16 fit in memory, got .3, 1"),
        ({"input_shape": (4, 8, 8)}, r"a model that takes \[16, 4, 8, 8\], got RuntimeError"),
        ({"input_shape": (3, 8, 8), "include": ["x"]}, "include: no convolution matches 'x'"),
    ],
)
def test_bad_input(arguments, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    before = model[0].weight.detach().clone()
    with pytest.raises(ci.InputError, match=message):
        ci.calibrate_(model, **arguments)
    assert torch.equal(model[0].weight, before)


def test_a_model_of_several_inputs_is_calibrated_within_one_that_adds_them():
    class Timed(nn.Sequential):
        def forward(self, x, time):
            return {"sample": super().forward(x * time)}

    class Around(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x, 2)

    net = Timed(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for arguments in ({"input_shape": SHAPE}, {"images": (torch.ones(1, *SHAPE), 2)}):
        with pytest.raises(ci.InputError, match=r"several inputs within a module that adds the others$"):
            ci.calibrate_(net, **arguments)
    assert list(ci.calibrate_(Around(net), input_shape=SHAPE)) == ["net.0", "net.2"]


def test_an_output_that_is_not_differentiable_is_refused():
    class Classes(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(1)

    with pytest.raises(ci.InputError, match="an output that is differentiable"):
        ci.calibrate_(Classes(nn.Conv2d(3, 4, 3)), input_shape=SHAPE)


@pytest.mark.parametrize("images", [torch.full((2, 3, 12, 10), torch.nan), torch.zeros(0, 3, 12, 10)])
def test_images_without_numbers_are_refused(images):
    with pytest.raises(ci.InputError, match="expected images of finite numbers, got infinities or NaN, or none at all"):
        ci.calibrate_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), images)


def test_factors_depend_on_neither_the_default_dtype_nor_autocast():
    def factors() -> dict[str, float]:
        return ci.calibrate_(copy.deepcopy(model), input_shape=SHAPE)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    expected = factors()
    with torch.autocast("cpu", torch.bfloat16):
        assert factors() == expected
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert factors() == expected
        finally:
            torch.set_default_dtype(torch.float32)
