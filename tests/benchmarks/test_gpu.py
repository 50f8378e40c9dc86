"""The GPU benchmark: without a GPU all but its figures can be tried."""

import subprocess
import sys

import pytest
import torch

from benchmarks.speed import gpu


def test_it_runs_through_on_the_cpu(monkeypatch, capsys, tmp_path):
    arguments = ["--device", "cpu", "--smallest", "2", "--repeats", "1", "--write", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--compared", "resnet18", "--model", "resnet18"])
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(gpu, "COMMAND", "import sys; sys.exit('no click')")  # the command itself takes its time
    gpu.main()
    (written,) = tmp_path.iterdir()
    table = written.read_text()
    assert "layers apart by" in table
    assert "bytes that a step must move" in table
    assert "it failed: no click" in table
    assert "nan" not in table
    assert written.name.startswith("speed-the-cpu-")
    assert table.splitlines()[-1] in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_ends_with_one_clear_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="expected a CUDA device, found none: nothing was measured"):
        gpu.main()


def test_the_command_is_found_in_the_source_tree():
    done = subprocess.run(
        [sys.executable, "-c", gpu.COMMAND, "--help"], cwd=gpu.ROOT, capture_output=True, text=True, check=True
    )
    assert "convsim-init" in done.stdout.lower() or "usage" in done.stdout.lower()


def test_traffic_counts_what_operations_read_and_write():
    a, b = torch.ones(10), torch.ones(10)
    with gpu.Traffic() as traffic:
        a.mul_(b)
        a.view(2, 5)
        torch.empty(10)
        torch.add(a, b, out=b.new_empty(10))
    assert traffic.operations == 2
    assert traffic.bytes == 4 * 10 * (3 + 3)
