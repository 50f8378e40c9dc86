"""Outputs of convolutions, before what their own classes make of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convsim_init as ci
from convsim_init.layers.forward.calls import convolution_outputs


class Activated(nn.Conv2d):
    """Detectron2's: a normalization and an activation in the convolution's class."""

    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight, self.bias, self.stride, self.padding))


class Partial(nn.Conv2d):
    """A partial convolution: what the mask covers is counted by a convolution too, and the mask returned."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.counting = torch.ones_like(self.weight)

    def forward(self, x):
        counted = F.conv2d(torch.ones_like(x), self.counting)
        return super().forward(x) / counted, counted


class Elsewhere(nn.Conv2d):
    """Computed by no call of a convolution."""

    def forward(self, x):
        patches = F.unfold(x, 3).transpose(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias).mT.unflatten(2, (x.shape[2] - 2, -1))


class Operator(nn.Conv2d):
    """Computed by an operator, and activated."""

    def forward(self, x):
        operator = torch.ops.aten.convolution.default
        return F.relu(operator(x, self.weight, self.bias, (1, 1), (0, 0), (1, 1), False, (0, 0), 1))


class First(nn.Module):
    def forward(self, x):
        return x[0] if isinstance(x, tuple) else x


@pytest.mark.parametrize("kind", [nn.Conv2d, Activated, Partial, Elsewhere, Operator])
def test_the_output_is_that_of_the_convolution(kind):
    module, x, seen = kind(3, 6, 3), torch.randn(2, 3, 9, 9), []
    with convolution_outputs([("a", module)], lambda name, output, _: seen.append((name, output))):
        module(x)
    ((name, output),) = seen
    assert name == "a"
    torch.testing.assert_close(output, F.conv2d(x, module.weight, module.bias))
    module(x)
    assert len(seen) == 1  # nothing looks any longer


@pytest.mark.parametrize("kind", [Activated, Partial])
def test_measures_and_scales_are_those_of_the_convolution(kind):
    torch.manual_seed(0)
    own = nn.Sequential(kind(3, 6, 3), First(), nn.ReLU(), nn.Conv2d(6, 4, 3))
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), First(), nn.ReLU(), nn.Conv2d(6, 4, 3))
    plain.load_state_dict(own.state_dict())
    x = torch.randn(4, 3, 12, 12)
    expected, found = (ci.measure_feature_correlation(model, x)["0"] for model in (plain, own))
    assert found == pytest.approx(expected, rel=1e-5)
    expected, found = (ci.calibrate_(model, x)["0"] for model in (plain, own))
    assert found == pytest.approx(expected, rel=1e-3)


class Late(nn.Conv2d):
    """StyleGAN's: the bias is added afterwards."""

    def forward(self, x):
        return F.conv2d(x, self.weight) + self.bias[:, None, None]


class Hyper(nn.Conv2d):
    """Its kernels come from another parameter."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.code = nn.Parameter(self.weight.detach().clone())
        del self.weight

    def forward(self, x):
        return F.conv2d(x, 2 * self.code, self.bias)


def test_the_bias_may_be_added_later():
    torch.manual_seed(0)
    own, plain, x = Late(3, 6, 3), nn.Conv2d(3, 6, 3), torch.randn(4, 3, 12, 12)
    nn.init.constant_(own.bias, 5)
    plain.load_state_dict(own.state_dict())
    assert ci.calibrate_(nn.Sequential(own), x) == ci.calibrate_(nn.Sequential(plain), x)


def test_a_convolution_may_have_no_weight():
    assert set(ci.measure_feature_correlation(nn.Sequential(Hyper(3, 6, 3)), torch.randn(2, 3, 9, 9))) == {"0"}


def test_after_an_error_nothing_looks_on():
    module = Activated(3, 6, 3)
    with pytest.raises(RuntimeError), convolution_outputs([("a", module)], lambda *_: None):
        module(torch.zeros(1, 4, 9, 9))
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
