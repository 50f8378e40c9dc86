"""Stacked descents: each layer goes where it goes alone, and the host waits for nothing on the way."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convsim_init as ci
from convsim_init.functional.similarity import bank_similarity, filter_norms
from convsim_init.optim import accelerated
from convsim_init.optim import conjugate_gradient as filters
from convsim_init.optim import stacked as stacked_descent
from convsim_init.optim.descent import Stop, descend
from convsim_init.optim.line_search import first_rise, least_rise
from convsim_init.optim.replay import Replay
from convsim_init.optim.stacked import Stack, descend_stacks
from convsim_init.settings import Settings

SHAPES = {
    "3x3": (1, 12, 6, 3, 3),
    "1x1": (1, 12, 6, 1, 1),
    "7x7": (1, 8, 3, 7, 7),
    "even": (1, 8, 4, 4, 2),
    "non-square": (1, 8, 4, 1, 5),
    "1d": (1, 8, 3, 5),
    "3d": (1, 6, 3, 2, 3, 2),
    "groups": (3, 6, 4, 3, 3),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
SETTINGS = {
    "default": {},
    "adjacent": {"pairs": "adjacent"},
    "all channels": {"channels": "all"},
    "free": {"norm": "free"},
    "all at once": {"pairs": "adjacent", "channels": "all", "norm": "free"},
}
variants = pytest.mark.parametrize("variant", SETTINGS.values(), ids=SETTINGS.keys())


@pytest.fixture(autouse=True)
def _no_coin_is_tossed(monkeypatch):
    """An eighth of a turn, tried where the expansion falls for ever, is just as far as FAR: rounding would decide."""
    for module in (filters, stacked_descent):
        monkeypatch.setattr(module, "FAR", 1.01)


def draw(shape, variant=None, *, layers=3, dtype=torch.float64):
    if (variant or {}).get("channels") == "all":
        shape = (1, *shape[1:])
    return [torch.randn(shape, dtype=dtype) * 3**i for i in range(layers)]


def stacked(banks, settings, **options):
    (found,) = descend_stacks([banks], settings, **options)
    return found


def normalized(bank, settings):
    unit = bank.double() / filter_norms(bank).double()[(...,) + (None,) * (bank.dim() - 2)]
    return float(bank_similarity(unit, settings.pairs, settings.channels))


# The same descent


@shapes
@variants
def test_in_double_precision_each_layer_goes_as_it_goes_alone(shape, variant):
    settings = Settings(steps=12, tolerance=0, **variant)
    banks = draw(shape, variant)
    for bank, found in zip(banks, stacked(banks, settings), strict=True):
        alone = descend(bank, settings)
        torch.testing.assert_close(found.losses[:6], alone.losses[:6], rtol=1e-9, atol=0)
        assert found.losses[-1] == pytest.approx(alone.losses[-1], rel=1e-6)
        assert normalized(found.bank, settings) == pytest.approx(normalized(alone.bank, settings), rel=1e-4)
        if settings.norm == "preserve":
            torch.testing.assert_close(filter_norms(found.bank), filter_norms(bank), rtol=1e-12, atol=0)


@shapes
@variants
def test_in_single_precision_each_layer_goes_the_same_way_at_first(shape, variant):
    settings = Settings(steps=4, tolerance=0, **variant)
    banks = draw(shape, variant, dtype=torch.float32)
    flat = settings.channels == "all" and settings.norm == "preserve" and shape == SHAPES["1x1"]  # constant
    for bank, found in zip(banks, stacked(banks, settings), strict=True):
        alone = descend(bank, settings)
        assert found.bank.dtype == torch.float32
        atol = 1e-6 * alone.losses[0]  # with free norms little more than rounding is left of the loss
        seen = 1 if flat else 4
        torch.testing.assert_close(found.losses[:seen], alone.losses[:seen], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 64, 64, 3, 3), (1, 64, 3, 7, 7), (1, 128, 64, 1, 1)])
def test_layers_of_usual_size_end_alike(shape, dtype):
    settings = Settings()
    banks = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    for bank, found in zip(banks, stacked(banks, settings), strict=True):
        alone = descend(bank, settings)
        # Rounding sends long descents apart: in single precision two of them end close to each other, not equal.
        close = 1e-4 if dtype == torch.float64 else 5e-2
        assert normalized(found.bank, settings) == pytest.approx(normalized(alone.bank, settings), rel=close)


@variants
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(steps, variant):
    settings = Settings(steps=steps, tolerance=0, **variant)
    for found in stacked(draw(SHAPES["3x3"], variant), settings):
        assert (found.steps, found.stop) == (steps, Stop.STEPS)
        assert found.losses == sorted(found.losses, reverse=True)


def test_each_layer_stops_for_itself():
    easy = torch.zeros(1, 4, 4, 3, 3, dtype=torch.float64)
    for i in range(4):
        easy[0, i, i] = torch.randn(3, 3)
    broken = torch.randn_like(easy)
    broken[0, 1, 0, 0, 0] = math.nan
    zeros = torch.randn_like(easy)
    zeros[0, :2] = 0
    lone = torch.zeros_like(easy)
    lone[0, 3] = 1
    banks = [torch.randn_like(easy), easy, broken, zeros, lone, torch.zeros_like(easy)]
    given = [bank.clone() for bank in banks]
    found = stacked(banks, Settings(steps=30))
    for bank, descent in zip(banks, found, strict=True):
        alone = descend(bank, Settings(steps=30))
        assert descent.stop is alone.stop
        assert descent.steps == alone.steps
        torch.testing.assert_close(descent.losses, alone.losses, equal_nan=True, rtol=1e-6, atol=0)
        torch.testing.assert_close(descent.bank, alone.bank, equal_nan=True)
    assert [descent.stop for descent in found[1:3]] == [Stop.CONVERGED, Stop.NON_FINITE]
    assert found[2].bank is banks[2]
    assert found[3].bank[0, :2].eq(0).all()
    for bank, before in zip(banks, given, strict=True):
        torch.testing.assert_close(bank, before, rtol=0, atol=0, equal_nan=True)


def test_neighbours_do_not_matter():
    banks = draw(SHAPES["3x3"])
    together, alone = stacked(banks, Settings(steps=8)), stacked(banks[1:2], Settings(steps=8))
    torch.testing.assert_close(together[1].bank, alone[0].bank)
    torch.testing.assert_close(together[1].losses, alone[0].losses)


def test_several_stacks_side_by_side():
    stacks = [draw(SHAPES["3x3"], layers=2), draw(SHAPES["1x1"], layers=1)]
    for banks, found in zip(stacks, descend_stacks(stacks, Settings(steps=8)), strict=True):
        for one, other in zip(found, stacked(banks, Settings(steps=8)), strict=True):
            assert torch.equal(one.bank, other.bank)
            assert one.losses == other.losses


def test_a_trial_that_is_not_lower_is_shortened(monkeypatch):
    """Steps sixteen times too long must come back by quarters, as they do for one layer alone."""
    module = "convsim_init.optim.stacked.least_rise"
    monkeypatch.setattr(module, lambda *slope, otherwise: 16 * least_rise(*slope, otherwise=otherwise))
    monkeypatch.setattr(filters, "first_rise", lambda *slope, otherwise: 16 * first_rise(*slope, otherwise=otherwise))
    banks = draw(SHAPES["3x3"])
    for bank, found in zip(banks, stacked(banks, Settings(steps=6, tolerance=0)), strict=True):
        alone = descend(bank, Settings(steps=6, tolerance=0))
        torch.testing.assert_close(found.losses, alone.losses, rtol=1e-9, atol=0)


def test_where_no_trial_is_lower_it_comes_back_and_stops(monkeypatch):
    monkeypatch.setattr("convsim_init.optim.stacked.least_rise", lambda *slope, otherwise: otherwise * 1e6)
    (found,) = stacked(bank := draw(SHAPES["3x3"], layers=1), Settings(steps=6))
    assert (found.stop, found.steps) == (Stop.CONVERGED, 0)
    torch.testing.assert_close(found.bank, bank[0], rtol=1e-6, atol=1e-8)


def test_a_caller_can_end_it():
    calls = []

    def on_step():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stacked(draw(SHAPES["3x3"]), Settings(tolerance=0), on_step=on_step)
    assert len(calls) == 3


# The line search


def reference(slope):
    roots = np.roots(slope[::-1])
    rises = roots.real[(np.abs(roots.imag) <= 1e-9 * np.abs(roots)) & (roots.real > 0)]
    return rises.min() if len(rises) else 7.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_line_search_finds_the_least_positive_root(dtype):
    slopes = torch.randn(4, 2000, dtype=torch.float64) * 10.0 ** torch.randint(-1, 2, (4, 2000))
    slopes = slopes.to(dtype)
    found = least_rise(*slopes, otherwise=torch.full((2000,), 7.0, dtype=dtype))
    expected = torch.tensor([reference(s) for s in slopes.double().T.numpy()])
    close = torch.isclose(found.double(), expected, rtol=1e-8 if dtype == torch.float64 else 1e-3)
    assert close.double().mean() >= 0.99  # but for roots that nearly meet
    assert (expected != 7).double().mean() > 0.5
    alone = torch.tensor([first_rise(*s, otherwise=7.0) for s in slopes.double().T.tolist()])
    assert torch.isclose(alone, expected.float(), rtol=1e-6).double().mean() >= 0.99


@pytest.mark.parametrize(
    ("slope", "expected"),
    {
        "cubic": ((-6, 11, -6, 1), 1),
        "quadratic": ((-2, 3, -1, 0), 1),
        "line": ((-2, 4, 0, 0), 0.5),
        "only the cube": ((-8, 0, 0, 1), 2),
        "triple root": ((-8, 12, -6, 1), 2),
        "rises at first": ((1, -1, 0, 0), 1),
        "falls for ever": ((-1, 0, 0, 0), 7),
        "rises nowhere": ((-1, -1, -1, -1), 7),
        "falls, cubic": ((-1, -2, 0, 0), 7),
        "flat": ((0, 0, 0, 0), 7),
        "not a number": ((-1, math.nan, 0, 1), 7),
        "infinite": ((-1, 1, 0, math.inf), 7),
        "tiny": ((-6e-200, 11e-200, -6e-200, 1e-200), 1),
        "nearly flat at the start": ((-1e-9, -1, 0, 1), 1),
        "flat at the start": ((0, -1, 0, 1), 1),
        "beyond all numbers": ((-1, 0, 0, 1e308), 7),
        "hardly curved": ((-1, 1, 0, 1e-30), 1),
        "hardly cubic": ((-1, 1e-30, 0, 1), 1),
    }.values(),
)
def test_the_line_search_of_degenerate_quartics(slope, expected):
    close = 1e-2 if slope == (-8, 12, -6, 1) else 1e-8
    assert first_rise(*slope, otherwise=7.0) == pytest.approx(expected, rel=close)
    slope = torch.tensor(slope, dtype=torch.float64)
    found = least_rise(*slope, otherwise=torch.tensor(7.0, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=close)


# Nothing waits for the device


class NoWaiting(TorchDispatchMode):
    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_to_copy.cpu", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        assert name != "lift_fresh", "a constant made on the host is copied to the device"
        return function(*args, **(kwargs or {}))


@shapes
@variants
def test_no_iteration_waits_for_the_device(shape, variant):
    stack = Stack(draw(shape, variant), Settings(**variant))
    with torch.no_grad(), NoWaiting():
        for _ in range(3):
            stack.iterate()
    assert stack.moving.all()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        stack.moving.all().item()


def test_the_host_looks_rarely(monkeypatch):
    looks, wait = [], Replay.wait
    monkeypatch.setattr(Replay, "wait", lambda self: looks.append(None) or wait(self))
    assert stacked(draw(SHAPES["3x3"]), Settings(steps=30, tolerance=0))[0].steps == 30
    assert len(looks) <= 5


# Models


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(accelerated, "is_accelerator", lambda device: True)


def zoo():
    broken = nn.Conv2d(4, 6, 3)
    nn.init.constant_(broken.weight, math.inf)
    return nn.ModuleDict(
        {
            "one": nn.Conv2d(4, 6, 3),
            "two": nn.Conv2d(4, 6, 3, stride=2),
            "narrow": nn.Conv2d(4, 6, 3, dtype=torch.bfloat16),
            "wide": nn.Conv2d(4, 6, 3, dtype=torch.float64),
            "broken": broken,
            "grouped": nn.Conv2d(8, 12, 3, groups=2),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "transposed": nn.ConvTranspose2d(6, 4, 3),
            "zero": nn.Conv2d(4, 6, 3),
            "frozen": nn.Conv2d(4, 6, 3).requires_grad_(False),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 1)),
        }
    )


def reports_of(settings):
    torch.manual_seed(1)
    model = zoo()
    nn.init.zeros_(model["zero"].weight)
    return ci.initialize_(model, settings=settings), model


@pytest.mark.parametrize("variant", [{}, {"optimizer": "adam"}], ids=["default", "adam"])
@pytest.mark.parametrize("room", [1, 10**9], ids=["little memory", "much memory"])
def test_the_report_of_a_model_is_the_same(variant, room, request, monkeypatch):
    settings = Settings(steps=4, **variant)
    expected, plain = reports_of(settings)
    request.getfixturevalue("as_on_an_accelerator")
    monkeypatch.setattr(accelerated, "free_values", lambda device: room)
    ran = []
    descend_stacks = accelerated.descend_stacks
    monkeypatch.setattr(
        accelerated, "descend_stacks", lambda s, *rest, **more: ran.append(s) or descend_stacks(s, *rest, **more)
    )
    found, model = reports_of(settings)
    sizes = sorted(len(stack) for load in ran for stack in load)
    assert sizes == ([] if variant else [1] * 9 if room == 1 else [1] * 4 + [5])
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.to_dict().keys() == other.to_dict().keys()
        assert (one.name, one.outcome, one.reason, one.steps) == (other.name, other.outcome, other.reason, other.steps)
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=0)
        torch.testing.assert_close(one.before, other.before)
        torch.testing.assert_close(one.after, other.after, rtol=1e-3, atol=0)
        assert one.seconds > 0
    assert sum(layer.seconds for layer in found.layers) <= found.seconds
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_an_interrupt_leaves_every_weight_as_it_was(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    before = [layer.weight.clone() for layer in model]

    def interrupt(self, times):
        raise KeyboardInterrupt

    monkeypatch.setattr(Replay, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ci.initialize_(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, before, strict=True))


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 64, 64, 3, 3), (1, 64, 3, 7, 7), (1, 128, 64, 1, 1), (2, 32, 16, 3, 3)])
def test_a_graph_takes_the_steps_that_the_cpu_takes(shape, dtype):
    banks = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    settings = Settings(steps=10, tolerance=0)
    with warnings.catch_warnings(action="error"):
        found = stacked([bank.cuda() for bank in banks], settings)
    for bank, descent in zip(banks, found, strict=True):
        alone = descend(bank, settings)
        assert descent.bank.is_cuda
        torch.testing.assert_close(descent.losses, alone.losses, rtol=1e-4, atol=0)
        assert normalized(descent.bank.cpu(), settings) == pytest.approx(normalized(alone.bank, settings), rel=1e-4)


@pytest.mark.cuda
def test_the_graph_is_captured_and_does_what_eager_launches_do(monkeypatch):
    banks = [bank.cuda() for bank in draw(SHAPES["3x3"])]
    stack = Stack(banks, Settings(steps=8))
    with torch.no_grad():
        assert Replay(stack.iterate, banks[0].device).captured
    graphs = stacked(banks, Settings(steps=8))
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", _no_graph)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        eager = stacked(banks, Settings(steps=8))
    for one, other in zip(graphs, eager, strict=True):
        torch.testing.assert_close(one.bank, other.bank)


def _no_graph(self, **options):
    raise RuntimeError("not today\nand not tomorrow")


@pytest.mark.cuda
def test_no_iteration_synchronizes_the_gpu():
    stack = Stack([bank.cuda() for bank in draw(SHAPES["3x3"])], Settings())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            stack.iterate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_model_on_the_gpu_goes_by_stacks_and_gives_its_memory_back():
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(4)), nn.Conv2d(32, 64, 1)).cuda()
    reference = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(4)), nn.Conv2d(32, 64, 1))
    reference.load_state_dict(model.state_dict())
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    found, expected = ci.initialize_(model), ci.initialize_(reference)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held + 2**20
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.outcome is other.outcome
        assert one.after["normalized_similarity"] == pytest.approx(other.after["normalized_similarity"], rel=2e-2)
