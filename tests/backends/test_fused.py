"""The fused kernels without a GPU: by Triton's interpreter against torch's operations, and compiled ahead of time."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from card import OnCard

import convsim_init as ci
from convsim_init.backends import block, gpu, gradient, torch_ops
from convsim_init.backends.gradient import Layout
from convsim_init.backends.torch_ops import TorchBlock
from convsim_init.functional.fourier import Fourier
from convsim_init.optim.descent import descend
from convsim_init.settings import Settings

pytest.importorskip("triton", reason="without Triton: pip install --no-deps triton")

from convsim_init.backends import fused, fused_similarity
from convsim_init.backends.fused import FusedBlock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU Triton interprets
BANKS = {  # [G, M, C, *kernel_size], and channels of a program
    "3x3": ((1, 20, 6, 3, 3), 1),
    "more filters than a tile": ((1, 150, 2, 3, 3), 1),
    "some channels a program": ((2, 5, 7, 3, 3), 3),
    "groups": ((3, 8, 2, 3, 3), 1),
    "1x1": ((1, 130, 9, 1, 1), 4),
    "1d": ((1, 9, 4, 5), 1),
    "9 taps": ((1, 9, 2, 9), 1),
    "even": ((1, 7, 3, 2, 2), 1),
    "even, non-square": ((1, 7, 2, 2, 4), 1),
    "3d": ((1, 6, 2, 2, 2, 2), 1),
    "two filters": ((1, 2, 2, 3, 3), 1),
}
ROUNDING = 1e-6 if DEVICE.type == "cpu" else 5e-6  # a GPU sums in another order, and fuses products and sums
UPPER = torch.ones(3, 3).triu().bool()
UPPER[0, 0] = False


def relative(found, expected) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("shape", "span"), BANKS.values(), ids=BANKS.keys())
def test_a_block_does_what_torchs_operations_do_in_float64(shape, span, monkeypatch):
    monkeypatch.setattr(fused, "MIN_PROGRAMS", shape[0] * shape[2] // span)
    bank, cpu = torch.randn(shape, dtype=torch.float64), torch.device("cpu")
    blocks = []
    for kind, dtype, device in ((TorchBlock, torch.float64, cpu), (FusedBlock, torch.float32, DEVICE)):
        here, fourier = bank.to(device, dtype), Fourier(shape[3:], dtype, device)
        (cut,) = fourier.blocks(here, here.flatten(2).norm(dim=-1), bank.numel())
        blocks.append(kind(*cut, fourier, Settings(), threading.local()))
    exact, block_ = blocks
    assert block_._sizes[-1] == span
    per_filter = (shape[0], 1, shape[1])
    length = 1.0
    for _ in range(3):
        block_._sums.fill_(torch.nan)
        block_._coefficients.fill_(torch.nan)
        keep, add, shift, weight_coefficient, curvature = torch.rand(5, *per_filter, dtype=torch.float64) + 0.5
        arguments = keep, add / length, shift
        sums, overlap = exact.evaluate(*arguments)
        found_sums, found_overlap = block_.evaluate(*(each.to(DEVICE, torch.float32) for each in arguments))
        assert relative(block_.weights, exact.weights) < ROUNDING
        assert relative(block_._gradient, exact._gradient.whole) < ROUNDING
        for found, wanted in zip(found_sums, sums, strict=True):
            assert relative(found, wanted) < ROUNDING or not wanted.any()
        length = float(sums[1].sum()) ** 0.5  # of the gradient
        assert found_overlap == pytest.approx(overlap, rel=ROUNDING, abs=ROUNDING * length**2)
        arguments = weight_coefficient / 8, -curvature
        wanted = exact.turn(0.3, *arguments)[UPPER]
        found = block_.turn(0.3, *(each.to(DEVICE, torch.float32) for each in arguments))[UPPER]
        assert relative(block_._direction, exact._direction.whole) < ROUNDING
        assert relative(found / found.norm(), wanted / wanted.norm()) < ROUNDING


@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        ((1, 12, 4, 3, 3), "preserve"),
        ((1, 12, 4, 3, 3), "free"),
        ((2, 9, 4, 1, 1), "preserve"),
        ((1, 8, 3, 2, 2), "preserve"),
    ],
    ids=str,
)
def test_a_descent_takes_the_same_steps_and_seldom_waits(shape, norm, fused_card):
    bank = torch.randn(shape)
    counts, banks, losses, steps = [], [], [], (2, 6, 2)
    for most in steps:
        fused_card.launches = fused_card.waits = 0
        found = descend(OnCard(bank), Settings(steps=most, tolerance=0, norm=norm))
        assert found.steps == most
        counts.append((fused_card.launches, fused_card.waits))
        banks.append(found.bank.held)
        losses.append(found.losses)
    assert torch.equal(banks[0], banks[2])
    launches, waits = ((many - few) / (steps[1] - steps[0]) for few, many in zip(*counts[:2], strict=True))
    assert launches <= 12
    assert waits <= 2
    expected = descend(bank.double(), Settings(steps=steps[1], tolerance=0, norm=norm))
    assert losses[1] == pytest.approx(expected.losses, rel=1e-4, abs=1e-6 * expected.losses[0])
    assert relative(banks[1], expected.bank) < 1e-3


@pytest.mark.parametrize(
    ("shape", "dtype", "changed"),
    [
        ((1, 4, 3, 3, 3), torch.float64, {}),
        ((1, 4, 3, 3, 3), torch.float32, {"pairs": "adjacent"}),
        ((1, 4, 3, 3, 3), torch.float32, {"channels": "all"}),
        ((1, 4, 3, 5, 5), torch.float32, {}),
    ],
    ids=["float64", "adjacent", "all channels", "5x5"],
)
def test_what_it_cannot_do_is_left_to_torch(shape, dtype, changed, fused_card):
    settings = Settings(steps=3, **changed)
    bank = torch.randn(shape, dtype=dtype)
    assert block._kind(OnCard(bank), settings) is TorchBlock
    found = descend(OnCard(bank), settings)
    assert found.losses == pytest.approx(descend(bank, settings).losses, rel=1e-4)


def no_compiler():
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


@pytest.mark.parametrize(
    ("current_target", "kind"),
    [
        (lambda: SimpleNamespace(backend="cuda", arch=80), FusedBlock),
        (lambda: SimpleNamespace(backend="cuda", arch=75), TorchBlock),
        (lambda: SimpleNamespace(backend="hip", arch="gfx942"), TorchBlock),
        (no_compiler, TorchBlock),
    ],
    ids=["new", "old", "of AMD", "no compiler"],
)
@pytest.mark.usefixtures("card")
def test_which_gpus_it_is_for(current_target, kind, answer_with):
    answer_with(current_target)
    assert block._kind(OnCard(torch.randn(1, 4, 3, 3, 3)), Settings()) is kind


@pytest.mark.usefixtures("fused_card")
def test_a_triton_without_tuples_is_passed_over(monkeypatch):
    assert block._kind(OnCard(torch.randn(1, 4, 3, 3, 3)), Settings()) is FusedBlock
    monkeypatch.setattr("triton.__version__", "3.2.0+git1")
    assert block._kind(OnCard(torch.randn(1, 4, 3, 3, 3)), Settings()) is TorchBlock


@pytest.mark.usefixtures("fused_card")
def test_the_environment_forbids_it_where_it_forbids_the_compiled_step(monkeypatch):
    monkeypatch.setattr(gradient, "_has_memory", lambda weight: True)
    weight = OnCard(torch.randn(4, 3, 3, 3))
    arguments = weight, Layout(), "all", "matched", True
    value, _ = gradient._value_and_gradient(*arguments)
    monkeypatch.setenv("CONVSIM_INIT_COMPILED", "0")
    monkeypatch.setattr(fused_similarity, "value_and_gradient", None)
    assert block._kind(OnCard(torch.randn(1, 4, 3, 3, 3)), Settings()) is TorchBlock
    forbidden, _ = gradient._value_and_gradient(*arguments)  # it is read anew at each call
    assert float(forbidden.held) == pytest.approx(float(value.held), rel=ROUNDING)


def test_without_triton_torch_does_it(card, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    assert block._kind(OnCard(torch.randn(1, 4, 3, 3, 3)), Settings()) is TorchBlock


normalized_or_not = pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalized"])


@normalized_or_not
@pytest.mark.parametrize(("shape", "span"), BANKS.values(), ids=BANKS.keys())
def test_the_regularizer_is_what_torchs_operations_compute_in_float64(shape, span, normalized, monkeypatch):
    monkeypatch.setattr(fused, "MIN_PROGRAMS", shape[0] * shape[2] // span)
    assert_regularizer_is_right(torch.randn(shape, dtype=torch.float64), normalized)


@pytest.mark.parametrize("scale", [0, 1e-41, 1e-25, 1e20])
@pytest.mark.parametrize("shape", [(1, 20, 6, 3, 3), (3, 2, 5, 1, 1)], ids=str)
def test_filters_of_very_different_norms(shape, scale):
    bank = torch.randn(shape, dtype=torch.float64)
    bank[0, 1] *= scale
    assert_regularizer_is_right(bank, normalized=True)


@pytest.mark.parametrize("left", [0, 1])
def test_filters_without_a_pair(left):
    bank = torch.zeros(2, 3, 2, 3, 3, dtype=torch.float64)
    bank[0, :left] = torch.randn(left, 2, 3, 3)
    assert_regularizer_is_right(bank, normalized=True)


def test_what_is_not_a_number_harms_its_own_group_alone():
    bank = torch.randn(2, 3, 2, 3, 3)
    bank[0, 1, 0, 0, 0] = torch.nan
    kernels = bank.flatten(0, 2).flatten(1)
    _, wanted = torch_ops.value_and_gradient(kernels, bank.shape, "all", "matched", normalized=True)
    _, found = fused_similarity.value_and_gradient(kernels.to(DEVICE), bank.shape, normalized=True)
    torch.testing.assert_close(found.cpu(), wanted, equal_nan=True)


def assert_regularizer_is_right(bank, normalized) -> None:
    kernels = bank.flatten(0, 2).flatten(1).float()
    exact, wanted = torch_ops.value_and_gradient(kernels.double(), bank.shape, "all", "matched", normalized=normalized)
    torch.use_deterministic_algorithms(True)  # then memory that nobody has written is NaN
    try:
        found, actual = fused_similarity.value_and_gradient(kernels.to(DEVICE), bank.shape, normalized=normalized)
    finally:
        torch.use_deterministic_algorithms(False)
    assert float(found) == pytest.approx(float(exact), rel=ROUNDING)
    filters = bank.shape[0] * bank.shape[1]
    for own, other in zip(actual.cpu().view(filters, -1), wanted.view(filters, -1), strict=True):
        if other.abs().max() < torch.finfo(torch.float32).max:
            assert relative(own, other) < 10 * ROUNDING or not (own.any() or other.any())


LAYERS = {
    "3x3": ((20, 6, 3, 3), torch.float32, Layout()),
    "half precision": ((20, 6, 3, 3), torch.bfloat16, Layout()),
    "transposed": ((6, 10, 3, 3), torch.float32, Layout(2, transposed=True)),
    "1x1": ((12, 5, 1, 1), torch.float32, Layout()),
    "groups, 1d": ((12, 5, 3), torch.float32, Layout(3)),
}


@normalized_or_not
@pytest.mark.parametrize(("shape", "dtype", "layout"), LAYERS.values(), ids=LAYERS.keys())
def test_on_a_gpu_it_computes_the_regularizer_in_a_handful_of_launches(
    shape, dtype, layout, normalized, fused_card, monkeypatch
):
    monkeypatch.setattr(gradient, "_has_memory", lambda weight: True)
    weight = torch.randn(shape).to(dtype)
    arguments = OnCard(weight), layout, "all", "matched", normalized
    gradient._value_and_gradient(*arguments)  # the basis is copied to the GPU
    fused_card.launches = fused_card.waits = 0
    value, found = gradient._value_and_gradient(*arguments)
    copies = (dtype != torch.float32) + 2 * layout.transposed  # of the weight, and of the gradient
    assert fused_card.launches == 4 + copies
    assert fused_card.waits == 0
    exact = weight.double().requires_grad_()
    expected = ci.convolutional_similarity(exact, **layout._asdict(), normalized=normalized)
    (wanted,) = torch.autograd.grad(expected, exact)
    assert float(value.held) == pytest.approx(expected.item(), rel=ROUNDING)
    assert found.shape == weight.shape
    assert relative(found.held, wanted) < ROUNDING


@pytest.mark.usefixtures("fused_card")
def test_the_regularizer_of_many_groups_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(gradient, "_has_memory", lambda weight: True)
    monkeypatch.setattr(fused_similarity, "value_and_gradient", None)
    weight = torch.randn(130, 2, 3)
    value, _ = gradient._value_and_gradient(OnCard(weight), Layout(65), "all", "matched", normalized=True)
    torch.testing.assert_close(value.held, ci.convolutional_similarity(weight, groups=65, normalized=True))


@pytest.mark.usefixtures("fused_card")
def test_offsets_fit_in_32_bits():
    few, many = ((1, 2**filters, 2**12, 3, 3) for filters in (15, 16))
    assert gpu.fits(few, torch.float32, OnCard.device, "all", "matched")
    assert not gpu.fits(many, torch.float32, OnCard.device, "all", "matched")


@pytest.mark.parametrize("capability", [80, 90])
def test_a_thread_has_registers_enough(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "aot.py"), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    used = [json.loads(line) for line in done.stdout.splitlines()]
    # Each for kernels of 1 and of 9 taps, and for no other size: `evaluate` that moves or not, two raw or normalized.
    assert Counter(each["kernel"] for each in used) == {"evaluate": 4, "turn": 2, "fold": 4, "unfold": 4}
    assert max(each["registers"] for each in used) <= 168  # three programs share a processor
    assert max(each["spilled"] for each in used) <= 16
