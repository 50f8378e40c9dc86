"""The definition: value and gradient against direct loops, and the properties the mathematics promises."""

import itertools
import math

import naive
import pytest
import torch
from largest import LargestTensor
from torch._subclasses.fake_tensor import FakeTensorMode

from convsim_init.errors import InputError
from convsim_init.functional.bank import filter_bank
from convsim_init.functional.similarity import convolutional_similarity

CHOICES = list(itertools.product(["all", "adjacent"], ["matched", "all"], [False, True]))

LAYERS = {
    "3x3": ((5, 3, 3, 3), {}),
    "non-square": ((4, 2, 2, 5), {}),
    "1x1": ((5, 4, 1, 1), {}),
    "1d": ((4, 3, 4), {}),
    "3d": ((3, 2, 2, 3, 2), {}),
    "linear-like": ((4, 3), {}),
    "one filter": ((1, 3, 3, 3), {}),
    "two filters": ((2, 1, 3, 3), {}),
    "groups": ((6, 2, 3, 3), {"groups": 3}),
    "depthwise": ((4, 1, 3, 3), {"groups": 4}),
    "transposed": ((3, 5, 3, 2), {"transposed": True}),
    "transposed groups": ((4, 3, 3, 3), {"transposed": True, "groups": 2}),
    "transposed 1d": ((2, 4, 3), {"transposed": True}),
}
layers = pytest.mark.parametrize(("shape", "layout"), LAYERS.values(), ids=LAYERS.keys())
choices = pytest.mark.parametrize(("pairs", "channels", "normalized"), CHOICES)


@layers
@choices
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"])
def test_value_and_gradient_equal_the_definition(shape, layout, pairs, channels, normalized, dtype, tolerance):
    exact = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = exact.detach().to(dtype).requires_grad_()
    options = {"pairs": pairs, "channels": channels, "normalized": normalized, **layout}
    expected = naive.convolutional_similarity(exact, **options)
    actual = convolutional_similarity(weight, **options)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    (gradient,) = torch.autograd.grad(actual, weight)
    assert actual.dtype == dtype
    assert abs(actual.double() - expected) <= tolerance * expected.abs()
    scale = max(expected_gradient.norm(), expected.abs() / exact.norm())  # some gradients are zero by symmetry
    assert (gradient.double() - expected_gradient).norm() <= tolerance * scale


@choices
def test_gradcheck(pairs, channels, normalized):
    weight = torch.randn(4, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def loss(w):
        return convolutional_similarity(w, pairs=pairs, channels=channels, groups=2, normalized=normalized)

    assert torch.autograd.gradcheck(loss, weight)
    assert torch.autograd.gradgradcheck(loss, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@choices
def test_half_precision_accumulates_in_float32(dtype, pairs, channels, normalized):
    weight = (100 * torch.randn(8, 4, 3, 3)).to(dtype)  # raw values overflow float16 and lose all digits of bfloat16
    options = {"pairs": pairs, "channels": channels, "normalized": normalized}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = convolutional_similarity(weight, **options)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, convolutional_similarity(weight.float(), **options))
    exact = convolutional_similarity(weight.double(), **options)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


def test_half_precision_passes_gradients_of_its_own_dtype():
    weight = torch.randn(4, 3, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    convolutional_similarity(weight).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("channels", ["matched", "all"])
def test_permuting_filters_or_channels_changes_nothing(channels):
    weight = torch.randn(7, 5, 3, 3, dtype=torch.float64)
    shuffled = weight[torch.randperm(7)][:, torch.randperm(5)]
    torch.testing.assert_close(
        convolutional_similarity(shuffled, channels=channels), convolutional_similarity(weight, channels=channels)
    )


@choices
def test_scaling(pairs, channels, normalized):
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    options = {"pairs": pairs, "channels": channels, "normalized": normalized}
    ratio = convolutional_similarity(3 * weight, **options) / convolutional_similarity(weight, **options)
    torch.testing.assert_close(ratio.item(), 1.0 if normalized else 81.0)


def test_normalized_ignores_the_scale_and_sign_of_each_filter_and_filters_that_are_zero():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    scales = torch.tensor([1e-3, -2.0, 5.0, -1e3, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    with_zero = torch.cat([scales * weight, torch.zeros(1, 3, 3, 3, dtype=torch.float64)]).requires_grad_()
    actual = convolutional_similarity(with_zero, normalized=True)
    torch.testing.assert_close(actual, convolutional_similarity(weight, normalized=True))
    (gradient,) = torch.autograd.grad(actual, with_zero)
    assert gradient.isfinite().all()


def test_disjoint_channels_are_dissimilar_and_equal_filters_are_not():
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0] = torch.randn(3, 3)
    weight[1, 1] = torch.randn(3, 3)
    assert convolutional_similarity(weight) == 0
    assert convolutional_similarity(weight, channels="all") > 0
    impulses = torch.zeros(2, 1, 3, 3)
    impulses[:, :, 1, 1] = 1
    torch.testing.assert_close(convolutional_similarity(impulses, normalized=True), torch.tensor(1.0))


@pytest.mark.parametrize("kernel_size", [(1,), (4,), (3, 3), (2, 3, 2)])
@pytest.mark.parametrize("channels", ["matched", "all"])
def test_normalized_has_the_range_and_the_mean_of_its_documentation(channels, kernel_size):
    weight = torch.randn(512, 4, *kernel_size)
    expected = 1 / 4 if channels == "matched" else 1.0
    similarity = convolutional_similarity(weight, channels=channels, normalized=True)
    assert similarity.item() == pytest.approx(expected, rel=0.02)
    taps, alike = math.prod(kernel_size), torch.ones(2, 1, *kernel_size)
    similarity = convolutional_similarity(alike, channels=channels, normalized=True).item()
    assert 1 < similarity < taps or similarity == pytest.approx(taps) == 1


def test_memory_does_not_grow_with_the_square_of_the_filters():
    weight = torch.randn(4096, 2, 3, 3)
    with LargestTensor() as largest:
        for pairs, channels in itertools.product(["all", "adjacent"], ["matched", "all"]):
            convolutional_similarity(weight, pairs=pairs, channels=channels, normalized=True)
    assert largest.values <= 25 * 2 * 4096


@pytest.mark.filterwarnings("error:.*cache")
def test_it_can_be_compiled_for_several_sizes():
    compiled = torch.compile(convolutional_similarity, backend="aot_eager", fullgraph=True)
    for shape in [(8, 3, 3, 3), (8, 3, 5, 5), (8, 3, 7, 5), (6, 2, 9)]:
        weight = torch.randn(shape)
        torch.testing.assert_close(compiled(weight), convolutional_similarity(weight))


def test_what_stands_for_tensors_leaves_nothing_behind():
    shape = (3, 2, 5, 11)  # a size that nothing else here has
    with FakeTensorMode():
        assert convolutional_similarity(torch.randn(shape)).shape == ()
    weight = torch.randn(shape)
    torch.testing.assert_close(
        convolutional_similarity(weight), naive.convolutional_similarity(weight), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("normalized", [False, True])
def test_a_weight_without_data_has_a_similarity_without_data(normalized):
    found = convolutional_similarity(torch.empty(4, 3, 3, 3, device="meta"), normalized=normalized)
    assert (found.device.type, found.shape) == ("meta", ())


def test_a_bank_shares_memory_with_its_weight():
    weight = torch.zeros(4, 3, 2, 2)
    filter_bank(weight, groups=2).add_(1)
    assert weight.eq(1).all()


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(3, 2, 3, 3), {"pairs": "every"}, "expected pairs to be one of all, adjacent, got 'every'"),
        (torch.ones(3, 2, 3, 3), {"channels": 1}, "expected channels to be one of matched, all, got 1"),
        (torch.ones(3, 2, 3, 3, dtype=torch.int32), {}, "floating dtype, got torch.int32"),
        (torch.ones(3, 2, 3, 3, dtype=torch.complex64), {}, "floating dtype, got torch.complex64"),
        (torch.ones(3), {}, r"got \[3\]"),
        (torch.ones(3, 0, 3, 3), {}, r"got \[3, 0, 3, 3\]"),
        (torch.ones(4, 2, 3, 3), {"groups": 3}, "groups to divide dimension 0"),
        (torch.ones(4, 2, 3, 3), {"groups": 0}, "groups to divide dimension 0"),
    ],
)
def test_bad_input(weight, options, message):
    with pytest.raises(InputError, match=message):
        convolutional_similarity(weight, **options)
