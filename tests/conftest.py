import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def _declare_torchvision_operators() -> None:
    """Let a torchvision wheel built for CUDA be imported beside a CPU torch.

    Its extension does not load there, and the import stops at operators that only the extension declares. Where it
    does load, declaring them first would clash with it.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    for library in Path(found.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# At import, not in a fixture: test modules and timm import torchvision while they are collected.
_declare_torchvision_operators()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
