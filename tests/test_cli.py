"""The command as its user meets it: what it prints where, what it refuses, its exit status, and what it leaves."""

import errno
import fcntl
import json
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import convsim_init
from convsim_init.cli.main import main
from convsim_init.cli.main import cli as group
from convsim_init.devices import available_devices
from convsim_init.models import build_model, catalog
from convsim_init.settings import Settings

INIT = import_module("convsim_init.cli.init")
SCRIPT = Path(sys.executable).with_name("convsim-init")
QUICK = ["cifar_resnet18", "--include", "conv1", "--steps", "2"]
OLD = b"the file that was there"
INTERRUPTED = "Error: interrupted; no partial file is left\n"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys, tmp_path, monkeypatch) -> Run:
    """Run the command in this process, in an empty folder: its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([SCRIPT, *arguments], text=True, **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def run_process(*arguments: str, **options: object) -> tuple[int, str, str]:
    return finish(start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options))


def without_times(report: dict) -> dict:
    layers = [layer | {"seconds": None} for layer in report["layers"]]
    return report | {"seconds": None, "layers": layers}


# What a run leaves and shows


@pytest.mark.parametrize("name", ["init.safetensors", "init.pt"])
def test_the_file_holds_the_model_with_its_changed_layers(name, command, tmp_path):
    status, out, err = command(*QUICK, "--seed", "4", "--out", name)
    assert (status, err, names(tmp_path)) == (0, "", [name])
    path = tmp_path / name
    written = safetensors.torch.load_file(path) if name != "init.pt" else torch.load(path, weights_only=True)
    before = build_model("cifar_resnet18", seed=4).state_dict()
    assert written.keys() == before.keys()
    assert [key for key in before if not torch.equal(before[key], written[key])] == ["conv1.weight"]
    assert f"{name} ({path.stat().st_size / 1e6:.1f} MB)" in out.splitlines()[-1]


def test_the_table_and_the_json_tell_the_same(command):
    data = json.loads(command(*QUICK, "--json")[1])
    status, out, err = command(*QUICK)
    assert (status, err) == (0, "")
    header, *rows = [re.split(r"\s{2,}", line) for line in out.split("\n\n")[0].splitlines()]
    assert header == ["layer", "shape", "similarity before -> after", "norm ratio"]
    assert len(rows) == len(data["layers"]) == 20
    for row, layer in zip(rows, data["layers"], strict=True):
        assert row[:2] == [layer["name"], "x".join(map(str, layer["shape"]))]
        if layer["outcome"] == "skipped":
            assert row[2:] == ["skipped", "not included"] == ["skipped", layer["reason"]]
        else:
            before, after = layer["before"]["normalized_similarity"], layer["after"]["normalized_similarity"]
            assert row[2] == f"{before:.3e} -> {after:.3e}"
            assert row[3:] == [f"{after / before:.1%}", f"{layer['after']['norm_ratio']:.6f}"]
    counts, mean, raw, end = out.split("\n\n")[1].splitlines()
    totals = data["totals"]
    assert counts == "cifar_resnet18, 20 convolutions: 1 initialized, 19 skipped"
    assert f"{totals['before']['normalized_similarity']:.3e} -> {totals['after']['normalized_similarity']:.3e}" in mean
    assert f"{totals['before']['similarity']:.4g} -> {totals['after']['similarity']:.4g}" in raw
    assert re.fullmatch(r"\d+\.\d\d s, nothing written", end)


def test_the_json_has_the_fields_of_the_design(command, tmp_path):
    status, out, err = command(*QUICK, "--exclude", "layer1.*", "--json", "--out", "init.safetensors")
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert set(data) == {"model", "seed", "settings", "layers", "totals", "seconds", "file", "file_bytes"}
    assert (data["model"], data["seed"]) == ("cifar_resnet18", 0)
    assert data["settings"] == asdict(Settings(steps=2))
    assert (data["file"], data["file_bytes"]) == ("init.safetensors", (tmp_path / "init.safetensors").stat().st_size)
    for layer in data["layers"]:
        assert set(layer) == {
            "name", "kind", "shape", "outcome", "reason", "steps", "seconds", "before", "after",
        }  # fmt: skip
        assert layer["kind"] == "Conv2d"
    treated, *others = data["layers"]
    assert (treated["outcome"], treated["reason"], treated["steps"]) == ("initialized", None, 2)
    assert treated["before"].keys() >= {"similarity", "normalized_similarity"}
    assert treated["after"].keys() == treated["before"].keys() | {"norm_ratio"}
    assert treated["after"]["norm_ratio"] == pytest.approx(1, abs=1e-5)
    assert all(not layer["before"] and not layer["after"] for layer in others)
    assert data["totals"] == {
        "layers": 20,
        "initialized": 1,
        "skipped": 19,
        "before": treated["before"],
        "after": treated["after"],
    }


def test_the_metadata_tells_what_the_json_tells(command, tmp_path):
    data = json.loads(command(*QUICK, "--seed", "2", "--json", "--out", "init.safetensors")[1])
    with safetensors.safe_open(tmp_path / "init.safetensors", "pt") as file:
        about = json.loads(file.metadata()["convsim_init"])
    for name in ("model", "seed", "settings", "totals"):
        assert about[name] == data[name]


@pytest.mark.parametrize(
    ("options", "shown"),
    [([], True), (["--json"], True), (["--quiet"], False), (["-q"], False), (["--quiet", "--json"], True)],
    ids=lambda value: " ".join(value) or "neither" if isinstance(value, list) else "",
)
def test_quiet_prints_nothing_but_the_json_asked_for(options, shown, command):
    status, out, err = command(*QUICK, *options)
    assert (status, bool(out), err) == (0, shown, "")


def test_a_dry_run_shows_what_would_be_done_and_writes_nothing(command, tmp_path):
    status, out, err = command(*QUICK, "--exclude", "layer1.*", "--dry-run", "--out", "init.pt")
    assert (status, err, names(tmp_path)) == (0, "", [])
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert rows[0] == ["layer", "shape", "outcome"]
    assert rows[1] == ["conv1", "64x3x3x3", "planned"]
    assert ["layer2.0.downsample.0", "128x64x1x1", "skipped", "not included"] in rows
    assert out.splitlines()[-2] == "cifar_resnet18, 20 convolutions: 1 planned, 19 skipped"
    assert out.endswith(" s, nothing written\n")


def test_a_dry_run_computes_nothing(command, monkeypatch):
    monkeypatch.setattr("convsim_init.initialize.initialize_", lambda *_, **__: pytest.fail("it computes"))
    data = json.loads(command("resnet18", "--dry-run", "--json")[1])
    assert [layer["outcome"] for layer in data["layers"]] == ["planned"] * 20
    assert data["file"] is None
    assert data["totals"]["before"] == {}


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        pytest.param(["--include", "layer4.*"], 5, id="include"),
        pytest.param(["--include", "conv1", "--include", "*downsample*"], 4, id="include-twice"),
        pytest.param(["--exclude", "*.conv?"], 4, id="exclude"),
        pytest.param(["--exclude", "conv1", "--exclude", "*.0.*"], 8, id="exclude-twice"),
        pytest.param(["--include", "layer4.*", "--exclude", "*.conv1"], 3, id="both"),
        pytest.param(["--exclude", "*"], None, id="exclude-all"),
    ],
)
def test_globs_choose_the_layers(options, planned, command):
    data = json.loads(command("cifar_resnet18", "--dry-run", "--json", *options)[1])
    assert data["totals"].get("planned") == planned


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param([], Settings(), id="defaults"),
        pytest.param(["--preset", "convsim"], Settings(), id="convsim"),
        pytest.param(["--preset", "paper"], Settings.paper(), id="paper"),
        pytest.param(["--preset", "paper", "--steps", "7"], Settings.paper(steps=7), id="paper-steps"),
        pytest.param(
            ["--norm", "preserve", "--preset", "paper", "--pairs", "all"],
            Settings(optimizer="adam", steps=100, tolerance=0.0),
            id="paper-but-pairs-and-norm",
        ),
        pytest.param(
            ["--pairs", "adjacent", "--channels", "all", "--norm", "free", "--steps", "1"],
            Settings(pairs="adjacent", channels="all", norm="free", steps=1),
            id="each",
        ),
    ],
)
def test_options_become_settings(options, expected, command):
    data = json.loads(command("cifar_resnet18", "--dry-run", "--json", *options)[1])
    assert data["settings"] == asdict(expected)


def test_the_paper_preset_runs_and_tells_how_the_norms_fall(command):
    data = json.loads(command(*QUICK[:-1], "20", "--preset", "paper", "--json")[1])
    layer = data["layers"][0]
    assert layer["steps"] == 20
    assert layer["after"]["norm_ratio"] < 0.99


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        (["--in-chans", "1"], [64, 1, 3, 3]),
        (["--num-classes", "7"], [64, 3, 3, 3]),
    ],
    ids=["in-chans", "num-classes"],
)
def test_the_model_is_built_as_asked(arguments, shape, command, tmp_path):
    data = json.loads(command(*QUICK, *arguments, "--json", "--out", "init.safetensors")[1])
    assert data["layers"][0]["shape"] == shape
    written = safetensors.torch.load_file(tmp_path / "init.safetensors")
    assert written["fc.weight"].shape[0] == (7 if "--num-classes" in arguments else 10)


def test_convs_only_prefix_and_dtype_shape_the_file(command, tmp_path):
    options = ["--convs-only", "--prefix", "model.", "--dtype", "bfloat16", "--out", "init.safetensors"]
    status, out, _ = command(*QUICK, *options)
    assert status == 0
    assert "init.safetensors (0.0 MB)" in out
    written = safetensors.torch.load_file(tmp_path / "init.safetensors")
    assert {key: value.dtype for key, value in written.items()} == {"model.conv1.weight": torch.bfloat16}


ORDERS = [
    ["--seed", "3", "--dry-run", "--json", "cifar_resnet18"],
    ["cifar_resnet18", "--seed", "3", "--dry-run", "--json"],
    ["--dry-run", "cifar_resnet18", "--json", "--seed=3"],
    ["init", "cifar_resnet18", "--json", "--dry-run", "--seed", "3"],
    ["--json", "--dry-run", "--seed", "3", "--", "cifar_resnet18"],
]


@pytest.mark.parametrize("arguments", ORDERS, ids=" ".join)
def test_options_may_stand_before_and_after_the_model(arguments, command):
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert (data["model"], data["seed"], data["totals"]) == ("cifar_resnet18", 3, {"layers": 20, "planned": 20, "before": {}, "after": {}})  # fmt: skip


def test_force_replaces_a_file(command, tmp_path):
    path = tmp_path / "init.pt"
    path.write_bytes(OLD)
    assert command(*QUICK, "--out", "init.pt", "--force")[0] == 0
    assert torch.load(path, weights_only=True).keys() == build_model("cifar_resnet18").state_dict().keys()


def test_the_random_state_of_torch_is_left_alone(command):
    before = torch.get_rng_state()
    command(*QUICK)
    assert torch.equal(torch.get_rng_state(), before)


# The other commands


@pytest.mark.parametrize(("pattern", "count"), [([], 21), (["resnet*"], 7), (["vgg16_bn"], 1)], ids=str)
def test_list_shows_the_catalog(pattern, count, command):
    status, out, err = command("list", *pattern)
    assert (status, err) == (0, "")
    expected = catalog.names(*pattern)
    assert len(expected) == count
    assert [line.split(maxsplit=1) for line in out.splitlines()] == [[n, catalog.MODELS[n].summary] for n in expected]
    listed = json.loads(command("list", *pattern, "--json")[1])
    assert listed == [{"name": n, "summary": catalog.MODELS[n].summary} for n in expected]


def test_env_shows_versions_and_devices(command):
    status, out, err = command("env")
    assert (status, err) == (0, "")
    data = json.loads(command("env", "--json")[1])
    assert [line.split(maxsplit=1) for line in out.splitlines()] == [[key, value] for key, value in data.items()]
    assert data["convsim-init"] == convsim_init.__version__
    assert data["torch"] == torch.__version__
    assert data["devices"].startswith("cpu")
    assert {"python", "platform", "numpy", "safetensors", "timm", "torchvision", "cuda", "threads"} <= data.keys()


def test_env_shows_what_is_not_installed(command, monkeypatch):
    monkeypatch.setattr("convsim_init.devices.PACKAGES", ("torch", "no-such-package"))
    assert json.loads(command("env", "--json")[1])["no-such-package"] == "not installed"


def test_version(command):
    assert command("--version") == (0, f"convsim-init, version {convsim_init.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["resnet18", "--help"], ["init", "-h"]], ids=" ".join)
def test_the_help_shows_every_option_and_command(arguments, command):
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert out.startswith("Usage: convsim-init MODEL [--out PATH] [OPTIONS]\n   or: convsim-init COMMAND [ARGS]...\n")
    for parameter in group.commands["init"].params[1:]:
        assert all(re.search(rf"(^|[ ,]){name}[ \n]", out, re.M) for name in parameter.opts), parameter.opts
    for name in ("list", "env"):
        assert re.search(rf"^  {name} ", out, re.M)
    assert "Examples:\n    convsim-init resnet18 --out init.safetensors\n" in out
    assert "..." not in out.replace("[ARGS]...", "")  # no line is cut short


@pytest.mark.parametrize("name", ["list", "env"])
def test_the_help_of_the_other_commands(name, command):
    status, out, err = command(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: convsim-init {name} [OPTIONS]")
    assert "--json" in out
    assert "--debug" in out


@pytest.mark.parametrize("columns", [60, 80, 300])
@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["env", "--help"]], ids=" ".join)
def test_the_help_fits_its_terminal_and_stays_readable_in_a_wide_one(arguments, columns, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = command(*arguments)
    text = out.split("Examples:")[0]  # examples stay on their lines
    assert max(map(len, text.splitlines())) <= min(columns, 110)


def test_every_option_has_a_sentence_of_help():
    for subcommand in group.commands.values():
        assert subcommand.help
        for option in [p for p in subcommand.params if p.param_type_name == "option"]:
            assert re.fullmatch(r".+\.", option.help, re.S), option.name


def test_the_examples_of_the_help_are_right(command):
    examples = re.findall(r"^ +convsim-init (.+)$", INIT.EPILOG, re.M)
    assert len(examples) == 4
    for example in examples:
        assert command(*example.split(), "--dry-run")[0] == 0


def test_without_arguments_it_shows_the_help_on_stderr(command):
    help_text = command("--help")[1]
    assert command() == (2, "", help_text)


# What is refused


def anything_but(*choices: str) -> str:
    return ", ".join(repr(choice) for choice in choices)


SEE = "(see 'convsim-init --help')"
GONE = "gone/init.pt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["resnet81"],
            "expected the name of a built-in model, got 'resnet81': did you mean resnet18 or resnet152 or resnet101? "
            "For all names run `convsim-init list`",
            id="model-misspelled",
        ),
        pytest.param(
            ["nothing-like-it"],
            "expected the name of a built-in model, got 'nothing-like-it': for all names run `convsim-init list`",
            id="model-unknown",
        ),
        pytest.param(["--seed", "3"], f"Missing argument 'MODEL' {SEE}", id="no-model"),
        pytest.param(["resnet18", "resnet50"], f"Got unexpected extra argument (resnet50) {SEE}", id="two-models"),
        pytest.param(
            ["--json", "list"],
            f"'list' is a command, not a model: write it before all options {SEE}",
            id="option-before-command",
        ),
        pytest.param(
            ["resnet18", "--out", GONE],
            "expected an existing folder to write to, got '{}/gone': create it first",
            id="folder-missing",
        ),
        pytest.param(
            ["resnet18", "--out", "."],
            "expected a file name ending in .safetensors, .pt, .pth, got '.': rename it",
            id="folder-as-file",
        ),
        pytest.param(
            ["resnet18", "--out", "init.ckpt"],
            "expected a file name ending in .safetensors, .pt, .pth, got 'init.ckpt': rename it",
            id="suffix",
        ),
        pytest.param(
            ["resnet18", "--out", "old.pt"],
            "'old.pt' exists already: choose another name or overwrite it (--force in the shell)",
            id="file-exists",
        ),
        pytest.param(
            ["resnet18", "--dry-run", "--out", "old.pt"],
            "'old.pt' exists already: choose another name or overwrite it (--force in the shell)",
            id="file-exists-dry-run",
        ),
        *(
            pytest.param(
                ["resnet18", option, value],
                f"Invalid value for '{option}': {value} is not in the range x>={least} {SEE}",
                id=f"{option[2:]}={value}",
            )
            for option, value, least in [
                ("--steps", "0", 1),
                ("--steps", "-3", 1),
                ("--num-classes", "0", 1),
                ("--in-chans", "0", 1),
                ("--in-chans", "-1", 1),
                ("--seed", "-1", 0),
            ]
        ),
        *(
            pytest.param(
                ["resnet18", option, value],
                f"Invalid value for '{option}': '{value}' is not a valid integer{{}} {SEE}",
                id=f"{option[2:]}={value}",
            )
            for option, value in [("--steps", "x"), ("--steps", "1.5"), ("--num-classes", "ten"), ("--seed", "")]
        ),
        *(
            pytest.param(
                ["resnet18", option, "x"],
                f"Invalid value for '{option}': 'x' is not one of {anything_but(*choices)} {SEE}",
                id=f"{option[2:]}=x",
            )
            for option, choices in [
                ("--preset", ("convsim", "paper")),
                ("--pairs", ("all", "adjacent")),
                ("--channels", ("matched", "all")),
                ("--norm", ("preserve", "free")),
                ("--dtype", ("float32", "float16", "bfloat16", "float64")),
            ]
        ),
        pytest.param(["resnet18", "--steps"], f"Option '--steps' requires an argument {SEE}", id="option-without-value"),
        pytest.param(
            ["resnet18", "--device", "gpu"],
            "expected the device to be auto, cpu, cuda, cuda:N or mps, got 'gpu'",
            id="device-nonsense",
        ),
        pytest.param(
            ["resnet18", "--device", "cuda:x"],
            "expected the device to be auto, cpu, cuda, cuda:N or mps, got 'cuda:x'",
            id="device-number-nonsense",
        ),
        pytest.param(
            ["resnet18", "--convs-only", "--prefix", "x.", "--dtype", "float16", "--force"],
            f"--convs-only, --prefix, --dtype, --force: nothing is written without --out {SEE}",
            id="file-options-without-file",
        ),
        pytest.param(
            ["list", "nothing*"],
            "expected a pattern that a model's name matches, got 'nothing*'; `convsim-init list` shows all",
            id="list-nothing",
        ),
        pytest.param(
            ["list", "a", "b"],
            "Got unexpected extra argument (b) (see 'convsim-init list --help')",
            id="list-two-patterns",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(arguments, message, command, tmp_path, monkeypatch):
    (tmp_path / "old.pt").write_bytes(OLD)
    monkeypatch.setattr(INIT, "build_model", lambda *_, **__: pytest.fail("it builds the model"))
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err == f"Error: {message.format(tmp_path if '/gone' in message else '')}\n"
    assert names(tmp_path) == ["old.pt"]
    assert (tmp_path / "old.pt").read_bytes() == OLD


def test_an_unknown_option_is_refused(command):
    status, out, err = command("resnet18", "--frobnicate")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"Error: No such option:? '?--frobnicate'? .*\(see 'convsim-init --help'\)\n", err.replace("k", "k "))
