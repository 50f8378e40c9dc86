"""What a shell completes: by click's classes for each shell, and once by bash itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.shell_completion import get_completion_class
from safetensors.torch import save_file

from convsim_init.cli.main import PROGRAM, cli
from convsim_init.models import libraries
from convsim_init.models.spec import LIBRARIES

BIN = str(Path(sys.executable).parent)


def complete(line: str, shell: str = "bash", kind: str = "plain") -> list[str]:
    """What the shell is offered for the last word of a line, split as bash splits it, or has to find as ``file``."""
    words = line.replace(":", " : ").replace("=", " = ").split(" ") if shell == "bash" else line.split(" ")
    words = [word for word in words[:-1] if word] + [words[-1]]
    number = str(len(words) - 1) if shell != "fish" else words[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMP_WORDS", " ".join(words))
        patch.setenv("COMP_CWORD", number)
        lines = get_completion_class(shell)(cli, {}, PROGRAM, "_CONVSIM_INIT_COMPLETE").complete().splitlines()
    if shell == "zsh":
        return [value for found, value in zip(lines[::3], lines[1::3], strict=True) if found == kind]
    return [line.removeprefix(f"{kind},").split("\t")[0] for line in lines if line.startswith(f"{kind},")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("convsim-init cifar_v", ["cifar_vgg19"]),
        ("convsim-init resnet18 cifar_v", ["cifar_vgg19"]),
        ("convsim-init ver", ["verify"]),
        ("convsim-init --dr", ["--dry-run"]),
        ("convsim-init resnet18 --conv", ["--convs-only"]),
        ("convsim-init --vers", ["--version"]),
        ("convsim-init resnet18 --norm ", ["preserve", "free"]),
        ("convsim-init run --norm ", ["preserve", "free"]),
        ("convsim-init verify init.pt cifar_v", ["cifar_vgg19"]),
        ("convsim-init weights.pt --like cifar_v", ["cifar_vgg19"]),
        (
            "convsim-init cifar_resnet18 --exclude layer4.0.",
            [f"layer4.0.{n}" for n in ("conv1", "conv2", "downsample.0")],
        ),
        ("convsim-init inspect cifar_resnet18 --plot-layer conv", ["conv1"]),
        ("convsim-init compare cifar_resnet18 vgg11 --plot-layer conv", ["conv1"]),
        ("convsim-init resnet18 --base ortho", ["orthogonal"]),
        ("convsim-init completion ", ["bash", "zsh", "fish"]),
        ("convsim-init --exclude con", []),
    ],
    ids=lambda value: value.removeprefix("convsim-init ") if isinstance(value, str) else "",
)
def test_a_shell_completes_options_models_and_layers(line, offered, shell):
    assert complete(line, shell) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("line", ["in", "verify in", "run in", "run train.py --data in", "resnet18 --out in"])
def test_files_are_left_to_the_shell(line, shell):
    assert complete(f"convsim-init {line}", shell, "file") == ["in"]


@pytest.mark.parametrize("line", ["timm:convnext_at", "cifar_resnet18 --exclude=conv", "resnet18 --base orthogonal:s"])
def test_bash_replaces_only_what_stands_after_a_colon_or_an_equals_sign(line):
    pytest.importorskip("timm")
    timm = ["convnext_atto", "convnext_atto_ols", "convnext_atto_rms"]
    expected = {"t": timm, "c": ["conv1"], "r": ["selu", "sigmoid"]}[line[0]]
    assert complete(f"convsim-init {line}") == expected


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_librarys_names_are_read_without_importing_it(library):
    pytest.importorskip(library.value)
    names = set(libraries.names_in_sources(library))
    assert len(names) > 50
    assert names ^ set(libraries.names(library)) == {
        name for name in libraries.names(library) if name.startswith("quantized_")
    }


def test_layers_of_a_file_are_offered_if_they_need_no_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["stem", "a.b-c", "$(reboot)", "a\nplain,b", "x;y", "*"]
    save_file({f"{name}.weight": torch.ones(1, 1, 1) for name in names}, "weights.safetensors")
    Path("broken.safetensors").write_bytes(b"\xff" * 9)
    assert sorted(complete("convsim-init weights.safetensors --exclude ")) == ["a.b-c", "stem"]
    assert complete("convsim-init broken.safetensors --exclude ") == complete("convsim-init gone.pt --exclude ") == []


def test_no_code_of_the_user_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("raise SystemExit(7)\n")
    assert complete("convsim-init net.py:build --exclude ") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself_completes():
    script = """
        eval "$(convsim-init completion bash)" && complete -p convsim-init
        COMP_WORDS=(convsim-init resnet18 --pa) COMP_CWORD=2
        _convsim_init_completion convsim-init && echo "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    registered, offered = done.stdout.splitlines()
    assert registered.endswith(" -F _convsim_init_completion convsim-init")
    assert (offered, done.stderr) == ("--pairs", "")
