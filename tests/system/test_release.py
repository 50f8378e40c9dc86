"""The same command writes the bytes that the release before wrote."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from convsim_init.backends.compiled import library

DATA = Path(__file__).parents[1] / "data"
BEFORE = DATA / "reference.safetensors"  # convsim-init reference.py:build --out reference.safetensors, by 0.1.0


ROUNDING = "21e2d0ccf05f39a6 AVX512 True"  # of the machine where it was written


def rounding() -> str:
    """How matrix products round here, which differs with torch and with the processor, whose name counts too."""
    info = Path("/proc/cpuinfo")
    name = "".join(
        re.findall(r"(?m)^(?:cpu family|model|stepping)\s*:.*\n", info.read_text())[:3] if info.exists() else []
    )
    numbers, digest = torch.Generator().manual_seed(0), hashlib.sha256(f"{torch.__version__} {name}".encode())
    for size in (8, 12, 16, 24, 40, 200):
        for dtype in (torch.float32, torch.float64):
            matrix = torch.randn(size, 3 * size, generator=numbers, dtype=dtype)
            digest.update((matrix @ matrix.T).numpy().tobytes())
    return f"{digest.hexdigest()[:16]} {torch.backends.cpu.get_cpu_capability()} {library() is not None}"


@pytest.fixture
def now(command, monkeypatch, tmp_path) -> Path:
    path = tmp_path / "now.safetensors"
    monkeypatch.syspath_prepend(str(DATA))
    (tmp_path / "reference.py").write_bytes((DATA / "reference.py").read_bytes())
    status, _, _ = command("reference.py:build", "--out", str(path))
    assert status == 0
    return path


def about(path: Path) -> dict[str, object]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["convsim_init"])


def test_the_file_is_that_of_the_release_before(now):
    if rounding() == ROUNDING:
        assert now.read_bytes() == BEFORE.read_bytes()
    found, expected = load_file(now), load_file(BEFORE)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        if tensor.dim() > 2:
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0.02 * float(tensor.abs().max()))
        else:
            # Not a convolution's weight: drawn alone. On Windows torch's draws have other last bits.
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0 if os.name == "posix" else 1e-7)
    totals, old_totals = about(now).pop("totals"), about(BEFORE).pop("totals")
    assert about(now) | {"totals": None} == about(BEFORE) | {"totals": None}
    for when in ("before", "after"):
        assert totals[when] == pytest.approx(old_totals[when], rel=0.02)
