"""The compiled step against the same step in torch's operations, block by block and as a whole."""

import ctypes
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from convsim_init.backends import block, compiled
from convsim_init.backends.compiled import CompiledBlock
from convsim_init.backends.torch_ops import TorchBlock
from convsim_init.devices import describe_environment
from convsim_init.functional.bank import filter_norms
from convsim_init.functional.bank import per_filter as shaped
from convsim_init.functional.fourier import Fourier
from convsim_init.functional.similarity import bank_similarity
from convsim_init.optim import conjugate_gradient
from convsim_init.optim.descent import descend
from convsim_init.optim.line_search import first_minimum
from convsim_init.settings import Settings

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="installed without a C compiler")

BANKS = {  # [G, M, C, *kernel_size]
    "3x3": (1, 6, 5, 3, 3),
    "one filter less than a chunk": (1, 31, 3, 3, 3),
    "a chunk": (1, 32, 3, 3, 3),
    "one filter more": (1, 33, 3, 3, 3),
    "many chunks": (1, 150, 4, 3, 3),
    "non-square": (1, 7, 3, 2, 5),
    "even": (1, 40, 3, 2, 2),
    "1x1": (1, 36, 9, 1, 1),
    "7x7": (1, 34, 2, 7, 7),
    "1d": (1, 9, 3, 4),
    "3d": (1, 5, 2, 3, 2, 3),
    "groups": (4, 35, 3, 3, 3),
    "one filter": (1, 1, 3, 3, 3),
}
banks = pytest.mark.parametrize("shape", BANKS.values(), ids=BANKS.keys())


@banks
def test_a_block_does_what_torchs_operations_do(shape):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(shape, generator=generator)
    bank /= shaped(filter_norms(bank), bank)
    fourier_ = Fourier(shape[3:], torch.float32, torch.device("cpu"))
    ((*cut, weights),) = fourier_.blocks(bank, torch.ones(bank.shape[:2]), max_weights=bank.numel())
    blocks = [
        kind(*cut, weights.clone(), fourier_, Settings(), threading.local()) for kind in (TorchBlock, CompiledBlock)
    ]

    def per_filter() -> torch.Tensor:
        return torch.rand(shape[0], 1, shape[1], generator=generator)

    length = 1.0
    for _ in range(3):
        keep, add, shift = per_filter(), per_filter() / length, per_filter()
        weight_coefficient, curvature = per_filter() / 8, -per_filter()
        (sums, overlap), (expected_sums, expected_overlap) = (one.evaluate(keep, add, shift) for one in blocks[::-1])
        for found, expected in zip(sums, expected_sums, strict=True):
            close = 1e-4 * float(expected.abs().max()) + 1e-6 * length**2
            torch.testing.assert_close(found.to(expected), expected, rtol=1e-4, atol=close)
        length = float(expected_sums[1].sum()) ** 0.5  # of the gradient
        assert overlap == pytest.approx(expected_overlap, rel=1e-4, abs=1e-4 * length**2)
        found, expected = (one.turn(0.3, weight_coefficient, curvature) for one in blocks[::-1])
        upper = torch.ones(3, 3).triu().bool()
        upper[0, 0] = False  # the loss where it stands is known
        close = 1e-4 * float(expected.abs().max()) + 1e-6 * length**2
        torch.testing.assert_close(found[upper].to(expected), expected[upper], rtol=1e-4, atol=close)
        scale = float(blocks[0].weights.abs().max())
        torch.testing.assert_close(blocks[1].weights, blocks[0].weights, rtol=1e-4, atol=1e-5 * scale)


@banks
@pytest.mark.parametrize("norm", ["preserve", "free"])
@pytest.mark.parametrize("most", [1, 2**17])
def test_a_descent_takes_the_same_steps(shape, norm, most, monkeypatch):
    for kind in (CompiledBlock, TorchBlock):
        monkeypatch.setattr(kind, "max_weights", most)
    bank = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    settings = Settings(steps=6, tolerance=0, norm=norm)
    assert block._kind(bank, settings) is CompiledBlock
    found = descend(bank, settings)
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert block._kind(bank, settings) is TorchBlock
    expected = descend(bank, settings)
    start = expected.losses[0]
    assert found.losses[:3] == pytest.approx(expected.losses[:3], rel=1e-4, abs=1e-6 * start)
    # Later rounding may decide which of two equally good steps is taken.
    assert found.losses[-1] == pytest.approx(expected.losses[-1], rel=0.1, abs=1e-6 * start)
    if norm == "preserve":
        torch.testing.assert_close(filter_norms(found.bank), filter_norms(bank))


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")], ids=str
)
def test_defaults_of_the_caller_do_not_matter(dtype, device):
    bank = torch.randn(1, 40, 8, 3, 3)
    expected = descend(bank, Settings(steps=4))
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = descend(bank, Settings(steps=4))
    finally:
        torch.set_default_dtype(former)
    assert torch.equal(found.bank, expected.bank)


@pytest.mark.parametrize("norm", ["preserve", "free"])
def test_after_a_step_in_vain_it_takes_the_same_steps_too(norm, monkeypatch):
    """The compiled block has overwritten the gradient before by then."""

    def too_far(*slope, otherwise):
        return 16 * first_minimum(*slope, otherwise=otherwise)

    monkeypatch.setattr(conjugate_gradient, "first_minimum", too_far)
    bank = torch.randn(1, 24, 8, 3, 3, generator=torch.Generator().manual_seed(4))
    settings = Settings(steps=6, tolerance=0, norm=norm)
    found = descend(bank, settings)
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert found.losses == pytest.approx(descend(bank, settings).losses, rel=1e-3)


@banks
@pytest.mark.parametrize("normalized", [False, True])
def test_the_similarity_of_a_layer_and_its_gradient(shape, normalized):
    bank = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    exact = bank.double().requires_grad_()
    if normalized:
        pairs = max(1, shape[0] * shape[1] * (shape[1] - 1) // 2)
        wanted = bank_similarity(exact / shaped(filter_norms(exact), exact), "all", "matched") / pairs
    else:
        wanted = bank_similarity(exact, "all", "matched")
    (gradient,) = torch.autograd.grad(wanted, exact)
    kernels = bank.view(-1, bank[0, 0, 0].numel())
    found = torch.full_like(kernels, torch.nan)
    value = compiled.CompiledSimilarity(shape)(kernels, found, normalized=normalized)
    assert value == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    close = 1e-5 * max(1e-2, float(gradient.abs().max()))
    torch.testing.assert_close(found.view(shape).double(), gradient, rtol=1e-5, atol=close)


@pytest.mark.parametrize(
    ("dtype", "changed"),
    [(torch.float64, {}), (torch.float32, {"pairs": "adjacent"}), (torch.float32, {"channels": "all"})],
    ids=["float64", "adjacent", "all channels"],
)
def test_what_it_cannot_do_is_left_to_torch(dtype, changed):
    assert block._kind(torch.randn(1, 4, 3, 3, 3, dtype=dtype), Settings(**changed)) is TorchBlock


def test_the_environment_is_told_and_can_switch_it_off(monkeypatch):
    assert describe_environment()["step"] == "compiled"
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert describe_environment()["step"] == "in torch's operations: CONVSIM_INIT_COMPILED=0"


def test_what_was_built_from_another_version_is_passed_over(monkeypatch):
    monkeypatch.setattr(compiled, "INTERFACE", compiled.INTERFACE + 1)
    told = compiled._built.__wrapped__()
    assert (
        told == f"{Path(compiled.__file__).with_name(compiled.NAME)} is of another version: install the package again"
    )


@pytest.fixture(scope="module")
def native():
    return ctypes.CDLL(str(Path(compiled.__file__).with_name(compiled.NAME)))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_every_width_do_the_same(lanes, native, monkeypatch):
    if lanes > native.lanes():
        pytest.skip(f"this processor has no vectors of {lanes} floats")
    bank = torch.randn(2, 35, 3, 3, 3, generator=torch.Generator().manual_seed(5))
    settings = Settings(steps=3, tolerance=0)
    expected = descend(bank, settings).bank
    functions = compiled._with_lanes(native, lanes)
    monkeypatch.setattr(compiled, "_built", lambda: functions)
    found = descend(bank, settings).bank
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if lanes == native.lanes():
        assert torch.equal(found, expected)


FOREIGN = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xf3\x00" + bytes(256)  # a shared object for RISC-V


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"", "cannot be loaded: ", id="empty"),
        pytest.param(b"of another system", "cannot be loaded: ", id="garbage"),
        pytest.param(FOREIGN, "cannot be loaded: ", id="foreign"),
        pytest.param(None, "was not compiled", id="missing"),
    ],
)
def test_a_library_that_cannot_be_loaded_is_passed_over(content, told, tmp_path):
    """Also where one for another Python is beside it, as older versions named theirs."""
    copy = tmp_path / "convsim_init"
    shutil.copytree(Path(compiled.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "backends" / compiled.NAME
    path.rename(path.with_name("_step.cpython-39-x86_64-linux-gnu.so"))
    if content is not None:
        path.write_bytes(content)
    code = "from convsim_init.devices import describe_environment; print(describe_environment()['step'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith(f"in torch's operations: {path} {told}")
    assert done.stdout.count("\n") == 1
