"""The same command writes the bytes that the release before wrote."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from convsim_init.backends.compiled import library

DATA = Path(__file__).parents[1] / "data"
BEFORE = DATA / "reference.safetensors"  # convsim-init reference.py:build --out reference.safetensors, by 0.1.0


def on_the_machine_it_was_made_on() -> bool:
    """Whether matrix products round as they did there: they differ with torch and with the processor."""
    info = Path("/proc/cpuinfo")
    intel = info.exists() and "GenuineIntel" in info.read_text()
    return (
        intel
        and torch.__version__.startswith("2.13.0")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and library() is not None
    )


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
    if on_the_machine_it_was_made_on():
        assert now.read_bytes() == BEFORE.read_bytes()
    found, expected = load_file(now), load_file(BEFORE)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        if tensor.dim() > 2:
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0.02 * float(tensor.abs().max()))
        else:
            assert torch.equal(found[key], tensor)  # not a convolution's weight
    totals, old_totals = about(now).pop("totals"), about(BEFORE).pop("totals")
    assert about(now) | {"totals": None} == about(BEFORE) | {"totals": None}
    for when in ("before", "after"):
        assert totals[when] == pytest.approx(old_totals[when], rel=0.02)
