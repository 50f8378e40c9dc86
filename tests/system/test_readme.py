"""The README keeps its word: its commands and its Python run, in order, in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INSTALLING = ("make ", "pip install")  # run by CI itself, before this


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(INSTALLING)]


def run(line, folder):
    program, *arguments = shlex.split(line, comments=True)
    if program == "convsim-init":
        here = [str(ROOT / argument) if argument.startswith("examples/") else argument for argument in arguments]
        command = [sys.executable, "-m", "convsim_init", *here]
    elif program == "torchrun":  # on a port of its own, and without its advice on threads
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    else:
        assert program == "python", f"a command this test does not know: {line}"
        assert arguments == ["examples/digits.py"]
        command = [sys.executable, str(ROOT / arguments[0]), "--seeds", "1", "--epochs", "1", "--train", "100"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "shim")}
    if program == "torchrun":
        environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_every_command_and_every_line_of_python_runs(tmp_path, monkeypatch):
    for package in ("torchvision", "timm", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    assert len(commands()) >= 8
    for line in commands():
        done = run(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stderr == ""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for source in blocks("python"):
        exec(compile(source, "README.md", "exec"), scope)
    assert (tmp_path / "mine.safetensors").is_file()


def test_the_table_shown_is_what_the_command_prints(tmp_path):
    (shown,) = blocks("text")
    printed = [line.split() for line in run("convsim-init resnet18", tmp_path).stdout.splitlines()]
    header, *rows = [line.split() for line in shown.splitlines()]
    assert header in printed
    for name, shape, before, _, after, *_ in rows:
        (line,) = [line for line in printed if line[:1] == [name]]
        assert line[1] == shape
        assert float(line[2]) == pytest.approx(float(before), rel=1e-2)
        assert float(line[4]) == pytest.approx(float(after), rel=0.3)  # other machines round otherwise


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
