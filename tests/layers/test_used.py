"""What is reported is what the convolution is given: masked, tied, quantized, expanded, pruned and computed weights."""

import contextlib
import copy
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from functools import partial, partialmethod
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from seen import given, similarity_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import convsim_init as ci
from convsim_init.initialize import plan
from convsim_init.layers.find import find_layers
from convsim_init.layers.memory import memory, overlap
from convsim_init.report.text import some
from convsim_init.tracking import copies

SETTINGS = ci.Settings(steps=8, channels="matched")


def norms(weight):
    return weight.double().flatten(1).norm(dim=1)


class Using(nn.Conv2d):
    """Uses what a function makes of it and its input as the weight."""

    def __init__(self, use, *arguments, **options):
        super().__init__(*arguments, **options)
        self.use = use

    def forward(self, x):
        return F.conv2d(x, self.use(self, x), self.bias)


class Masked(nn.Conv2d):
    """PixelCNN's: the mask is multiplied into the parameter at each forward pass."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))
        half = self.kernel_size[0] // 2
        self.mask[:, :, half, half:] = 0
        self.mask[:, :, half + 1 :] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


class MaskedCopy(Masked):
    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias)


class MaskedInCall(Masked):
    def __call__(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias)


def hooked():
    module = nn.Conv2d(3, 16, 5)
    mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    module.register_forward_pre_hook(lambda m, _: m.weight.data.mul_(mask))
    return module


def kept_by_a_gradient_hook(kind=nn.Conv2d, *, added_up=False):
    module = kind(3, 16, 5)
    mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    module.weight.data *= mask
    if added_up:
        module.weight.register_post_accumulate_grad_hook(lambda weight: weight.grad.mul_(mask))
    else:
        module.weight.register_hook(lambda gradient: gradient * mask)
    return module


def pruned(times=1):
    module = nn.Conv2d(3, 16, 5)
    for _ in range(times):
        prune.random_unstructured(module, "weight", 0.4)
    return module


MASKS = {
    "in place": lambda: Masked(3, 16, 5),
    "multiplied": lambda: MaskedCopy(3, 16, 5),
    "in its call": lambda: MaskedInCall(3, 16, 5),
    "by a hook": hooked,
    "by a hook on the gradient": kept_by_a_gradient_hook,
    "by a hook on the sum of gradients": lambda: kept_by_a_gradient_hook(added_up=True),
    "and scaled": lambda: kept_by_a_gradient_hook(partial(Using, lambda m, x: m.weight * 2)),
    "pruned": pruned,
    "twice pruned": lambda: pruned(2),
}


@pytest.mark.parametrize("build", MASKS.values(), ids=MASKS.keys())
def test_within_a_mask_zeros_stay_zero_and_norms_are_kept(build):
    module = build()
    before, old = {key: value.clone() for key, value in module.state_dict().items()}, used(module)
    ci.measure(module)
    ci.initialize_(module, exclude=["*"], settings=SETTINGS)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    new, zeros = used(module), old == 0
    assert zeros.any()
    assert new[zeros].eq(0).all()
    torch.testing.assert_close(norms(new), norms(old), rtol=1e-5, atol=0)
    assert layer.outcome is ci.Outcome.INITIALIZED
    assert layer.reason == f"within its mask, {float((~zeros).float().mean()):.0%} of the entries"
    assert layer.after["normalized_similarity"] == similarity_of(new)
    assert layer.after["normalized_similarity"] < 0.8 * float(ci.convolutional_similarity(old, normalized=True))


def used(module):
    """The weight that a copy is given; a pruned module cannot be copied deeply once its hook has run."""
    if hasattr(module, "weight_mask"):
        return (module.weight_orig * module.weight_mask).detach()
    return given(copy.deepcopy(module).eval(), torch.zeros(1, module.in_channels, *[7] * len(module.kernel_size)))[0]


def test_a_draw_leaves_zeros_that_a_hook_on_the_gradient_keeps():
    module = kept_by_a_gradient_hook()
    before = module.weight.detach().clone()
    assert ci.draw_base_(module, "kaiming_normal") == [""]
    assert torch.equal(module.weight == 0, before == 0)
    assert not torch.equal(module.weight, before)


def test_a_hook_on_the_gradient_of_a_weight_without_zeros_is_no_mask():
    module = nn.Conv2d(3, 16, 5)
    module.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert (layer.outcome, layer.reason) == (ci.Outcome.INITIALIZED, None)


def test_what_a_mask_hides_stays_as_it_was():
    module = MaskedCopy(3, 16, 5)
    before = module.weight.detach().clone()
    ci.initialize_(module, settings=SETTINGS)
    hidden = module.mask == 0
    assert torch.equal(module.weight[hidden], before[hidden])
    assert not torch.equal(module.weight[~hidden], before[~hidden])


@pytest.mark.parametrize("kind", ["same data", "a view", "a transposed view", "one array", "one parameter"])
@pytest.mark.parametrize("source", ["module", "state dict"])
def test_memory_says_what_is_shared(kind, source):
    first, second = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
    if kind == "same data":
        second.weight.data = first.weight.data
    elif kind == "a view":
        whole = torch.randn(12, 4, 3, 3)
        first.weight.data, second.weight.data = whole[:8], whole[4:]
    elif kind == "one array":  # behind two storages
        whole = np.random.default_rng(0).normal(size=(12, 4, 3, 3)).astype("float32")
        first.weight.data, second.weight.data = torch.from_numpy(whole[:8]), torch.from_numpy(whole[4:])
    elif kind == "a transposed view":
        second.weight = nn.Parameter(first.weight.data.transpose(2, 3))
    else:
        second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second})
    what = model if source == "module" else dict(model.state_dict())
    report = ci.initialize_(what, settings=SETTINGS)
    assert [layer.reason for layer in report.layers][-1] == "shares its weight with a"
    assert report.layers[0].after["normalized_similarity"] == similarity_of(first.weight)


def test_other_tensors_in_the_memory_of_a_treated_weight_are_told():
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 1), "linear": nn.Linear(4, 8), "other": nn.Linear(4, 8)})
    model["linear"].weight.data = model["conv"].weight.data.view(8, 4)
    model.held = [model["conv"].weight, model["linear"].weight, model["other"].weight.detach()]
    model["other"].kernel = model["conv"].weight.detach().flatten(1)
    report = ci.initialize_(model, settings=SETTINGS)
    names = "linear.weight, other.kernel"
    assert report.remarks == [f"in the memory of weights of layers, and change with them: {names}"]
    assert ci.initialize_(model, exclude=["*"]).remarks == []


def test_parts_of_one_storage_that_do_not_overlap_are_apart():
    whole = torch.randn(16, 4, 3, 3)
    assert overlap(memory(whole[:8]), memory(whole[7:]))
    assert not overlap(memory(whole[:8]), memory(whole[8:]))
    assert not overlap(memory(whole), memory(whole.clone()))
    assert not overlap(memory(whole[::2]), memory(whole[1::2]))
    assert not overlap(memory(whole[:, :2]), memory(whole[:, 2:]))
    assert overlap(memory(whole[:, :2]), memory(whole[1::2]))
    assert not overlap(memory(whole[:0]), memory(whole))
    assert not overlap(memory(whole[8:8]), memory(whole))
    values = torch.randn(8, 4, 3, 3, dtype=torch.complex64)
    assert not overlap(memory(values.real), memory(values.imag))
    assert overlap(memory(values.real), memory(values))


def test_the_two_halves_of_a_complex_weight_are_two_layers_and_a_tie_by_an_array_is_told():
    values, array = torch.randn(8, 4, 3, 3, dtype=torch.complex64), np.ones((9, 4, 1, 1), "float32")
    model = nn.ModuleDict({"a": nn.Conv2d(4, 8, 3), "b": nn.Conv2d(4, 8, 3), "c": nn.Conv2d(4, 8, 1)})
    model["a"].weight.data, model["b"].weight.data = values.real, values.imag
    model["c"].weight.data = torch.from_numpy(array[:8])
    model["c"].register_buffer("last", torch.from_numpy(array[1:]))
    report = plan(model, settings=SETTINGS)
    assert [layer.outcome.value for layer in report.layers] == ["planned"] * 3
    assert report.remarks == ["in the memory of weights of layers, and change with them: c.last"]


def test_quantized_convolutions_are_named():
    quantized = torch.ao.nn.quantized.Conv2d(3, 8, 3)
    for report in (
        ci.measure(nn.Sequential(quantized, nn.Conv2d(8, 4, 3))),
        plan(nn.Sequential(quantized, nn.Conv2d(8, 4, 3))),
    ):
        assert "not looked at, for their weights are quantized: 1 Conv2d" in report.remarks
    with pytest.raises(ci.InputError, match="has none that is known: the code of Conv2d seems to call some"):
        ci.measure(nn.Sequential(quantized))


def test_quantization_aware_convolutions_are_approximated_and_their_observers_untouched():
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = get_default_qat_qconfig("fbgemm")
        prepare_qat(model.train(), inplace=True)
    before = copy.deepcopy(model.state_dict())
    ci.measure(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = ci.initialize_(model, settings=SETTINGS)
    assert [layer.outcome for layer in report.layers] == [ci.Outcome.APPROXIMATED] * 2
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["0.weight", "1.weight"]


def test_a_class_that_ignores_its_parameter_is_put_back():
    module = Using(lambda m, x: torch.linspace(-1, 1, m.weight.numel()).view_as(m.weight).sin(), 3, 8, 3)
    before = module.weight.detach().clone()
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert "is no better" in layer.reason
    assert torch.equal(module.weight, before)


def test_an_expanded_weight_is_measured_and_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    model[0].weight = nn.Parameter(torch.randn(8, 1, 3, 3).expand(8, 3, 3, 3))
    report = ci.initialize_(model, settings=SETTINGS)
    assert [layer.outcome.value for layer in report.layers] == ["skipped", "initialized"]
    assert report.layers[0].reason == "its entries share memory, as after expand(): clone it first"
    assert ci.measure(model).layers[0].outcome is ci.Outcome.MEASURED


class Added(nn.Module):
    """One that adds what is trained, as low ranks do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 72) / 10)

    def forward(self, weight):
        return weight + (self.a @ self.b).view_as(weight)


class MaxNorm(nn.Module):
    def forward(self, weight):
        return torch.renorm(weight, 2, 0, 0.4)


class Sparse(nn.Module):
    """As those of torch.ao.pruning, whose state dict leaves the mask out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", (torch.arange(8 * 8 * 9) % 3 > 0).view(8, 8, 3, 3))

    def forward(self, weight):
        return weight * self.mask

    def state_dict(self, *arguments, **options):
        return {}


class SparseAndStubborn(Sparse):
    assigned = False

    def right_inverse(self, weight):
        if self.assigned:  # and not only registered
            raise TypeError(f"not\nthis: {weight}")
        self.assigned = True
        return weight


class SparseWithInverse(Sparse):
    """Its inverse lets the weight be assigned, and is none for other weights than masked ones."""

    def right_inverse(self, weight):
        return weight


@pytest.mark.parametrize("kind", [Added, MaxNorm, Sparse, SparseWithInverse])
def test_a_parametrization_without_an_inverse_is_tried(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    nn.utils.parametrize.register_parametrization(model[1], "weight", kind())
    before = norms(model[1].weight.detach())
    assert [layer.outcome.value for layer in plan(model, settings=SETTINGS).layers] == ["planned"] * 2
    layer = ci.initialize_(model, settings=SETTINGS).layers[1]
    assert layer.outcome is ci.Outcome.INITIALIZED
    torch.testing.assert_close(norms(model[1].weight.detach()), before, rtol=1e-4, atol=0)
    assert layer.after["normalized_similarity"] == similarity_of(model[1].weight)
    assert layer.after["normalized_similarity"] < layer.before["normalized_similarity"] / 2


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_spectral_norm_beside_a_parametrization_without_an_inverse_is_left_alone():
    module = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
    nn.utils.parametrize.register_parametrization(module, "weight", Twice())
    before = module.eval().weight.detach().clone()
    (layer,) = ci.initialize_(nn.Sequential(module), settings=SETTINGS).layers
    assert "does not implement right_inverse" in layer.reason
    assert torch.equal(module.weight, before)


def test_an_input_is_large_enough_to_be_reflected():
    module = nn.Conv2d(8, 8, 3, padding=4, padding_mode="reflect")
    nn.utils.parametrize.register_parametrization(module, "weight", Twice())
    assert ci.ConvolutionalSimilarity(module)().requires_grad
    assert ci.initialize_(module, settings=SETTINGS).layers[0].outcome is ci.Outcome.INITIALIZED


def test_one_weight_that_cannot_be_assigned_does_not_stop_the_others():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    nn.utils.parametrize.register_parametrization(model[1], "weight", SparseAndStubborn())
    before = model[1].weight.detach().clone()
    report = ci.initialize_(model, settings=SETTINGS)
    assert [layer.outcome.value for layer in report.layers] == ["initialized", "skipped", "initialized"]
    assert "cannot be assigned to: TypeError: not this: tensor(" in report.layers[1].reason
    assert len(report.layers[1].reason) < 600
    assert torch.equal(model[1].weight, before)


class Pair(torch.Tensor):
    """A tensor that wraps two others, as quantized ones do."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Pair(args[0].values, args[0].scale)
        args = [arg.values * arg.scale if isinstance(arg, Pair) else arg for arg in args]
        return func(*args, **(kwargs or {}))


def paired(shape):
    return nn.Parameter(Pair(torch.randint(-9, 9, shape).float(), torch.ones(())), requires_grad=False)


def test_tensors_that_wrap_others_are_no_obstacle_beside_a_layer_and_one_as_its_weight(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    model[1].weight, model[3].weight = paired((8, 8, 3, 3)), paired((4, 8))
    model[0].register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    model[0].register_forward_pre_hook(lambda module, _: None)
    for report in (ci.measure(model), ci.initialize_(model, settings=SETTINGS)):
        assert report.layers[0].outcome in (ci.Outcome.MEASURED, ci.Outcome.INITIALIZED)
        assert report.layers[1].reason.startswith("of class Pair, which wraps other tensors: initialize the model ")
    model[1] = nn.BatchNorm2d(8)
    ci.calibrate_(model, input_shape=(3, 3, 3))
    for part in (model[0], model[3]):
        with pytest.raises(ci.InputError, match="expected a dense tensor, got a sparse, quantized or wrapped one"):
            ci.save_checkpoint(part, tmp_path / "init.safetensors")


class Quantized(NamedTuple):
    """What stands for a quantized tensor in a forward pass, as brevitas' do."""

    value: torch.Tensor
    scale: torch.Tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*(arg.value if isinstance(arg, Quantized) else arg for arg in args), **(kwargs or {}))


def test_a_weight_may_be_given_with_its_scale():
    def quantized(m, x=None):
        scale = m.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
        return Quantized((m.weight / scale).round() * scale, scale)

    module = Using(quantized, 3, 8, 3)
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert layer.outcome is ci.Outcome.APPROXIMATED
    assert layer.after["normalized_similarity"] == similarity_of(quantized(module).value)


def test_a_computed_weight_is_refused_and_a_part_of_a_parameter_is_not():
    module = parametrizations.weight_norm(nn.Conv1d(16, 8, 3))
    with pytest.raises(ci.InputError, match="a weight that is computed, whose change would be lost"):
        ci.convsim_(module.weight)
    plain = nn.Conv1d(16, 8, 3)
    before = plain.weight.detach().clone()
    ci.convsim_(plain.weight[:4], settings=SETTINGS)
    assert torch.equal(plain.weight[4:], before[4:])
    assert not torch.equal(plain.weight[:4], before[:4])


def test_frozen_copies_that_part_are_told():
    query = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    key = copy.deepcopy(query).requires_grad_(False)
    other = nn.Conv2d(8, 8, 3).requires_grad_(False)
    report = ci.initialize_(nn.ModuleDict({"q": query, "k": key, "other": other}), settings=SETTINGS)
    (remark,) = report.remarks
    assert remark.startswith("copies that are no longer equal")
    assert "k.0 (of q.0), k.1 (of q.1)" in remark


def test_copies_that_are_treated_too_are_told_where_they_part():
    first, second = nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(16, 8, 3)
    second.weight.data.copy_(first.weight.data)  # as in an autoencoder that starts tied
    (remark,) = ci.initialize_(nn.ModuleDict({"first": first, "second": second}), settings=SETTINGS).remarks
    assert remark.startswith("copies that are no longer equal to what they were copied from: second (of first):")
    online = nn.Sequential(nn.Conv2d(3, 8, 3), parametrizations.weight_norm(nn.Conv2d(8, 8, 3), dim=None))
    model = nn.ModuleDict({"online": online, "target": copy.deepcopy(online)})
    assert not ci.initialize_(model, settings=SETTINGS).remarks
    assert torch.equal(online[0].weight, model["target"][0].weight)


class Complex(nn.Conv2d):
    """Two real weights."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.weight_i = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, z):
        return F.conv2d(z, self.weight) + F.conv2d(z, self.weight_i)


class ComplexInput(Complex):
    """Its pass ends with an error at a real input."""

    def forward(self, z):
        return F.conv2d(z.real, self.weight) + F.conv2d(z.imag, self.weight_i)


class Recurrent(Complex):
    """The input of its second weight is not that of the pass."""

    def forward(self, x):
        return F.conv2d(x, self.weight) + F.conv2d(torch.zeros_like(x), self.weight_i)


def test_the_weight_that_counts_is_the_one_that_depends_on_the_parameter():
    class Partial(nn.Conv2d):
        """Counts what lies under a mask by a convolution with ones, before it convolves."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("ones", torch.ones_like(self.weight))

        def forward(self, x):
            with torch.no_grad():
                covered = F.conv2d(torch.ones_like(x), self.ones)
            return super().forward(x) / covered

    module = Partial(3, 8, 3)
    before = module.weight.detach().clone()
    (layer,) = ci.measure(module).layers
    assert layer.before["normalized_similarity"] == similarity_of(before)
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert (layer.outcome, layer.reason) == (ci.Outcome.INITIALIZED, None)
    (layer,) = ci.measure(module.requires_grad_(False)).layers
    assert layer.before["normalized_similarity"] == similarity_of(module.weight)


def test_modules_that_may_convolve_are_told_with_their_share():
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel_size = (3, 3)
            self.weight = nn.Parameter(torch.randn(4, 3 * 4 * 9))

    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 108, bias=False)

        def forward(self, x, style):
            return F.conv2d(x, self.linear(style).view(4, 3, 3, 3))

    class Steerable(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel_size, self.basis = 3, torch.randn(20, 4, 3, 3, 3)
            self.weights = nn.Parameter(torch.randn(20))

        def forward(self, x):
            assert isinstance(x, tuple)  # cannot be followed
            return F.conv2d(x[0], torch.einsum("b,bmchw->mchw", self.weights, self.basis))

    class Blended(Steerable):
        def __init__(self):
            super().__init__()
            del self.kernel_size

        def forward(self, x):
            return super().forward((x,))

    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, bias=False), "bank": Bank(), "k1": Kernel(), "k2": Kernel()})
    model["keras"] = nn.ParameterDict({"conv2d/kernel": torch.randn(3, 3, 3, 4)})
    model["hyper"], model["scale"], model["steerable"], model["blended"] = Hyper(), nn.Module(), Steerable(), Blended()
    model["scale"].weight = nn.Parameter(torch.ones(1, 1, 1, 4))  # factors, of no kernels
    (remark,) = ci.measure(model).remarks
    share = (4 * 108 + 4 * 108 + 40) / (108 + 4 * 108 + 4 * 108 + 40 + 4)
    kinds = "2 Kernel, 1 Bank, 1 ParameterDict, 1 Hyper and 2 more"
    assert remark == f"not looked at, though they may convolve: {kinds}, with {share:.0%} of the parameters"


def test_what_a_pass_that_cannot_be_followed_may_convolve_with_is_told_whatever_its_name_is():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.shifts = nn.Parameter(torch.randn(4, 4, 3, 3, 3)), nn.Parameter(torch.zeros(4, 4))

        def forward(self, x):
            return torch.vmap(F.conv2d, (None, 0, 0))(x, self.w, self.shifts)

    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, bias=False), "stacked": Stacked()})
    share = 4 * 108 / (108 + 4 * 108 + 16)
    expected = f"not looked at, though they may convolve: 1 Stacked, with {share:.0%} of the parameters"
    assert ci.measure(model).remarks == [expected]


@pytest.mark.parametrize(
    ("name", "shape", "others", "looks"),
    [
        ("conv", (8, 3, 3, 3), {}, True),
        ("conv", (8, 3, 1, 7), {}, True),
        ("stem", (16, 3, 16, 16), {}, True),
        ("encoder.conv", (16, 8, 10), {"encoder.conv.bias": 16}, True),
        ("up", (16, 8, 16), {"up.bias": 8}, True),
        ("spconv 2 by name", (16, 3, 3, 3, 32), {}, False),
        ("spconv 1", (3, 3, 3, 32, 16), {}, False),
        ("tensorflow", (3, 3, 32, 64), {}, False),
        ("tensorflow, as many filters as channels", (3, 3, 16, 16), {}, False),
        ("large kernels", (3, 3, 16, 16), {"large kernels.bias": 3}, True),
        ("channels last", (16, 3, 3, 32), {}, False),
        ("pair.bilinear", (16, 8, 6), {"pair.bilinear.bias": 16}, False),
        ("pair", (16, 8, 8), {"pair.bias": 16}, False),
        ("experts", (4, 64, 5), {}, False),
        ("stacked", (4, 64, 32), {}, False),
        ("stacked with biases", (10, 17, 7), {"stacked with biases.bias": (10, 7)}, False),
        ("norm over images", (16, 7, 7), {"norm over images.bias": (16, 7, 7)}, False),
        ("another length", (16, 8, 3, 3), {"another length.bias": 5}, False),
        ("grouped up", (16, 8, 4), {"grouped up.bias": 32}, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_files_tensor_is_taken_for_a_convolution_only_where_it_looks_like_one(name, shape, others, looks):
    state = {f"{name}.weight": torch.randn(shape)} | {key: torch.zeros(size) for key, size in others.items()}
    before = state[f"{name}.weight"].clone()
    (layer,) = ci.initialize_(state, settings=ci.Settings(steps=1)).layers
    assert torch.equal(state[f"{name}.weight"], before) is not looks
    if not looks:
        assert layer.reason.startswith("doubtful whether it is a convolution's weight")
        assert not ci.measure(state).layers[0].before


def test_numbers_that_would_all_be_zero_in_a_files_dtype_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].weight.data.mul_(1e-12)
    with pytest.raises(ci.InputError, match=r"0\.weight: expected numbers in the range of torch\.float16, got smaller"):
        ci.save_checkpoint(model, tmp_path / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    ci.save_checkpoint(model, tmp_path / "a.safetensors", dtype=torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-12, 1e-6])  # zero, and of a few bits
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_filters_that_a_files_dtype_rounds_away_are_told(kind, scale, tmp_path, command):
    state = nn.Sequential(kind(4, 4, 3), nn.Conv2d(4, 4, 3)).state_dict()
    (state["0.weight"][2] if kind is nn.Conv2d else state["0.weight"][:, 2]).mul_(scale)
    state |= {"cls_token": torch.tensor([[[1e-6, 1]]]), "gain.weight": torch.tensor([1e-6, 1])[:, None, None]}
    warning = "filters so small that float16 rounds them away in the file: 0.weight; another dtype keeps them"
    with pytest.warns(UserWarning, match=warning):
        ci.save_checkpoint(state, tmp_path / "a.safetensors", dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.bfloat16, torch.float32, None):
            ci.save_checkpoint(state, tmp_path / "a.safetensors", dtype=dtype, overwrite=True)
    for dtype, expected in (("float16", True), ("bfloat16", False)):
        out = command("a.safetensors", "--exclude", "0", "--steps", "1", "--dtype", dtype, "--out", f"{dtype}.pt")[1]
        assert (warning in out) is expected


def test_a_weight_that_becomes_nan_is_put_back():
    class Divided(nn.Conv2d):
        def forward(self, x):
            weight = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            return F.conv2d(x, weight.flip(-1) * self.on)

    module = Divided(3, 8, 3)
    module.register_buffer("on", torch.ones(8, 1, 1, 1))
    module.on[0] = 0
    before = module.weight.detach().clone()
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    finite = used(module).isfinite().all()
    assert finite or layer.outcome is ci.Outcome.FAILED
    assert layer.outcome is not ci.Outcome.FAILED or torch.equal(module.weight, before)


@pytest.mark.parametrize("how", ["excluded", "frozen", "not included"])
def test_what_is_left_alone_does_not_change_through_a_tie(how):
    a, b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
    b.weight = a.weight
    if how == "frozen":
        b.weight = nn.Parameter(torch.empty(0))
        b.weight.data = a.weight.data
        a.weight.requires_grad_(False)
    before = a.weight.detach().clone()
    options = {"excluded": {"exclude": ["0"]}, "not included": {"include": ["1"]}, "frozen": {}}[how]
    report = ci.initialize_(nn.Sequential(a, b), settings=SETTINGS, **options)
    assert torch.equal(a.weight, before)
    assert report.layers[1].reason == f"shares its weight with 0, left alone: {how}"


def test_a_forward_pass_that_rejects_the_new_weight_fails_alone():
    class Picky(nn.Conv2d):
        def forward(self, x):
            if not torch.equal(self.weight, self.first) and self.weight.min() < 1:
                raise ValueError("not mine")
            return F.conv2d(x, self.weight * 2)

    picky = Picky(8, 8, 3)
    picky.first = picky.weight.detach().clone()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), picky, nn.Conv2d(8, 8, 3))
    report = ci.initialize_(model, settings=SETTINGS)
    assert [layer.outcome.value for layer in report.layers] == ["initialized", "skipped", "initialized"] or (
        report.layers[1].outcome is ci.Outcome.FAILED and "ValueError: not mine" in report.layers[1].reason
    )
    assert torch.equal(picky.weight, picky.first)


def test_weights_of_inference_mode_are_left_alone_outside_of_it():
    with torch.inference_mode():
        inside = nn.Conv2d(8, 8, 3)
    report = ci.initialize_(nn.Sequential(nn.Conv2d(3, 8, 3), inside), settings=SETTINGS)
    assert [layer.outcome.value for layer in report.layers] == ["initialized", "skipped"]
    assert "inference_mode" in report.layers[1].reason


class Halved(nn.Module):
    def forward(self, weight):
        return weight * 2

    def right_inverse(self, weight):
        return weight / 2


def test_a_parametrization_keeps_its_parameters_memory_and_strides():
    module = nn.ConvTranspose1d(4, 6, 3)
    nn.utils.parametrize.register_parametrization(module, "weight", Halved())
    original = module.parametrizations.weight.original
    memory_before, strides = original.data_ptr(), original.stride()
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert layer.outcome is ci.Outcome.INITIALIZED
    assert (original.data_ptr(), original.stride()) == (memory_before, strides)


def test_a_random_parametrization_leaves_the_random_state():
    class Noisy(nn.Module):
        def forward(self, weight):
            return weight + 1e-3 * torch.randn_like(weight)

    module = nn.Conv2d(3, 8, 3)
    nn.utils.parametrize.register_parametrization(module, "weight", Noisy())
    before = torch.get_rng_state()
    ci.measure(module)
    ci.initialize_(module, exclude=["*"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parametrization_that_raises_is_that_layers_trouble():
    class Broken(nn.Module):
        def forward(self, weight):
            if self.training and weight.sum() == 12345:
                return weight
            raise LookupError("its own")

    module = nn.Conv2d(3, 8, 3)
    nn.utils.parametrize.register_parametrization(module, "weight", Broken(), unsafe=True)
    report = ci.measure(nn.Sequential(module, nn.Conv2d(8, 8, 3)))
    assert [layer.outcome.value for layer in report.layers] == ["skipped", "measured"]
    assert "LookupError: its own" in report.layers[0].reason


def test_weights_that_no_convolution_can_have_are_that_layers_trouble():
    model = nn.Sequential(*(nn.Conv2d(4, 8, 3) for _ in range(4)))
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    model[1].weight = nn.Parameter(model[1].weight.detach().flatten(1))
    model[2].groups = 3
    report = ci.initialize_(model, settings=SETTINGS)
    assert [layer.reason for layer in report.layers] == [
        "a sparse tensor: make it dense first",
        "its weight is of rank 2, without kernels",
        "its 3 groups do not divide dimension 0 of its weight, 8",
        None,
    ]
    assert [layer.reason for layer in ci.measure(model).layers] == [layer.reason for layer in report.layers]


def test_strides_that_overlap_are_left_alone():
    module = nn.Conv1d(1, 8, 5)
    module.weight = nn.Parameter(torch.randn(40).as_strided((8, 1, 5), (2, 5, 1)))
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert layer.reason == "its entries share memory, as after expand(): clone it first"


def test_a_weight_that_depends_on_the_input_is_left_alone():
    (layer,) = ci.initialize_(Using(lambda m, x: m.weight * (1 + x.abs().mean()), 3, 8, 3), settings=SETTINGS).layers
    assert (layer.outcome, layer.reason) == (ci.Outcome.SKIPPED, "the weight that Using uses depends on its input")


class GroupedByItsCall(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, stride=2, groups=2)


class TransposedByItsCall(nn.Conv2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, stride=(1, 4))


class TransposedAround(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return F.conv_transpose2d(x, self.conv.weight, stride=4)


def with_weight(module, *shape):
    module.weight = nn.Parameter(torch.randn(shape))
    return module


@pytest.mark.parametrize(
    ("module", "options", "strides"),
    [
        (lambda: with_weight(GroupedByItsCall(4, 8, 3), 8, 2, 3, 3), {"groups": 2}, 4),
        (lambda: with_weight(TransposedByItsCall(8, 4, 3), 8, 4, 3, 3), {"transposed": True}, 4),
        (lambda: TransposedAround(nn.Conv2d(8, 8, 3)), {"transposed": True}, 16),
    ],
    ids=["groups", "transposed", "around"],
)
@pytest.mark.parametrize("channels", ["matched", "all"])
def test_the_call_says_groups_and_direction_whatever_the_attributes_are(module, options, strides, channels):
    model = module()
    weight = next(model.parameters())
    (layer,) = ci.measure(model).layers
    assert layer.before["normalized_similarity"] == similarity_of(weight, **options)
    expected = ci.convolutional_similarity(weight, channels=channels, **options)
    torch.testing.assert_close(ci.ConvolutionalSimilarity(model, channels=channels)(), expected)
    assert [layer.strides for layer in find_layers(model)] == [strides]


class GroupsOfChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, groups=x.shape[1])


class GroupsOfSamples(GroupsOfChannels):
    def forward(self, x):
        return F.conv2d(x.flatten(0, 1), self.weight, groups=x.shape[0])


@pytest.mark.parametrize("kind", [GroupsOfChannels, GroupsOfSamples])
def test_groups_that_depend_on_the_input_are_not_known(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind())
    for report in (ci.measure(model), ci.initialize_(model, settings=SETTINGS)):
        assert report.layers[1].reason == f"the groups that {kind.__name__} convolves with depend on its input"
    model[1].in_channels = 8
    if kind is GroupsOfChannels:
        assert ci.measure(model).layers[1].reason == "one filter per group shares its channels with no other"


def test_weights_repeated_for_each_sample_are_those_of_one():
    class Repeated(nn.Conv2d):
        def forward(self, x):
            weight = self.weight.repeat(len(x), 1, 1, 1)
            return F.conv2d(x.flatten(0, 1)[None], weight, groups=len(x)).unflatten(1, (len(x), -1))[0]

    (layer,) = ci.initialize_(Repeated(4, 8, 3), settings=SETTINGS).layers
    assert (layer.outcome, layer.reason) == (ci.Outcome.INITIALIZED, None)


def test_a_weight_that_becomes_nan_at_zeros_is_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight * (x.sum() / x.sum())) + F.conv2d(x, self.weight.flip(2))

    for report in (ci.measure(Scaled(3, 8, 3)), plan(Scaled(3, 8, 3))):
        (layer,) = report.layers
        assert layer.outcome is ci.Outcome.SKIPPED
        assert layer.reason.startswith(
            "the weight that Scaled makes of its finite parameter, at an input of zeros, hol"
        )


class Iterated(nn.Conv2d):
    """Divides its weight by its norm as a map, from an iteration that takes more or fewer steps."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("u", torch.randn(1, self.in_channels, 8, 8, generator=torch.Generator().manual_seed(0)))

    def estimate(self):
        u, norm = self.u, 0.0
        for _ in range(50):
            v = F.normalize(F.conv2d(u, self.weight, padding=1), dim=(1, 2, 3))
            u = F.conv_transpose2d(v, self.weight, padding=1)
            before, norm = norm, float(u.norm().detach())
            if abs(norm - before) < 0.01 * norm:
                break
            u = F.normalize(u, dim=(1, 2, 3))
        return (F.conv2d(u / u.norm(), self.weight, padding=1) * v).sum()

    def forward(self, x):
        return F.conv2d(x, self.weight / self.estimate(), padding=1)


def test_convolutions_that_estimate_a_norm_do_not_count():
    module = Iterated(8, 8, 3)
    norm = float(module.estimate().detach())
    (layer,) = ci.measure(module).layers
    assert layer.reason is None
    assert layer.before["similarity"] == similarity_of(module.weight / norm, normalized=False)
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert layer.after["similarity"] == similarity_of(module.weight / module.estimate(), normalized=False)


def test_a_weight_that_is_random_is_left_alone_and_a_little_noise_is_not():
    dropped = Using(lambda m, x: F.dropout(m.weight, 0.5), 3, 8, 3)
    noisy = Using(lambda m, x: m.weight * (1 + 1e-4 * torch.randn_like(m.weight)), 8, 8, 3)
    report = ci.initialize_(nn.Sequential(dropped, noisy), settings=SETTINGS)
    assert [layer.outcome.value for layer in report.layers] == ["skipped", "approximated"]
    assert report.layers[0].reason == "the weight that Using uses is random, in evaluation mode too"
    assert ci.measure(dropped).layers[0].outcome is ci.Outcome.SKIPPED


def test_a_weight_that_its_class_makes_worse_is_put_back():
    class Centred(nn.Conv1d):
        def forward(self, x):
            return F.conv1d(x, self.weight - self.weight.mean((1, 2), keepdim=True))

    module = Centred(1, 8, 2)  # of two taps, centring leaves one direction
    before = module.weight.detach().clone()
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert (layer.outcome, torch.equal(module.weight, before)) == (ci.Outcome.SKIPPED, True) or (
        layer.after["normalized_similarity"] <= layer.before["normalized_similarity"] * (1 + 1e-6)
    )


def test_norms_of_filters_that_are_not_kept_are_told():
    class Centred(nn.ConvTranspose2d):  # along dimension 0, as for filters; but here those are along dimension 1
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv_transpose2d(x, weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1), groups=2)

    module = Centred(2, 4, 3, groups=2)
    before = used(module)
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    change = used(module).flatten(2).norm(dim=2) / before.flatten(2).norm(dim=2) - 1
    assert layer.outcome is ci.Outcome.APPROXIMATED
    assert f"changes the norms of filters by up to {float(change.abs().max()):.1%}" in layer.reason


def test_a_dry_run_tells_of_infinities_as_the_run_does():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    model[1].weight.data[0] = float("nan")
    planned = plan(model).layers
    done = ci.initialize_(model, settings=SETTINGS).layers
    assert [layer.outcome.value for layer in planned] == ["planned", "failed"]
    assert planned[1].reason == done[1].reason == "left as it was: its weight holds infinities or NaN"


class Scaled(nn.Module):
    """A home-made convolution, with an equalized learning rate."""

    def __init__(self, inputs, filters, taps, groups=1, transposed=False):
        super().__init__()
        shape = (inputs, filters // groups) if transposed else (filters, inputs // groups)
        self.weight = nn.Parameter(torch.randn(*shape, taps, taps))
        self.bias = nn.Parameter(torch.zeros(filters))
        self.groups, self.transposed = groups, transposed

    def forward(self, x):
        call = F.conv_transpose2d if self.transposed else F.conv2d
        return call(x, self.weight * 0.1, bias=self.bias, groups=self.groups)


class Blur(nn.Module):
    """Convolves with fixed filters, which are no layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(4, 1, 3, 3) / 9)

    def forward(self, x):
        return F.conv2d(x, self.weight, groups=4)


class Configured(nn.Module):
    """With a dictionary whose keys are its attributes, in place of its methods."""

    def __init__(self):
        super().__init__()
        self.conv, self.config = nn.Conv2d(4, 8, 3), AttributeDict(scale=2, values=[1])

    def forward(self, x):
        return F.conv2d(x, self.conv.weight * self.config.scale)


class AttributeDict(dict):
    def __init__(self, **entries):
        super().__init__(entries)
        vars(self).update(entries)


def test_the_keys_of_a_dictionary_may_hide_its_methods():
    (layer,) = ci.measure(Configured()).layers
    assert (layer.outcome, layer.reason) == (ci.Outcome.MEASURED, None)


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True), (2, True)])
def test_a_module_that_convolves_with_its_own_weight_is_a_layer(groups, transposed):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Scaled(4, 8, 3, groups, transposed), Blur())
    before, state = model[1].weight.detach().clone(), copy.deepcopy(model.state_dict())
    layer = ci.measure(model).layers[1]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    options = {"groups": groups, "transposed": transposed}
    assert (layer.name, layer.kind) == ("1", "Scaled")
    assert layer.before["normalized_similarity"] == similarity_of(before, **options)
    report = ci.initialize_(model, settings=SETTINGS)
    assert [layer.outcome for layer in report.layers] == [ci.Outcome.INITIALIZED] * 2
    assert report.remarks == []
    assert report.layers[1].after["normalized_similarity"] == similarity_of(model[1].weight, **options)
    assert report.layers[1].after["norm_ratio"] == pytest.approx(1, abs=1e-4)
    assert ci.ConvolutionalSimilarity(model).skipped["1"].startswith("no module of PyTorch's convolutions")


class Around(nn.Module):
    """Uses its convolution's weight itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.mask = torch.rand(8, 4, 3, 3) < 0.5


class MaskedAround(Around):
    def forward(self, x):
        return F.conv2d(x, self.conv.weight * self.mask)


class Masking(Around):
    """Masks the weight in some way."""

    def __init__(self, way):
        super().__init__()
        self.way, self.masked = way, elsewhere.masked

    def forward(self, x):
        return self.way(self, x)


def masked_in_place(m, x):
    m.conv.weight.data *= m.mask
    return m.conv(x)


def masked_in_place_by_an_operator(m, x):
    torch.ops.aten.mul_.Tensor(m.conv.weight.data, m.mask)
    return m.conv(x)


def masked_by_operators(m, x):
    weight = torch.ops.aten.mul.Tensor(m.conv.weight, m.mask)
    return torch.ops.aten.convolution(x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


@torch.autocast("cpu", enabled=False)
def masked_decorated(m, x):
    return F.conv2d(x, m.conv.weight * m.mask)


def masked_among_parameters(m, x):
    weight, _ = m.conv.parameters()
    return F.conv2d(x, weight * m.mask)


def hooked_around():
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    mask = torch.rand(8, 4, 3, 3) < 0.5
    model.register_forward_pre_hook(lambda m, _: (m[0].weight.data.mul_(mask), None)[1])
    return model


elsewhere = types.ModuleType("elsewhere")  # as another file of the project
exec(
    """
import torch.nn.functional as F

def masked(conv, x, mask):
    return F.conv2d(x, conv.weight * mask)

class Method:
    def masked(self, x):
        return masked(self.conv, x, self.mask)

class Static:
    masked = staticmethod(masked)
""",
    vars(elsewhere),
)


class MaskedByAMethod(Around, elsewhere.Method):
    def forward(self, x):
        return self.masked(x)


class MaskedAbove(MaskedAround):
    def forward(self, x):
        return super().forward(x) + 1


class MaskedByABase(MaskedAround):
    def forward(self, x):
        return MaskedAround.forward(self, x) + 1


class MaskedPartly(Around):
    def run(self, x, again):
        return F.conv2d(x, self.conv.weight * self.mask)

    forward = partialmethod(run, again=False)


class MaskedByAProperty(Around):
    @property
    def kernel(self):
        return self.conv.weight * self.mask

    def forward(self, x):
        return F.conv2d(x, self.kernel)


class OwnMask(nn.Conv2d):
    def drop(self, mask):
        self.weight.data *= mask


class InheritedMask(OwnMask):
    pass


class MaskedByItsOwnMethod(Around):
    def __init__(self):
        super().__init__()
        self.conv = InheritedMask(4, 8, 3)

    def forward(self, x):
        self.conv.drop(self.mask)
        return self.conv(x)


def masked_by_a_patch():
    model = Around()
    model.forward = types.MethodType(MaskedAround.forward, model)
    return model


WAYS = {
    "in place": masked_in_place,
    "in place by an operator": masked_in_place_by_an_operator,
    "by operators": masked_by_operators,
    "by an overload": lambda m, x: torch.ops.aten.conv2d.default(x, m.conv.weight * m.mask),
    "decorated": masked_decorated,
    "among parameters": masked_among_parameters,
    "by name": lambda m, x: F.conv2d(x, getattr(m.conv, "weight") * m.mask),  # noqa: B009
    "elsewhere": lambda m, x: elsewhere.masked(m.conv, x, m.mask),
    "by an attribute": lambda m, x: m.masked(m.conv, x, m.mask),
    "by a static method": lambda m, x: elsewhere.Static.masked(m.conv, x, m.mask),
}
MASKED = [MaskedAround, MaskedByAMethod, MaskedPartly, MaskedByAProperty, MaskedAbove, MaskedByABase]
MASKED += [MaskedByItsOwnMethod, masked_by_a_patch, hooked_around]
MASKED = {build.__name__: build for build in MASKED} | {name: partial(Masking, way) for name, way in WAYS.items()}


@pytest.mark.parametrize("build", MASKED.values(), ids=MASKED.keys())
def test_a_module_around_a_convolution_may_mask_its_weight(build):
    model = build()
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    before = conv.weight.detach().clone()
    ci.measure(model)
    assert torch.equal(conv.weight, before)
    report = ci.initialize_(model, settings=SETTINGS)
    assert report.layers[0].reason.startswith("within its mask, ")
    model(torch.zeros(1, 4, 3, 3))
    assert report.layers[0].after["normalized_similarity"] == similarity_of(conv.weight * getattr(model, "mask", 1))
    with pytest.raises(ci.InputError, match="the module around it uses another weight"):
        ci.ConvolutionalSimilarity(model)


class InTime(nn.Conv2d):
    """Takes samples of several times, ``[T, N, C, H, W]``, as layers of spiking networks do."""

    def forward(self, x):
        times, samples, *_ = x.shape
        if x.dim() != 5:
            raise ValueError(f"expected x with shape [T, N, C, H, W], but got {x.shape}")
        return F.conv2d(x.flatten(0, 1), self.weight * 2).unflatten(0, (times, samples))


class InTimeAround(Around):
    def forward(self, x):
        times, samples, *_ = x.shape
        if x.dim() != 5:
            raise ValueError("expected 5 axes")
        return F.conv2d(x.flatten(0, 1), self.conv.weight * 2).unflatten(0, (times, samples))


class OneSignal(nn.Conv1d):
    def forward(self, x):
        channels, length = x.shape
        return F.conv1d(x.view(1, channels, length), self.weight * 2)


@pytest.mark.parametrize("build", [lambda: InTime(4, 8, 3), InTimeAround, lambda: OneSignal(4, 8, 5)])
def test_a_forward_pass_may_take_more_axes_or_fewer(build):
    model = build()
    (layer,) = ci.initialize_(model, settings=SETTINGS).layers
    assert (layer.outcome, layer.reason) == (ci.Outcome.INITIALIZED, None)
    assert layer.after["similarity"] == similarity_of(2 * next(model.parameters()), normalized=False)


class Signed(Around):
    """A network of kernels that are not negative."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return F.conv2d(x, self.function(self.conv.weight))


@pytest.mark.parametrize(
    "function", [torch.abs, torch.relu, lambda w: w * (w.abs() > 0.1)], ids=["absolute", "ReLU", "large ones"]
)
def test_what_depends_on_the_weights_own_values_is_no_mask(function):
    model = Signed(function)
    before = function(model.conv.weight.detach()).clone()
    (layer,) = ci.initialize_(model, settings=SETTINGS).layers
    now = function(model.conv.weight.detach())
    if layer.after:
        assert "its class keeps a weight that differs" in layer.reason
        assert layer.after["normalized_similarity"] == similarity_of(now)
        assert ci.convolutional_similarity(now, normalized=True) < ci.convolutional_similarity(before, normalized=True)
    else:
        assert "is no better" in layer.reason
        assert torch.equal(now, before)


class TiedDecoder(Around):
    """Uses its weight transposed, too."""

    def forward(self, x):
        return F.conv_transpose2d(F.conv2d(x, self.conv.weight), self.conv.weight)


class Difference(nn.Conv2d):
    """A second weight of another shape."""

    def forward(self, x):
        return F.conv2d(x, self.weight) - F.conv2d(x, self.weight.sum((2, 3), keepdim=True))


class DifferenceAround(Around):
    def forward(self, x):
        return self.conv(x) - F.conv2d(x, self.conv.weight.sum((2, 3), keepdim=True))


OF_SEVERAL = [*(lambda kind=kind: kind(4, 8, 3) for kind in (Complex, ComplexInput, Recurrent, Difference))]


@pytest.mark.parametrize("build", [*OF_SEVERAL, TiedDecoder, DifferenceAround])
def test_that_a_weight_is_one_of_several_is_told(build):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), build())
    kind, second = type(model[1]).__name__, copy.deepcopy(getattr(model[1], "weight_i", None))
    note = f"one of several weights that {kind} convolves with: the others count for nothing here"
    for report in (ci.measure(model), ci.initialize_(model, settings=SETTINGS)):
        assert [layer.reason for layer in report.layers] == [None, note]
    assert second is None or torch.equal(model[1].weight_i, second)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(4, 8, 3) for _ in range(3))

    def forward(self, x):
        return F.conv2d(x, sum(branch.weight for branch in self.branches))


def test_weights_of_other_shapes_in_one_module_are_layers_of_their_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3)

        def forward(self, x):
            return F.conv2d(F.conv2d(x, self.a.weight / 2, padding=1), self.b.weight / 2)

    assert [layer.outcome for layer in ci.initialize_(Scaled(), settings=SETTINGS).layers] == 2 * [
        ci.Outcome.INITIALIZED
    ]


def test_a_part_that_convolves_with_a_buffer_says_nothing_of_what_is_around_it():
    class Blurred(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.blur, self.fc = nn.Conv2d(4, 4, 3), Blur(), nn.Linear(4, 2)
            self.draw = lambda module: nn.init.zeros_(module.weight)  # not called by the forward pass

        def forward(self, x):
            return self.fc(self.blur(self.conv(x)).mean((2, 3)).to(self.fc.weight.dtype))

    assert ci.initialize_(Blurred(), settings=SETTINGS).remarks == []


def test_of_weights_that_are_summed_one_is_treated():
    model = Branches()
    report = ci.initialize_(model, settings=SETTINGS)
    first, *others = report.layers
    assert first.after["normalized_similarity"] == similarity_of(sum(branch.weight for branch in model.branches))
    assert [layer.reason for layer in others] == 2 * ["used together with branches.0, as one weight"]


def test_copies_among_the_buffers_that_part_are_told():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    model.register_buffer("average", model[0].weight.detach().clone())
    model.register_buffer("other", torch.randn(8, 4, 3, 3))
    assert ci.initialize_(model, settings=SETTINGS).remarks == [
        "copies that are no longer equal to what they were copied from: average (of 0): copy them again"
    ]


class Shadow:
    def __init__(self, model):
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_copies_of_other_dtypes_and_in_attributes_that_part_are_told():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, bias=False))
    weight = model[0].weight.detach()
    model.average = nn.ParameterList([nn.Parameter(p.detach().clone(), False) for p in model[0].parameters()])
    model.low, model.shadow = copy.deepcopy(model[0]).half().requires_grad_(False), Shadow(model[1])
    model.register_buffer("high", weight.double())
    model.kernels = [weight.clone(), torch.randn_like(weight)]
    model.same, model.ones = model[0].weight, torch.ones(8, 4, 3, 3, dtype=torch.bool)
    (remark,) = ci.initialize_(model, settings=SETTINGS).remarks
    names = ("low (of 0)", "average.0 (of 0)", "high (of 0)", "shadow (of 1)", "kernels (of 0)")
    assert remark == (f"copies that are no longer equal to what they were copied from: {some(names)}: copy them again")


def test_spectral_weights_are_told_by_their_numbers_if_not_by_their_name():
    spectral = nn.ParameterList([nn.Parameter(torch.randn(4, 4, 3, 2, dtype=torch.complex64))])
    (remark,) = ci.measure(nn.ModuleList([nn.Conv2d(4, 4, 1), spectral])).remarks
    assert remark == "not looked at, though they may convolve: 1 ParameterList, with 83% of the parameters"


MOVES = {
    "flipped": lambda m, x: m.weight.flip(-1, -2),
    "permuted": lambda m, x: m.weight.permute(1, 0, 3, 2),
    "rolled": lambda m, x: m.weight.roll((1, 1), (0, 3)),
    "scaled": lambda m, x: 3 * m.weight.flip(-1) + 0.1,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_entries_that_a_class_moves_are_moved_back(move):
    module = Using(move, 8, 8, 3)
    (before,) = given(module, torch.zeros(1, 8, 3, 3))
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    (after,) = given(module, torch.zeros(1, 8, 3, 3))
    assert (layer.outcome, layer.reason) == (ci.Outcome.INITIALIZED, None)
    assert layer.after["normalized_similarity"] == similarity_of(after)
    torch.testing.assert_close(norms(after), norms(before), rtol=1e-5, atol=0)


class Counted(torch.autograd.Function):
    """A flip that counts in a buffer and draws random numbers when its derivative is computed."""

    @staticmethod
    def forward(ctx, weight, count):
        ctx.count = count
        return weight.flip(-1)

    @staticmethod
    def backward(ctx, grad):
        ctx.count.add_(1)
        torch.rand(1)
        return grad.flip(-1), None


def test_derivatives_by_which_entries_are_moved_back_leave_no_trace():
    module, seen = Using(lambda m, x: Counted.apply(m.weight, m.count), 8, 8, 3), []
    module.register_buffer("count", torch.zeros(1))
    module.weight.register_hook(seen.append)
    state = torch.get_rng_state()
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert (layer.outcome, module.count.item(), seen) == (ci.Outcome.INITIALIZED, 0, [])
    torch.testing.assert_close(torch.get_rng_state(), state)
    module(torch.zeros(1, 8, 3, 3)).sum().backward()
    assert len(seen) == 1


def test_entries_that_cannot_be_moved_back_exactly_are_not_moved():
    reports = []
    for slopes in (torch.ones(8), torch.linspace(1, 2, 8)):
        torch.manual_seed(0)
        module = Using(lambda m, x, slopes=slopes: m.weight.flip(0) * slopes.view(8, 1, 1, 1), 8, 8, 3)
        reports += ci.initialize_(module, settings=SETTINGS).layers
    assert [layer.outcome for layer in reports] == [ci.Outcome.INITIALIZED, ci.Outcome.APPROXIMATED]
    # The weight itself is stored, whose normalized similarity neither the order of filters nor their slopes change.
    exact, slanted = (layer.after["normalized_similarity"] for layer in reports)
    assert slanted == pytest.approx(exact, rel=1e-4)


def test_layers_of_one_shape_are_not_compared_with_each_other(monkeypatch):
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(30)))
    model.average = copy.deepcopy(model[29]).to(torch.float8_e5m2).requires_grad_(False)
    compared, compare = [], copies._same
    monkeypatch.setattr(copies, "_same", lambda *pair: (compared.append(pair), compare(*pair))[1])
    (remark,) = ci.initialize_(model, settings=SETTINGS).remarks
    assert "average (of 29)" in remark
    assert len(compared) < 30


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_hook_left_on_a_module_is_no_copy(norm):
    model = nn.Sequential(norm(nn.Conv2d(4, 8, 3)))
    model[0].weight.data.copy_(getattr(model[0], "weight_v" if norm is torch.nn.utils.weight_norm else "weight_orig"))
    assert ci.initialize_(model, settings=SETTINGS).remarks == []


def test_norms_that_are_too_small_for_a_dtype_are_told_as_such():
    model = nn.Sequential(nn.Conv2d(64, 32, 3))
    model[0].weight.data.mul_(1e-5)
    (layer,) = ci.initialize_(model.half(), settings=SETTINGS).layers
    assert layer.outcome is ci.Outcome.APPROXIMATED
    assert layer.reason.startswith("the range of torch.float16 changes the norms of filters by up to ")


def test_a_model_may_group_its_parameters_for_an_optimizer():
    class Grouped(Around):
        def parameters(self, rate=0.1):
            return [{"params": list(super().parameters()), "lr": rate}]

    model = nn.Sequential(Grouped())
    model[0].kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    (layer,) = ci.initialize_(model, settings=SETTINGS).layers
    assert layer.after


class Modulated(Around):
    def convolve(self, x):
        return F.conv2d(x, self.conv.weight * self.mask * x.mean())

    def head(self, x):
        return x


class Plain(Modulated):
    def convolve(self, x):
        return self.conv(x)

    def forward(self, x):
        return super().head(self.convolve(x))


def test_what_a_subclass_replaces_is_not_read():
    (layer,) = ci.initialize_(Plain(), settings=SETTINGS).layers
    assert (layer.outcome, layer.reason) == (
        ci.Outcome.INITIALIZED,
        ci.initialize_(nn.Conv2d(4, 8, 3)).layers[0].reason,
    )


class MaskedFurtherOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Around()

    def forward(self, x):
        return F.conv2d(x, self.body.conv.weight * self.body.mask)


class MaskedListFurtherOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 8, 3))])

    def forward(self, x):
        return F.conv2d(x, self.body[0][0].weight * 2)


class MaskedSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.mask = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), 0.5

    def forward(self, x):
        for layer in self.body:
            x = F.conv2d(x, layer.weight * self.mask)
        return x


class MaskedInALoop(MaskedFurtherOut):
    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data *= self.body.mask
        return self.body.conv(x)


class MaskedByAFunctionalCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3))

    def forward(self, x):
        used = {name: parameter * 0.5 for name, parameter in self.body.named_parameters()}
        return torch.func.functional_call(self.body, used, (x,))


class MaskedByAFunctionalCallOfAMasked(MaskedByAFunctionalCall):
    def __init__(self):
        super().__init__()
        self.body = MaskedAround()


FURTHER_OUT = [
    *(MaskedFurtherOut, MaskedListFurtherOut, MaskedSequence, MaskedInALoop, MaskedByAFunctionalCall),
    MaskedByAFunctionalCallOfAMasked,
]


@pytest.mark.parametrize("build", FURTHER_OUT)
def test_a_forward_pass_further_out_that_may_use_another_weight_is_told(build):
    report = ci.measure(nn.Sequential(build()))
    assert report.remarks == ["not tried, though they may use other weights: the forward passes of 0"]


class Cast(Around):
    def forward(self, x):
        return self.conv(x.to(self.conv.weight.dtype))


class Headed(Around):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)

    def forward(self, inputs):
        x = self.conv(inputs["x"].to(self.conv.weight.dtype))
        return F.linear(x.mean((2, 3)), self.head.weight)


class HeadedFurtherOut(Headed):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten())

    def forward(self, x):
        return F.linear(self.conv(x), self.head.weight)


@pytest.mark.parametrize("kind", [Cast, Headed, HeadedFurtherOut])
def test_to_ask_for_a_dtype_or_to_read_another_modules_weight_changes_nothing(kind):
    model = kind()
    report = ci.initialize_(model, settings=SETTINGS)
    assert [(layer.outcome, layer.reason) for layer in report.layers] == [(ci.Outcome.INITIALIZED, None)]
    assert report.remarks == []
    assert len(ci.ConvolutionalSimilarity(model).layers) == 1


def test_a_hook_on_every_module_counts_and_one_further_out_is_told():
    model, mask = nn.Sequential(nn.Sequential(nn.Conv2d(4, 8, 3))), torch.rand(8, 4, 3, 3) < 0.5
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda m, _: (m.weight.data.mul_(mask), None)[1] if isinstance(m, nn.Conv2d) else None
    )
    try:
        report = ci.measure(model)
    finally:
        handle.remove()
    assert report.layers[0].before["normalized_similarity"] == similarity_of(model[0][0].weight * mask)
    assert report.remarks == []
    model.register_forward_pre_hook(lambda *_: None)
    assert ci.measure(model).remarks == []
    model.register_forward_pre_hook(lambda m, _: (m[0][0].weight.data.mul_(mask), None)[1])
    remark = "not tried, though they may change weights of others or later: hooks of (the model itself)"
    assert ci.measure(model).remarks == [remark]


def test_a_home_made_convolution_may_be_masked_normalized_frozen_and_changed_by_its_forward_pass():
    class Masked(Scaled):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            self.weight.data *= self.mask
            return super().forward(x)

    masked = Masked(4, 8, 3)
    masked.register_buffer("mask", (torch.rand(8, 4, 3, 3) < 0.5).float())
    normed, frozen = parametrizations.weight_norm(Scaled(8, 8, 3)), Scaled(8, 8, 3).requires_grad_(False)
    report = ci.initialize_(nn.Sequential(masked, normed, frozen), settings=SETTINGS)
    assert [layer.outcome.value for layer in report.layers] == ["initialized", "initialized", "skipped"]
    assert report.layers[0].reason.startswith("within its mask, ")
    assert report.layers[2].reason == "frozen: requires_grad is False"
    assert not hasattr(masked, "calls")


def test_trials_of_several_threads_do_not_disturb_each_other():
    import time

    class Slow(nn.Conv2d):
        def __init__(self):
            super().__init__(8, 8, 3, padding=1)
            self.small = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x) + self.small(x)

    model = nn.Sequential(*(Slow() for _ in range(3)))
    before = [module.small.weight.detach().clone() for module in model]
    report = ci.initialize_(model, settings=SETTINGS)
    assert {layer.outcome for layer in report.layers} == {ci.Outcome.INITIALIZED}
    for module, old in zip(model, before, strict=True):
        assert not torch.equal(module.small.weight, old)
        assert module.small.training


class Mixing(Around):
    """Mixes its filters by an orthogonal matrix, with a forward pass that no trial input fits."""

    def __init__(self):
        super().__init__()
        self.mix = torch.linalg.qr(torch.randn(8, 8))[0]

    def mixed(self):
        return torch.einsum("ij,jchw->ichw", self.mix, self.conv.weight)

    def forward(self, x, scale):
        return F.conv2d(x, self.mixed()) * scale


class MixingListed(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs, self.mix = nn.ModuleList([nn.Conv2d(4, 8, 3)]), Mixing().mix

    def forward(self, inputs):
        for conv in self.convs:
            inputs["x"] = F.conv2d(inputs["x"], torch.einsum("ij,jchw->ichw", self.mix, conv.weight))
        return inputs


def mixed_by(conv, x, mix):
    return F.conv2d(x, torch.einsum("ij,jchw->ichw", mix, conv.weight))


class MixingByAFunction(Mixing):
    def forward(self, x, scale):
        return mixed_by(self.conv, x, self.mix) * scale


@pytest.mark.parametrize("build", [Mixing, MixingListed, MixingByAFunction])
def test_a_weight_that_another_forward_pass_reads_is_not_known_where_no_trial_can_be_made(build):
    model = build()
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    before = conv.weight.detach().clone()
    (layer,) = ci.initialize_(model, settings=SETTINGS).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert layer.reason.startswith(f"which weight {build.__name__} uses is not known: a trial pass ended with ")
    assert torch.equal(conv.weight, before)


def test_a_modules_own_weight_is_not_that_of_a_convolution_inside_it():
    class Two(Around):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))

        def forward(self, x, scale):
            return self.conv(x) + scale * F.conv2d(x, self.weight)

    report = ci.initialize_(Two(), settings=SETTINGS)
    assert report.layers[0].outcome is ci.Outcome.INITIALIZED
    assert report.remarks == ["not looked at, though they may convolve: 1 Two, with 49% of the parameters"]


def test_a_convolution_with_another_weight_beside_one_that_is_a_module_is_told():
    class Kernel(Around):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 4, 3, 3))

        def forward(self, x):
            return self.conv(x) + F.conv2d(x, self.kernel)

    class Hyper(Around):
        def __init__(self):
            super().__init__()
            self.code, self.make = nn.Parameter(torch.randn(4)), nn.Linear(4, 8 * 4 * 9)

        def forward(self, x):
            return self.conv(x) + F.conv2d(x, self.make(self.code).view(8, 4, 3, 3))

    for build, share in ((Kernel, 49), (Hyper, 66)):
        (remark,) = ci.measure(build()).remarks
        assert remark == f"not looked at, though they may convolve: 1 {build.__name__}, with {share}% of the parameters"

    class Linear(nn.Linear):
        def forward(self, x):
            return F.conv2d(x, self.weight.view(8, 4, 3, 3))

    (remark,) = ci.measure(nn.Sequential(Linear(36, 8), nn.Conv2d(8, 4, 3))).remarks
    assert remark == "not looked at, though they may convolve: 1 Linear, with 49% of the parameters"
    with pytest.raises(ci.InputError, match="has none that is known: the code of Alone seems to call some"):
        ci.measure(type("Alone", (nn.Module,), {"forward": lambda self, x: F.conv2d(x, torch.ones(1, 1, 3, 3))})())


def test_spectral_norm_estimates_the_norm_of_the_new_weight():
    model = parametrizations.spectral_norm(nn.Conv2d(16, 32, 3)).train()
    generator = torch.get_rng_state()
    (layer,) = ci.initialize_(model, settings=SETTINGS).layers
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(part.training for part in model.modules())
    assert torch.linalg.matrix_norm(model.eval().weight.detach().flatten(1), 2) == pytest.approx(1, rel=0.1)
    assert layer.after["norm_ratio"] < 2


def test_a_loss_that_falls_with_the_norms_alone_is_no_gain():
    module = Using(lambda m, x: m.weight.sign() * m.weight.abs().mean((1, 2, 3), keepdim=True), 16, 32, 3)
    before = module.weight.detach().clone()
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert (layer.outcome, torch.equal(module.weight, before)) == (ci.Outcome.SKIPPED, True)
    assert layer.reason.endswith("and is no better")


@pytest.mark.parametrize("frozen", ["original0", "original1"])
def test_a_weight_that_is_frozen_in_part_is_left_alone(frozen):
    module = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    getattr(module.parametrizations.weight, frozen).requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert (layer.outcome, layer.reason) == (
        ci.Outcome.SKIPPED,
        "frozen: requires_grad of a part of its weight is False",
    )
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(("factor", "what"), [(1, "ParametrizedConv2d uses"), (2, "its parametrization computes")])
def test_a_parametrization_that_is_random_is_left_alone(factor, what):
    class Dropped(nn.Module):
        def forward(self, weight):
            return F.dropout(weight / factor, 0.5)

        def right_inverse(self, weight):
            return weight * factor

    module = nn.Conv2d(3, 8, 3)
    nn.utils.parametrize.register_parametrization(module, "weight", Dropped())
    (layer,) = ci.initialize_(module, settings=SETTINGS).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert layer.reason == f"the weight that {what} is random, in evaluation mode too"


@pytest.mark.parametrize("name", ["stride", "kernel_size", "dilation"])
def test_attributes_of_convolutions_may_be_set_to_one_number(name):
    class Centred(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, 0, self.dilation)

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), Centred(8, 8, 3, padding_mode="reflect"))

    model, same = build(), build()
    for convolution in (model[0], model[2]):
        setattr(convolution, name, getattr(convolution, name)[0])
    report, expected = ci.initialize_(model, settings=SETTINGS), ci.initialize_(same, settings=SETTINGS)
    assert [replace(layer, seconds=0) for layer in report.layers] == [replace(a, seconds=0) for a in expected.layers]
    images = torch.randn(2, 4, 16, 16)
    assert ci.measure_feature_correlation(model, images) == ci.measure_feature_correlation(same, images)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("groups", None, "its groups or strides cannot be read: TypeError"),
        ("groups", 0, "its 0 groups do not divide dimension 0 of its weight, 8"),
        ("groups", -2, "its -2 groups do not divide dimension 0 of its weight, 8"),
        ("stride", None, "its groups or strides cannot be read: TypeError"),
        ("weight", property(lambda self: {}["weight"]), "its weight cannot be read: KeyError: 'weight'"),
    ],
)
def test_attributes_that_cannot_be_read_are_the_trouble_of_one_layer(name, value, reason):
    odd = nn.Conv2d(4, 8, 3)
    odd.__class__ = type("Odd", (nn.Conv2d,), {name: value} if isinstance(value, property) else {})
    vars(odd).update({} if isinstance(value, property) else {name: value})
    model = nn.Sequential(odd, nn.Conv2d(8, 8, 3))
    for layer, other in (ci.measure(model).layers, ci.initialize_(model, settings=SETTINGS).layers):
        assert (layer.outcome, layer.reason[: len(reason)]) == (ci.Outcome.SKIPPED, reason)
        assert other.outcome is not ci.Outcome.SKIPPED


def test_convolutions_of_the_same_name_are_refused_before_anything_is_touched():
    model = nn.Module()
    model.part, model._orig_mod = nn.Conv2d(4, 8, 3), nn.Module()
    model._orig_mod.part = nn.Conv2d(4, 8, 3)
    before = copy.deepcopy(model.state_dict())
    for call in (ci.measure, ci.initialize_, partial(ci.measure_feature_correlation, batch=torch.zeros(1, 4, 5, 5))):
        with pytest.raises(ci.InputError, match="convolutions with different names, got 2 called 'part'"):
            call(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_name_that_is_set_may_have_dots():
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    setattr(model, "scale0.5", nn.Conv2d(8, 8, 3))
    assert [layer.name for layer in ci.measure(model).layers] == ["0", "scale0.5"]


def test_what_is_no_tensor_among_the_parameters_is_the_trouble_of_one_layer():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    model[0]._parameters["weight"] = model[1].weight.detach().numpy()
    layer, other = ci.initialize_(model, settings=SETTINGS).layers
    assert layer.reason == "it has no weight: something else sets it in a forward pass"
    assert other.outcome is ci.Outcome.INITIALIZED


def test_a_weight_that_a_class_computes_is_no_parameter():
    class Doubled(nn.Conv2d):
        def __getattr__(self, name):
            value = super().__getattr__(name)
            return value * 2 if name == "weight" else value

    class OfASpectrum(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.spectrum = nn.Parameter(torch.fft.rfft2(self._parameters.pop("weight").detach()))

        weight = property(lambda self: torch.fft.irfft2(self.spectrum, s=self.kernel_size))

        def register_parameter(self, name, parameter):
            self._parameters[name] = parameter

    for kind in (Doubled, OfASpectrum):
        (layer,) = ci.initialize_(nn.Sequential(kind(3, 8, 3)), settings=SETTINGS).layers
        assert (layer.outcome, layer.reason) == (
            ci.Outcome.SKIPPED,
            "its weight is no parameter: its class computes it",
        )


SHARDED = """
import os, sys, torch, torch.distributed as dist, convsim_init as ci
from torch import nn
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3))
mesh = dist.init_device_mesh("cpu", (1,))
for part in (*model, model):
    fully_shard(part, mesh=mesh)
reasons = {layer.reason for layer in (*ci.measure(model).layers, *ci.initialize_(model).layers)}
model(torch.zeros(1, 4, 9, 9)).sum().backward()
print(reasons, flush=True)
os._exit(0)
"""


def test_a_sharded_model_still_runs_after_it_was_looked_at(tmp_path):
    done = subprocess.run([sys.executable, "-c", SHARDED, tmp_path / "store"], capture_output=True, text=True)
    assert done.stdout == "{'sharded over processes: initialize the model before it is sharded'}\n", done.stderr


FLATTENED = """
import os, sys, torch, torch.distributed as dist, convsim_init as ci
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3))
model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
for report in (ci.measure(model), ci.initialize_(model)):
    print(*dict.fromkeys(f"{layer.outcome.value}, {layer.reason}" for layer in report.layers))
print({type(part.weight).__name__ for part in model.modules() if isinstance(part, nn.Conv2d)}, flush=True)
os._exit(0)
"""


def test_a_model_whose_parameters_were_made_flat_is_measured_and_stays_as_it_is(tmp_path):
    done = subprocess.run([sys.executable, "-c", FLATTENED, tmp_path / "store"], capture_output=True, text=True)
    reason = "its weight is no parameter: something else sets it, as FullyShardedDataParallel does"
    assert done.stdout == f"measured, None\nskipped, {reason}\n{{'Tensor'}}\n", done.stderr


class CentredIn(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")  # as "cuda" would be
    try:
        yield
    finally:
        torch.set_default_device(None)


CONTEXTS = [parametrize.cached, default_device, lambda: torch.device("meta"), torch.inference_mode, torch.no_grad]


@pytest.mark.parametrize("context", CONTEXTS, ids=["cached", "default", "device", "inference", "no_grad"])
def test_contexts_around_change_nothing(context):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.uncalled = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return F.conv2d(x, 2 * self.conv.weight)

    def build():
        torch.manual_seed(0)
        return nn.Sequential(CentredIn(3, 8, 3), parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), Around())

    def used(model):
        reports = ci.initialize_(model, settings=SETTINGS), ci.measure(model)
        with pytest.warns(UserWarning, match="does not call"):
            factors = ci.calibrate_(model, images)
        correlations = ci.measure_feature_correlation(model, images)
        layers = [(layer.reason, layer.before, layer.after) for report in reports for layer in report.layers]
        return layers, factors, correlations, float(ci.ConvolutionalSimilarity(model)().detach())

    images, model = torch.randn(2, 3, 9, 9), build()
    expected = used(build())
    with context():
        model[1].weight  # noqa: B018
        assert used(model) == expected
        assert torch.equal(model[1].weight, model[1].parametrizations.weight())
