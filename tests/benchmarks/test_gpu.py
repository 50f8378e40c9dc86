"""The benchmark of a GPU, where there is none: it says so, and what it checks results with runs on the CPU."""

import pytest
import torch

from benchmarks.speed import descents, gpu
from benchmarks.speed.shapes import draw


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"^expected a CUDA device and a PyTorch built for it, got PyTorch"):
        gpu.main()


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SMALL", [(20, 9, 5), (9, 4, 3, 3)])


def test_what_is_right_passes(on_cpu):
    whats = [what for what, *_ in gpu.correctness_rows()]
    assert whats[1::3] == ["20×9×5: whole descent", "9×4×3×3: whole descent"]
    assert whats[2] == "20×9×5: largest error of the regularizer and its gradient"


@pytest.mark.parametrize(
    ("name", "value"), [("TOLERANCE", 0), ("regularizer_error", lambda shape: 1e-4)], ids=["step", "regularizer"]
)
def test_what_is_wrong_ends_it_before_anything_is_timed(name, value, on_cpu, monkeypatch):
    monkeypatch.setattr(gpu, name, value)
    with pytest.raises(SystemExit, match="20×9×5: a wrong result, so nothing is timed"):
        list(gpu.correctness_rows())


def test_a_part_that_fails_does_not_end_the_others():
    def fails():
        yield "a step", "1 ms", "", ""
        raise RuntimeError("CUDA error:\nout of memory")

    assert list(gpu.rows_or_failure(fails)) == [
        ("a step", "1 ms", "", ""),
        ("fails", gpu.FAILED, "RuntimeError: CUDA error: out of memory", ""),
    ]


def test_a_step_can_be_timed():
    assert descents.time_step(draw((64, 32, 3, 3))) > 0
