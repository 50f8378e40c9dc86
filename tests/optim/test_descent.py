"""The loop: what it computes against the definition, what it promises, and how it ends."""

import itertools
import math
from dataclasses import replace

import naive
import pytest
import torch

from convsim_init.backends import compiled
from convsim_init.backends.compiled import CompiledBlock
from convsim_init.backends.torch_ops import TorchBlock
from convsim_init.functional.bank import bank_weight, filter_bank, filter_norms, per_filter
from convsim_init.functional.similarity import convolutional_similarity
from convsim_init.optim.conjugate_gradient import ConjugateGradient
from convsim_init.optim.descent import Stop, descend
from convsim_init.parallel.threads import Team
from convsim_init.settings import Settings

COUPLINGS = list(itertools.product(["all", "adjacent"], ["matched", "all"]))
couplings = pytest.mark.parametrize(("pairs", "channels"), COUPLINGS)

LAYERS = {
    "3x3": ((6, 5, 3, 3), {}),
    "non-square": ((5, 3, 2, 5), {}),
    "even": ((5, 3, 2, 2), {}),
    "1x1": ((6, 4, 1, 1), {}),
    "1d": ((4, 3, 4), {}),
    "3d": ((3, 2, 2, 3, 2), {}),
    "groups": ((8, 2, 3, 3), {"groups": 4}),
    "transposed groups": ((6, 3, 3, 2), {"transposed": True, "groups": 2}),
}
layers = pytest.mark.parametrize(("shape", "layout"), LAYERS.values(), ids=LAYERS.keys())


@pytest.fixture(params=[1, 90, 400, 10**9], ids=lambda n: f"blocks of {n}")
def block_size(request, monkeypatch):
    for kind in (CompiledBlock, TorchBlock):
        monkeypatch.setattr(kind, "max_weights", request.param)


def unit(bank):
    return bank / bank.flatten(2).norm(dim=-1)[(...,) + (None,) * (bank.dim() - 2)]


@layers
@couplings
@pytest.mark.usefixtures("block_size")
def test_it_evaluates_the_definition_and_its_gradient(shape, layout, pairs, channels):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = naive.convolutional_similarity(weight, pairs=pairs, channels=channels, **layout)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    bank = filter_bank(weight.detach(), channels=channels, **layout)
    scale = torch.rand(bank.shape[:2], dtype=torch.float64) + 0.5
    scaled, settings = bank * per_filter(scale, bank), Settings(pairs=pairs, channels=channels, norm="free")

    torch.testing.assert_close(ConjugateGradient(scaled, scale, settings, Team(1)).into_bank(), bank)
    state = ConjugateGradient(scaled, scale, settings, Team(1))
    torch.testing.assert_close(state.retract(0), expected.item(), rtol=1e-10, atol=0)
    state.next_direction()  # the first direction is the negative gradient
    state.retract(1.0)
    stepped = bank_weight(state.into_bank(), **layout)
    torch.testing.assert_close(stepped, weight.detach() - expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["preserve", "free"])
@pytest.mark.parametrize("kernel_size", [(3, 3), (7, 7), (1, 5), (2, 2), (4, 3), (5,), (3, 3, 3)])
def test_a_step_ends_near_the_lowest_loss_along_its_direction(kernel_size, norm):
    bank = unit(filter_bank(torch.randn(12, 8, *kernel_size, dtype=torch.float64)))
    state = ConjugateGradient(bank, torch.ones(bank.shape[:2]), Settings(norm=norm), Team(1))
    reached = state.retract(0)
    for _ in range(3):
        step = state.next_direction()
        assert step > 0
        losses = {factor: state.retract(factor * step) for factor in (0.5, 0.8, 1.25, 2.0, 1.0)}
        assert reached - losses[1.0] > 0.4 * (reached - min(losses.values()))
        reached = losses[1.0]
    if norm == "preserve":
        torch.testing.assert_close(filter_norms(state.into_bank()), torch.ones(1, 12, dtype=torch.float64))


@couplings
def test_the_line_search_is_exact_where_norms_are_free_and_the_coarse_lattice_is_the_full_one(pairs, channels):
    bank = filter_bank(torch.randn(6, 4, 2, 2, dtype=torch.float64), channels=channels)
    state = ConjugateGradient(
        bank, torch.ones(bank.shape[:2]), Settings(pairs=pairs, channels=channels, norm="free"), Team(1)
    )
    state.retract(0)
    step = state.next_direction()
    losses = {factor: state.retract(factor * step) for factor in (0.99, 1.0, 1.01)}
    assert losses[1.0] < min(losses[0.99], losses[1.01])


@layers
@couplings
@pytest.mark.parametrize("norm", ["preserve", "free"])
@pytest.mark.parametrize("optimizer", ["conjugate_gradient", "adam"])
def test_a_descent_lowers_the_loss_it_reports(shape, layout, pairs, channels, norm, optimizer):
    weight = torch.randn(shape, dtype=torch.float64)
    bank = filter_bank(weight, channels=channels, **layout)
    settings = Settings(pairs=pairs, channels=channels, norm=norm, optimizer=optimizer, steps=8, tolerance=0)
    descent = descend(bank, settings)
    on_unit_filters = norm == "preserve" and optimizer == "conjugate_gradient"
    options = {"pairs": pairs, "channels": channels, "normalized": on_unit_filters, **layout}
    torch.testing.assert_close(descent.losses[0], naive.convolutional_similarity(weight, **options).item())
    lowered = naive.convolutional_similarity(bank_weight(descent.bank, **layout), **options).item()
    torch.testing.assert_close(min(descent.losses), lowered)
    if optimizer == "conjugate_gradient":
        assert descent.losses == sorted(descent.losses, reverse=True)
    flat = channels == "all" and norm == "preserve" and math.prod(shape[2:]) == 1  # 1x1: the loss is constant
    assert flat or lowered < descent.losses[0]
    if norm == "preserve":
        torch.testing.assert_close(filter_norms(descent.bank), filter_norms(bank), rtol=1e-12, atol=0)


def test_figures_of_the_default_settings_on_typical_layers():
    for shape, share in (((64, 64, 3, 3), 0.10), ((128, 64, 3, 3), 0.10), ((64, 3, 7, 7), 0.45)):
        weight = torch.nn.init.kaiming_normal_(torch.empty(shape), mode="fan_out")
        bank = filter_bank(weight)
        lowered = descend(bank, Settings()).bank
        before = convolutional_similarity(weight, normalized=True)
        after = convolutional_similarity(bank_weight(lowered), normalized=True)
        assert after <= share * before
        assert (filter_norms(lowered) / filter_norms(bank) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_paper_preset_is_a_plain_loop_with_adam(dtype, groups):
    start = torch.randn(6, 3, 3, 3, dtype=dtype)
    weight = start.clone().requires_grad_()
    adam = torch.optim.Adam([weight], lr=0.002)
    for step in range(1, 13):
        adam.zero_grad()
        naive.convolutional_similarity(weight, pairs="adjacent", groups=groups).backward()
        adam.step()
        descent = descend(filter_bank(start, groups=groups), Settings.paper(steps=step))
        assert descent.steps == step
        torch.testing.assert_close(bank_weight(descent.bank, groups=groups), weight.detach())


def test_adam_keeps_the_best_weights_seen():
    bank = filter_bank(torch.randn(4, 2, 3, 3, dtype=torch.float64))
    descent = descend(bank, Settings(optimizer="adam", norm="free", learning_rate=0.7, steps=5, tolerance=0))
    assert descent.losses[-1] > min(descent.losses), "the case must overshoot, or it shows nothing"
    reached = naive.convolutional_similarity(bank_weight(descent.bank)).item()
    torch.testing.assert_close(reached, min(descent.losses))


def test_adam_that_only_rises_keeps_the_weights_given():
    bank = filter_bank(0.1 * torch.randn(4, 2, 3, 3))
    descent = descend(bank, replace(Settings.paper(steps=1), learning_rate=10.0))
    assert descent.losses[1] > descent.losses[0]
    assert torch.equal(descent.bank, bank)


@layers
@couplings
@pytest.mark.parametrize("norm", ["preserve", "free"])
@pytest.mark.parametrize("optimizer", ["conjugate_gradient", "adam"])
@pytest.mark.usefixtures("block_size")
def test_zeros_outside_a_mask_stay_zero(shape, layout, pairs, channels, norm, optimizer):
    weight = torch.randn(shape, dtype=torch.float64)
    bank = filter_bank(weight, channels=channels, **layout)
    mask = torch.rand(bank.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    masked = bank * mask
    settings = Settings(pairs=pairs, channels=channels, norm=norm, optimizer=optimizer, steps=5, tolerance=0)
    descent = descend(masked, settings, mask=mask)
    assert descent.bank[~mask].eq(0).all()
    flat = channels == "all" and norm == "preserve" and math.prod(shape[2:]) == 1  # 1x1: the loss is constant
    if optimizer == "conjugate_gradient" and not flat:
        assert descent.losses[-1] < descent.losses[0]
    if norm == "preserve":
        torch.testing.assert_close(filter_norms(descent.bank), filter_norms(masked), rtol=1e-12, atol=0)


def test_within_a_mask_it_takes_the_steps_of_a_smaller_kernel():
    small = torch.randn(1, 12, 8, 2, 3, dtype=torch.float64)
    large, mask = torch.zeros(1, 12, 8, 3, 5, dtype=torch.float64), torch.zeros(1, 12, 8, 3, 5, dtype=torch.bool)
    large[..., 1:, 1:4], mask[..., 1:, 1:4] = small, True
    settings = Settings(steps=6, tolerance=0, norm="free")
    expected = descend(small, settings)
    assert descend(large, settings, mask=mask).losses[:2] == pytest.approx(expected.losses[:2], rel=0.02)
    adam = replace(settings, optimizer="adam")
    torch.testing.assert_close(descend(large, adam, mask=mask).bank[..., 1:, 1:4], descend(small, adam).bank)


@pytest.mark.parametrize("optimizer", ["conjugate_gradient", "adam"])
def test_zero_filters_stay_zero_and_do_not_matter(optimizer):
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    with_zeros = torch.cat([torch.zeros(1, 3, 3, 3), weight, torch.zeros(2, 3, 3, 3)]).double()
    settings = Settings(optimizer=optimizer, steps=5)
    alone, among = descend(filter_bank(weight), settings), descend(filter_bank(with_zeros), settings)
    assert among.bank[0, [0, 6, 7]].eq(0).all()
    torch.testing.assert_close(among.bank[:, 1:6], alone.bank)
    torch.testing.assert_close(among.losses, alone.losses)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_scale_does_not_matter(scale):
    bank = filter_bank(torch.randn(6, 4, 3, 3))
    small = descend(bank, Settings(steps=6))
    scaled = descend(bank * scale, Settings(steps=6))
    assert scaled.stop is Stop.STEPS
    torch.testing.assert_close(scaled.bank / scale, small.bank, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(filter_norms(scaled.bank), filter_norms(bank * scale), rtol=1e-6, atol=0)


def test_filters_of_very_different_norms_count_alike():
    bank = filter_bank(torch.randn(8, 4, 3, 3))
    norms = torch.logspace(-12, 12, 8).reshape(1, 8, 1, 1, 1)
    plain, stretched = descend(bank, Settings(steps=10)), descend(bank * norms, Settings(steps=10))
    torch.testing.assert_close(stretched.losses, plain.losses, rtol=1e-3, atol=0)


def test_permuted_filters_give_permuted_results():
    bank = filter_bank(torch.randn(9, 4, 3, 3, dtype=torch.float64))
    order = torch.randperm(9)
    plain, permuted = descend(bank, Settings(steps=5)), descend(bank[:, order], Settings(steps=5))
    torch.testing.assert_close(permuted.bank, plain.bank[:, order])


def test_groups_are_independent_layers_that_share_their_steps():
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    together = descend(filter_bank(torch.cat([weight, weight]), groups=2), Settings(steps=5))
    alone = descend(filter_bank(weight), Settings(steps=5))
    torch.testing.assert_close(together.bank[0], together.bank[1])
    torch.testing.assert_close(together.bank[:1], alone.bank)


@pytest.mark.usefixtures("block_size")
def test_the_number_of_threads_does_not_matter():
    bank = filter_bank(torch.randn(12, 8, 3, 3))
    found = []
    for threads in (1, 2, 3):
        with Team(threads) as team:
            found.append(descend(bank, Settings(steps=5), team=team))
    for other in found[1:]:
        assert torch.equal(other.bank, found[0].bank)
        assert other.losses == found[0].losses


def test_the_same_bank_gives_the_same_bits_and_is_left_as_it_was():
    bank = filter_bank(torch.randn(16, 8, 3, 3))
    given = bank.clone()
    first, second = descend(bank, Settings()), descend(bank, Settings())
    assert torch.equal(first.bank, second.bank)
    assert first.losses == second.losses
    assert torch.equal(bank, given)


def test_it_stops_where_steps_gain_too_little():
    bank = filter_bank(torch.randn(32, 16, 1, 1, dtype=torch.float64))
    descent = descend(bank, Settings(steps=1000))
    assert descent.stop is Stop.CONVERGED
    assert descent.steps < 200
    patient = descend(bank, Settings(steps=descent.steps + 5, tolerance=1e-9))
    assert patient.steps > descent.steps


@pytest.mark.parametrize("optimizer", ["conjugate_gradient", "adam"])
def test_without_tolerance_it_takes_every_step_that_lowers_the_loss(optimizer):
    bank = filter_bank(torch.randn(8, 4, 3, 3, dtype=torch.float64))
    descent = descend(bank, Settings(steps=60, tolerance=0, optimizer=optimizer))
    assert (descent.steps, descent.stop) == (60, Stop.STEPS)


def test_dissimilar_filters_are_left_alone():
    bank = torch.zeros(1, 3, 3, 3, 3)
    for i in range(3):
        bank[0, i, i] = torch.randn(3, 3)
    descent = descend(bank, Settings())
    assert descent.losses == [0.0]
    assert descent.stop is Stop.CONVERGED
    torch.testing.assert_close(descent.bank, bank)


@pytest.mark.parametrize("optimizer", ["conjugate_gradient", "adam"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_come_back_as_they_were(optimizer, value):
    bank = filter_bank(torch.randn(4, 2, 3, 3))
    bank[0, 1, 0, 0, 0] = value
    descent = descend(bank, Settings(optimizer=optimizer, steps=3))
    assert descent.stop is Stop.NON_FINITE
    assert descent.bank is bank


def test_a_loss_that_overflows_leaves_the_weights_as_they_were():
    bank = filter_bank(1e12 * torch.randn(4, 2, 3, 3))
    descent = descend(bank, Settings.paper(steps=3))
    assert descent.stop is Stop.NON_FINITE
    assert descent.bank is bank


@pytest.mark.parametrize("switch", ["1", "0"], ids=["compiled", "torch"])
@pytest.mark.parametrize("shape", [(2048, 32, 3, 3), (1024, 256, 3, 3), (1024, 1024, 1, 1)])
def test_rounding_hides_no_step_of_a_wide_layer(shape, switch, monkeypatch):
    monkeypatch.setenv(compiled.SWITCH, switch)
    bank = filter_bank(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    found, exact = (descend(one, Settings(steps=8)).losses for one in (bank, bank.double()))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * exact[0])


@pytest.mark.parametrize("optimizer", ["conjugate_gradient", "adam"])
def test_a_caller_can_end_it(optimizer):
    calls = []

    def on_step():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        descend(filter_bank(torch.randn(8, 4, 3, 3)), Settings(optimizer=optimizer), on_step=on_step)
    assert len(calls) == 3


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (128, 64, 3, 3), (256, 128, 1, 1)])
def test_cuda_agrees_with_the_cpu(shape):
    bank = filter_bank(torch.nn.init.kaiming_normal_(torch.empty(shape)))
    cpu, cuda = descend(bank.double(), Settings()), descend(bank.cuda(), Settings())
    assert cuda.bank.is_cuda
    torch.testing.assert_close(cuda.losses[:10], cpu.losses[:10], rtol=1e-4, atol=0)
