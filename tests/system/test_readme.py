"""The documents keep their word: commands and Python run, in order, in an empty folder; what they name is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ("README.md", "docs/index.md", "docs/guide.md")
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
}
INSTALLING = ("make ", "pip install")  # run by CI itself, before this


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENTS[document], re.MULTILINE | re.DOTALL)


def commands(document):
    text = "".join(blocks(document, "console")).replace("\\\n", "")
    lines = [line.removeprefix("$ ") for line in text.splitlines()]
    return [line for line in lines if not line.startswith(INSTALLING)]


def run(*command, folder):
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT / "tests" / "shim")}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("document", RUN)
def test_every_command_and_every_line_of_python_runs(document, command, tmp_path):
    for package in ("torchvision", "timm", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    assert commands(document)
    for line in commands(document):
        program, *arguments = shlex.split(line, comments=True)
        if program == "convsim-init":
            status, _, errors = command(*arguments)
        elif program == "torchrun":
            status, _, errors = run("-m", "torch.distributed.run", "--standalone", *arguments, folder=tmp_path)
        else:
            assert (program, *arguments) == ("python", "examples/digits.py"), (
                f"a command this test does not know: {line}"
            )
            status, _, errors = run(*arguments, "--seeds", "1", "--epochs", "1", "--train", "100", folder=tmp_path)
        assert status == 0, f"{line}\n{errors}"
        assert errors == "", line
    scope: dict[str, object] = {}
    for source in blocks(document, "python"):
        exec(compile(source, document, "exec"), scope)


def test_the_command_runs_as_a_module(tmp_path):
    assert run("-m", "convsim_init", "list", "resnet18", folder=tmp_path)[0] == 0


def test_the_table_shown_is_what_the_command_prints(command):
    (shown,) = (block for document in RUN for block in blocks(document, "text") if block.startswith("layer"))
    printed = [line.split() for line in command("resnet18")[1].splitlines()]
    header, *rows = [line.split() for line in shown.splitlines()]
    assert header in printed
    for name, shape, before, _, after, *_ in rows:
        (line,) = [line for line in printed if line[:1] == [name]]
        assert line[1] == shape
        assert float(line[2]) == pytest.approx(float(before), rel=1e-2)
        assert float(line[4]) == pytest.approx(float(after), rel=0.3)  # other machines round otherwise


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {target for text in DOCUMENTS.values() for target in re.findall(r"`make ([\w-]+)`|\$ make ([\w-]+)", text)}
    assert named
    for target in {target for pair in named for target in pair if target}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_linked_or_named_exist(document):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", DOCUMENTS[document])
    for link in links:
        assert link.startswith("http") or (ROOT / document).parent.joinpath(link).exists(), link
    for path in re.findall(r"`((?:benchmarks|cli|convsim_init|docs|examples|tests)/[\w./-]*)`", DOCUMENTS[document]):
        assert (ROOT / path).exists(), path
