"""On an accelerator: no tensors of two devices meet, and the results are those of the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from cases import CASES


@pytest.mark.skipif(
    emulated.COMPILER is None or sys.platform != "linux", reason="needs g++ and Linux, to compile what emulates one"
)
def test_an_accelerator_computes_what_the_cpu_does():
    """In a process of its own, because the emulated device stays; in one test, because it is compiled for that."""
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(folder.parents[1])}
    done = subprocess.run([sys.executable, folder / "cases.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors.keys() == CASES.keys()
    failed = {case: error for case, error in errors.items() if error is not None}
    assert not failed, "\n".join([*failed, *failed.values()])
