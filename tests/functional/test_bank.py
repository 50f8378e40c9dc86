"""Weights as filter banks and back; what may be computed with them."""

import pytest
import torch
import torch.nn.functional as F

from convsim_init.errors import InputError
from convsim_init.functional.bank import (
    bank_weight,
    computing_bank,
    computing_device,
    count_pairs,
    filter_bank,
    filter_norms,
    full_precision,
)

LAYOUTS = {
    "plain": ((6, 3, 3, 2), {}),
    "1d": ((6, 3, 4), {}),
    "groups": ((6, 2, 3, 3), {"groups": 3}),
    "depthwise": ((6, 1, 3, 3), {"groups": 6}),
    "transposed": ((4, 6, 3, 3), {"transposed": True}),
    "transposed groups": ((4, 3, 3, 3), {"transposed": True, "groups": 2}),
}
layouts = pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())


@layouts
@pytest.mark.parametrize("channels", ["matched", "all"])
@pytest.mark.parametrize("memory", ["contiguous", "strided"])
def test_a_bank_becomes_its_weight_again(shape, layout, channels, memory):
    weight = torch.randn(shape)
    weight = weight.transpose(0, -1).contiguous().transpose(0, -1) if memory == "strided" else weight
    bank = filter_bank(weight, channels=channels, **layout)
    assert bank.shape[0] == (1 if channels == "all" else layout.get("groups", 1))
    assert torch.equal(bank_weight(bank, **layout), weight)


@pytest.mark.parametrize(("filters", "groups"), [(6, 1), (3, 2)])
def test_a_filter_of_a_transposed_convolution_is_what_makes_one_feature_map(filters, groups):
    """By the convolution itself: a feature map of an impulse in one channel is that channel's kernel."""
    weight = torch.randn(4, filters, 3, 3)
    bank = filter_bank(weight, groups=groups, transposed=True)
    for group in range(groups):
        for channel in range(bank.shape[2]):
            impulse = torch.zeros(1, 4, 1, 1)
            impulse[0, group * bank.shape[2] + channel] = 1
            maps = F.conv_transpose2d(impulse, weight, groups=groups)[0]  # [out_channels, *kernel_size]
            own = maps.view(groups, -1, *maps.shape[1:])[group]
            torch.testing.assert_close(own, bank[group, :, channel])


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(4, 3, 3, dtype=torch.int32), {}, "a floating dtype, got torch.int32"),
        (torch.zeros(4), {}, r"out_channels, in_channels / groups, \*kernel_size\] without zeros, got \[4\]"),
        (torch.zeros(4, 0, 3), {"transposed": True}, r"in_channels, out_channels / groups"),
        (torch.zeros(4, 3, 3), {"groups": 3}, "groups to divide dimension 0"),
        (torch.zeros(4, 3, 3), {"groups": 0}, "groups to divide dimension 0"),
    ],
)
def test_what_is_no_weight_is_refused(weight, options, message):
    with pytest.raises(InputError, match=message):
        filter_bank(weight, **options)


@pytest.mark.parametrize(("pairs", "number"), [("all", 3 + 1), ("adjacent", 2 + 0)])
def test_pairs_are_counted_within_groups_and_among_active_filters(pairs, number):
    active = torch.tensor([[True, True, True, False], [True, False, True, False]])
    assert count_pairs(active, pairs) == number


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_computations_run_in_float32_or_float64(dtype):
    bank = computing_bank(torch.randn(2, 3, 3, 3).to(dtype).to(memory_format=torch.channels_last))
    assert bank.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bank.is_contiguous()


def test_weights_on_mps_are_computed_with_on_the_cpu():
    """MPS has neither float64 nor eigenvalues; a device without either is not to be found in the tests' machines."""
    assert computing_device(torch.device("mps")) == torch.device("cpu")
    assert computing_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_norms_of_filters_that_are_zero():
    bank = torch.zeros(1, 2, 1, 2)
    bank[0, 0, 0] = torch.tensor([3.0, 4.0])
    assert filter_norms(bank).tolist() == [[5.0, 0.0]]


def test_autocast_of_the_caller_does_not_lower_the_precision():
    a = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(a.device):
        assert (a @ a).dtype == torch.float32
