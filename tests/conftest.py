import os
from collections.abc import Callable

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared out already; for processes that tests start, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from shim import torchvision_operators

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

# At import, not in a fixture: test modules and timm import torchvision while they are collected.
torchvision_operators.declare()


LACKING = {}  # what tests with these markers need and is not here
if not torch.cuda.is_available():
    LACKING["cuda"] = "needs a CUDA device"
if os.name != "posix":
    LACKING["posix"] = "needs what Windows lacks, such as signals, forks, a shell or torchrun"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest tests first: if one of them begins last, the other workers wait for it.
    items.sort(key=lambda item: item.path.name != "test_readme.py")
    for item in items:
        for marker in LACKING:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=LACKING[marker]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def command(capsys, tmp_path, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process, in an empty folder: its status, stdout and stderr."""
    from convsim_init.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run
