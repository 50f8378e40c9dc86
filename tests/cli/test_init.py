"""The command as its user meets it: what it prints where, what it refuses, its exit status, and what it leaves."""

import json
import os
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
import safetensors.torch
import torch
from folders import OLD, names
from torch import nn

import convsim_init
from convsim_init.cli.devices import MPS_REMARK, find_device
from convsim_init.cli.runs.run import UNTREATED
from convsim_init.devices import available_devices
from convsim_init.errors import InputError
from convsim_init.models.build import build_model
from convsim_init.models.zoo import catalog
from convsim_init.settings import Settings

MAIN, INIT, SOURCE = (import_module(f"convsim_init.cli.{name}") for name in ("main", "commands.init", "sources"))
SCRIPT = Path(sys.executable).with_name(f"convsim-init{'.exe' * (os.name == 'nt')}")
QUICK = ["cifar_resnet18", "--include", "conv1", "--steps", "2"]
INTERRUPTED = "Error: interrupted; no partial file is left\n"


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
    assert re.fullmatch(r"\d+\.\d\d s on cpu, no checkpoint written", end)


def test_the_json_has_the_fields_of_the_design(command, tmp_path):
    status, out, err = command(*QUICK, "--exclude", "layer1.*", "--json", "--out", "init.safetensors")
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert set(data) == {
        *("model", "seed", "base", "calibrated", "settings", "layers", "totals", "seconds", "processes", "device"),
        *("options", "file", "file_bytes", "remarks", "format_version", "versions"),
    }
    assert (data["model"], data["seed"]) == ("cifar_resnet18", 0)
    assert data["settings"] == asdict(Settings(steps=2))
    assert (data["file"], data["file_bytes"]) == ("init.safetensors", (tmp_path / "init.safetensors").stat().st_size)
    for layer in data["layers"]:
        assert set(layer) == {
            "name", "kind", "shape", "outcome", "reason", "channels", "factor", "steps", "seconds", "before", "after",
            "losses",
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


def test_what_is_printed_as_json_is_json_and_what_a_record_holds(command, tmp_path):
    torch.save({"a.weight": torch.randn(8, 4, 3, 3, dtype=torch.float64) * 1e80}, tmp_path / "large.pt")
    status, out, err = command("large.pt", "--steps", "2", "--json", "--report", "run.json")
    assert (status, err) == (0, "")
    printed, record = (json.loads(text, parse_constant=pytest.fail) for text in (out, Path("run.json").read_text()))
    assert printed == record
    (layer,) = printed["layers"]
    assert layer["before"]["similarity"] is None
    assert layer["after"]["normalized_similarity"] < layer["before"]["normalized_similarity"]
    assert command("large.pt", "--steps", "2", "--dtype", "float64", "--out", "large.safetensors")[0] == 0
    with safetensors.safe_open("large.safetensors", "pt") as file:
        about = json.loads(file.metadata()["convsim_init"], parse_constant=pytest.fail)
    assert about["totals"]["before"]["similarity"] is None
    status, _, err = command("large.pt", "--norm", "free", "--steps", "2")
    assert (status, "Error: layer 'a' failed, left as it was: the loss or the weights became infinite" in err) == (
        1,
        True,
    )
    inspected = json.loads(command("inspect", "large.pt", "--json")[1], parse_constant=pytest.fail)
    assert (inspected["format_version"], inspected["layers"][0]["losses"]) == (1, [])


def test_a_checkpoint_is_the_same_with_and_without_a_record(command, tmp_path):
    for name, more in (("a", []), ("b", ["--report", "b.json"])):
        assert command(*QUICK, "--out", f"{name}.safetensors", *more)[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert "effective_rank_white" in json.loads((tmp_path / "b.json").read_text())["totals"]["after"]


def test_the_metadata_tells_what_the_json_tells(command, tmp_path):
    data = json.loads(command(*QUICK, "--seed", "2", "--json", "--out", "init.safetensors")[1])
    with safetensors.safe_open(tmp_path / "init.safetensors", "pt") as file:
        about = json.loads(file.metadata()["convsim_init"])
    for name in ("model", "seed", "totals"):
        assert about[name] == data[name]
    assert about["settings"] == data["settings"] | {"channels": "matched"}  # as was found for all of its layers


LOST = "nothing is kept: --out, --report and --plot name files\n"


@pytest.mark.parametrize(
    ("options", "shown", "told"),
    [
        ([], True, ""),
        (["--json"], True, ""),
        (["--quiet"], False, LOST),
        (["-q", "--seeds", "0:2"], False, LOST),
        (["-q", "--out", "init.pt"], False, ""),
        (["-q", "--out", "init.pt", "--exclude", "*"], False, f"{UNTREATED}\n"),
        (["-q", "--dry-run"], False, ""),
        (["--quiet", "--json"], True, ""),
    ],
    ids=lambda value: " ".join(value) or "neither" if isinstance(value, list) else "",
)
def test_quiet_prints_nothing_but_the_json_asked_for_and_that_nothing_is_kept(options, shown, told, command):
    status, out, err = command(*QUICK, *options)
    assert (status, bool(out), err) == (0, shown, told)


@pytest.mark.parametrize("seeds", [[], ["--seeds", "0:2"]], ids=["one run", "two"])
def test_verbose_tells_on_stderr_what_computes_and_what_became_of_each_layer(seeds, command):
    quiet = command(*QUICK, *seeds)[1].splitlines()
    status, out, err = command(*QUICK, *seeds, "-v")
    assert (status, len(out.splitlines())) == (0, len(quiet))
    environment, model, first, second, *_ = err.splitlines()
    step = "(compiled|in torch's operations(: .+)?)"
    assert re.fullmatch(rf"torch \S+, step {step}, threads \d+ of (\d+|unknown) cores", environment)
    assert model == "cifar_resnet18: drawn with seed 0"
    assert re.fullmatch(r"conv1: initialized: 2 steps, \d\.\d\d s", first)
    assert second == "layer1.0.conv1: skipped: not included"
    assert len(err.splitlines()) == 1 + 21 * (2 if seeds else 1)


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.posix
def test_a_file_goes_to_stdout_and_the_table_to_stderr(buffering, command, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | buffering
    line = f"'{SCRIPT}' {' '.join(QUICK)} --out - | (sleep 0.1; cat) > piped.safetensors"
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, names(tmp_path)) == (0, "", ["piped.safetensors"])
    assert done.stderr.startswith("layer ")
    assert done.stderr.endswith(", stdout (44.7 MB)\n")
    assert command(*QUICK, "--out", "named.safetensors")[0] == 0
    assert (tmp_path / "piped.safetensors").read_bytes() == (tmp_path / "named.safetensors").read_bytes()
    with Path("/dev/full").open("w") as full:
        status, _, err = finish(start(*QUICK, "--out", "-", stdout=full, stderr=subprocess.PIPE, env=environment))
    assert (status, err) == (1, "Error: could not write to stdout: No space left on device; send it elsewhere\n")


TALKING = """
import torch
from torch import nn
from torch.nn.utils import parametrize

class Standardized(nn.Conv2d):
    def forward(self, x):
        print("in a forward pass")
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

class Doubled(nn.Module):
    def forward(self, weight):
        print("in a parametrization")
        return 2 * weight

    def right_inverse(self, weight):
        print("in an assignment")
        return weight / 2

class Net(nn.Sequential):
    def state_dict(self, *arguments, **options):
        print("in a state dict")
        return super().state_dict(*arguments, **options)

def model():
    parametrized = parametrize.register_parametrization(nn.Conv2d(8, 8, 3), "weight", Doubled())
    return Net(Standardized(3, 8, 3), parametrized)
"""


def test_what_a_model_prints_is_not_in_the_results_on_stdout(command, tmp_path):
    (tmp_path / "talking.py").write_text(TALKING)
    arguments = ["talking.py:model", "--calibrate", "3x16x16", "--base", "orthogonal", "-q"]
    with (tmp_path / "piped.safetensors").open("wb") as piped:
        assert finish(start(*arguments, "--out", "-", stdout=piped, stderr=subprocess.PIPE, cwd=tmp_path))[0] == 0
    assert command(*arguments, "--out", "named.safetensors")[0] == 0
    assert (tmp_path / "piped.safetensors").read_bytes() == (tmp_path / "named.safetensors").read_bytes()
    for line in (
        ["talking.py:model"],
        ["talking.py:model", "--seeds", "0:1"],
        ["inspect", "talking.py:model"],
        ["compare", "talking.py:model", "talking.py:model"],
        ["verify", "named.safetensors", "talking.py:model"],
    ):
        _, out, err = command(*line, "--json")
        assert isinstance(json.loads(out), dict)
        assert "in a parametrization" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json"], "--out -: expected one run and no --json, which goes to stdout too: name a file"),
        (["--seeds", "0:1"], "--out -: expected one run and no --json, which goes to stdout too: name a file"),
        (["--seeds", "0:2"], "expected a file of its own for each run, got '-'"),
    ],
    ids=["json", "sweep of one", "sweep"],
)
def test_stdout_takes_one_file_alone(options, message, command):
    status, out, err = command(*QUICK, "--out", "-", *options)
    assert (status, out, err.startswith(f"Error: {message}")) == (2, "", True)


def test_a_terminal_gets_no_file():
    terminal, process = start_on_a_terminal(*QUICK, "--out", "-", stream="stdout")
    assert (terminal.read(), finish(process)[0]) == ("", 2)


def test_a_dry_run_shows_what_would_be_done_and_writes_nothing(command, tmp_path):
    status, out, err = command(*QUICK, "--exclude", "layer1.*", "--dry-run", "--out", "init.pt")
    assert (status, err, names(tmp_path)) == (0, "", [])
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert rows[0] == ["layer", "shape", "outcome"]
    assert rows[1] == ["conv1", "64x3x3x3", "planned"]
    assert ["layer2.0.downsample.0", "128x64x1x1", "skipped", "not included"] in rows
    assert out.splitlines()[-2] == "cifar_resnet18, 20 convolutions: 1 planned, 19 skipped"
    assert out.endswith(" s, no checkpoint written\n")


def test_a_dry_run_computes_nothing(command, monkeypatch):
    monkeypatch.setattr("convsim_init.initialize.initialize_layers", lambda *_, **__: pytest.fail("it computes"))
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
            Settings(channels="matched", optimizer="adam", steps=100, tolerance=0.0),
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


def test_calibrate_scales_what_is_written_and_says_by_how_much(command, tmp_path):
    options = ["--include", "conv1", "--steps", "2", "--out"]
    command("cifar_resnet18", *options, "plain.safetensors")
    data = json.loads(command("cifar_resnet18", *options, "scaled.safetensors", "--calibrate", "3x8x8", "--json")[1])
    (layer, *others), factor = data["layers"], data["layers"][0]["factor"]
    assert (data["calibrated"], layer["outcome"], {other["factor"] for other in others}) == (
        [3, 8, 8],
        "initialized",
        {None},
    )
    assert layer["after"]["norm_ratio"] == pytest.approx(factor, rel=1e-5)
    plain, scaled = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "scaled"))
    for key, value in plain.items():
        assert torch.equal(scaled[key], value * factor if key == "conv1.weight" else value)
    with safetensors.safe_open(tmp_path / "scaled.safetensors", "pt") as file:
        about = json.loads(file.metadata()["convsim_init"])
    assert (about["calibrated"], about["totals"]) == ([3, 8, 8], data["totals"])
    out = command("scaled.safetensors", "--like", "cifar_resnet18", "--exclude", "*", "--calibrate", "3x8x8")[1]
    assert re.search(r"^conv1 +64x3x3x3 +skipped +excluded$", out, re.M)


def test_weights_are_drawn_where_a_models_code_lets_the_functions_of_torch_do_nothing(tmp_path):
    nothing = (  # ones, not whatever the memory holds: where that is zeros, as it may be, the layer is left as it is
        "nn.init.kaiming_uniform_ = lambda weight, **_: nn.init.ones_(weight)\n"
        "nn.init.orthogonal_ = lambda weight, **_: weight\n"
    )
    network = "def net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3))\n"
    lines = []
    for name, code in (("plain", network), ("fast", nothing + network)):
        (tmp_path / f"{name}.py").write_text(f"from torch import nn\n{code}")
        done = run_process(f"{name}.py:net", "--base", "orthogonal", cwd=tmp_path)  # a process that never drew
        lines.append(done[1].splitlines()[:2])
        assert done[::2] == (0, "")
    assert lines[0] == lines[1]


def test_calibrate_says_what_it_did_not_scale(command):
    Path("own.py").write_text(
        "from torch import nn\nfrom torch.nn.utils.parametrizations import spectral_norm\n\n\ndef net():\n"
        "    last = nn.Conv2d(8, 8, 3)\n    nn.init.zeros_(last.weight)\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), spectral_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), last)\n"
    )
    status, out, err = command("own.py:net", "--calibrate", "3x16x16")
    assert (status, err) == (0, "")
    assert "not scaled: 1: what computes the weight keeps its scale\n" in out
    assert "not scaled: 0, 3: the model's output does not depend on its scale\n" in out


def test_calibrate_needs_a_model_and_a_shape(command):
    command(*QUICK, "--out", "init.safetensors")
    for options in ([], ["--dry-run"]):
        status, _, err = command("init.safetensors", "--calibrate", "3x8x8", *options)
        assert (status, err) == (
            2,
            "Error: --calibrate: 'init.safetensors' is a file of weights: name their model with --like\n",
        )
    status, _, err = command(*QUICK, "--calibrate", "3x")
    assert (status, "expected channels and sizes such as 3x224x224, got '3x'" in err) == (2, True)


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
    assert f"init.safetensors ({(tmp_path / 'init.safetensors').stat().st_size / 1e3:.1f} kB)" in out
    written = safetensors.torch.load_file(tmp_path / "init.safetensors")
    assert {key: value.dtype for key, value in written.items()} == {"model.conv1.weight": torch.bfloat16}


def test_a_report_is_a_page_with_pictures_and_needs_no_matplotlib(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = command(*QUICK, "--report", "run.html")
    assert (status, err, names(tmp_path)) == (0, "", ["run.html"])
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert text.count("<img") == 4
    assert text.count("<tbody>") == 20
    assert command(*QUICK, "--report", "run.html")[0] == 2
    pages = [*QUICK, "--seeds", "0:2", "--report", "{model}-{seed}.html"]
    assert command(*pages)[0] == 0
    assert names(tmp_path) == ["cifar_resnet18-0.html", "cifar_resnet18-1.html", "run.html"]
    assert "2 runs: 2 kept" in command(*pages)[1]


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
    assert (data["model"], data["seed"]) == ("cifar_resnet18", 3)
    assert [layer["outcome"] for layer in data["layers"]] == ["planned"] * 20


def test_a_file_may_be_called_like_an_option_behind_two_dashes(command, tmp_path):
    torch.save(build_model("cifar_resnet18").state_dict(), tmp_path / "-x.pt")
    for arguments in (["--", "-x.pt"], ["init", "--", "-x.pt"], ["--dry-run", "--", "-x.pt"]):
        status, out, _ = command(*arguments)
        assert (status, "-x.pt, 20 convolutions: 20 " in out) == (0, True)
    status, _, err = command("--", "-x.pt", "--dry-run")
    assert (status, err.startswith("Error: expected the name of a model, got '--dry-run'")) == (2, True)


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


@pytest.mark.parametrize(("pattern", "count"), [([], 21), (["resne*"], 8), (["vgg16_bn"], 1)], ids=str)
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


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option, command):
    assert command(option) == (0, f"convsim-init, version {convsim_init.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["resnet18", "--help"], ["init", "-h"]], ids=" ".join)
def test_the_help_shows_every_option_and_command(arguments, command):
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    usage = "Usage: convsim-init MODEL|FILE... [--out PATH] [OPTIONS]\n   or: convsim-init COMMAND [ARGS]...\n"
    assert out.startswith(usage)
    for parameter in MAIN.cli.commands["init"].params[1:]:
        assert all(re.search(rf"(^|[ ,]){name}[ ,\n]", out, re.M) for name in parameter.opts), parameter.opts
    for name in ("list", "env"):
        assert re.search(rf"^  {name} ", out, re.M)
    assert "Examples:\n    convsim-init resnet18 --out init.safetensors\n" in out
    assert "..." not in out.removeprefix(usage)  # no line is cut short
    titles = re.findall(r"^(\w+):$", out, re.M)
    assert titles == ["Source", "Method", "Output", "Display", "Commands"]
    assert re.search(r"^  -V, --version +Show the version and exit.$", out, re.M)
    display = re.findall(r"^  (?:-\w, )?--([\w-]+)", out.partition("Display:")[2].partition("Commands:")[0], re.M)
    assert display == ["json", "quiet", "verbose", "debug", "help", "version"]


@pytest.mark.parametrize("columns", range(52, 110, 3))
def test_no_line_of_the_help_is_broken_within_a_word(columns, command, monkeypatch):
    words = {word for name in ("--help", "verify", "inspect") for word in command(name, "--help")[1].split()}
    monkeypatch.setenv("COLUMNS", str(columns))
    assert {word for name in ("--help", "verify", "inspect") for word in command(name, "--help")[1].split()} == words


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
    for subcommand in MAIN.cli.commands.values():
        assert subcommand.help
        for option in [p for p in subcommand.params if p.param_type_name == "option"]:
            assert re.fullmatch(r".+\.", option.help, re.S), option.name


def test_the_examples_of_the_help_are_right(command, tmp_path):
    pytest.importorskip("timm")
    torch.save(build_model("timm:regnety_002").state_dict(), tmp_path / "weights.pt")
    examples = re.findall(r"^ +convsim-init (.+)$", INIT.EPILOG, re.M)
    assert len(examples) == 7
    for example in examples:
        assert command(*shlex.split(example), "--dry-run")[0] == 0


def test_without_arguments_it_shows_the_help_on_stderr(command):
    help_text = command("--help")[1]
    assert command() == (2, "", help_text)


# What is refused


def anything_but(*choices: str) -> str:
    return ", ".join(repr(choice) for choice in choices)


def test_help_comes_before_all_errors(command):
    status, out, _ = command("cifar_resnet18", "--out", "a.pt", "--out", "b.pt", "--help")
    assert (status, out) == (0, command("--help")[1])


SEE = "(see 'convsim-init --help')"
GONE = "gone/init.pt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            pytest.param(["cifar_resnet18", *files], f"{files[0]}: expected one file, got several {SEE}", id=files[0])
            for files in (["--out", "a.pt", "-o", "b.pt"], ["--report", "a.json", "--report=a.html"])
        ),
        pytest.param(["--seed", "3"], f"Missing argument 'MODEL|FILE...' {SEE}", id="no-model"),
        pytest.param(
            ["--json", "list"],
            f"'list' is a command, not a model: write it before all options {SEE}",
            id="option-before-command",
        ),
        pytest.param(
            ["resnet18", "--out", GONE],
            "expected an existing folder to write to, got {gone}: create it first",
            id="folder-missing",
        ),
        pytest.param(
            ["resnet18", "--out", "."],
            "expected a file name ending in .safetensors, .pt, .pth, got '.': choose another name",
            id="folder-as-file",
        ),
        *(
            pytest.param(
                ["resnet18", *more, "--out", name],
                f"expected a file name ending in .safetensors, .pt, .pth, got {name!r}: choose another name",
                id=f"not stdout {name}",
            )
            for more, name in [([], "./-"), (["--json"], "./-"), (["--seeds", "0:2"], "-/.")]
        ),
        pytest.param(
            ["resnet18", "-out", "init.pt"],
            "expected a file name ending in .safetensors, .pt, .pth, got 'ut': choose another name",
            id="one-dash",
        ),
        pytest.param(
            ["resnet18", "--out", "f.json/", "--report", "./f.json"],
            "expected another name for each kind of file, got 'f.json' twice: rename one",
            id="two-files-of-a-name",
        ),
        pytest.param(
            ["resnet18", "--key", "model"],
            f"--key: expected a FILE that has that entry, got none: leave it out {SEE}",
            id="key-without-file",
        ),
        pytest.param(
            ["resnet18", "--out", "init.ckpt"],
            "expected a file name ending in .safetensors, .pt, .pth, got 'init.ckpt': choose another name",
            id="suffix",
        ),
        pytest.param(
            ["resnet18", "--out", "old.pt"],
            "'old.pt' exists already: choose another name or pass overwrite=True (--force in the shell)",
            id="file-exists",
        ),
        pytest.param(
            ["resnet18", "--dry-run", "--out", "old.pt"],
            "'old.pt' exists already: choose another name or pass overwrite=True (--force in the shell)",
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
        pytest.param(
            ["resnet18", "--seed", str(2**63)],
            f"Invalid value for '--seed': {2**63} is larger than {2**63 - 1} {SEE}",
            id="seed-too-large",
        ),
        *(
            pytest.param(
                ["resnet18", option, value],
                f"Invalid value for '{option}': '{value}' is not a valid whole number {SEE}",
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
                ("--channels", ("auto", "matched", "all")),
                ("--norm", ("preserve", "free")),
                ("--dtype", ("float32", "float16", "bfloat16", "float64")),
            ]
        ),
        pytest.param(
            ["resnet18", "--steps"], f"Option '--steps' requires an argument {SEE}", id="option-without-value"
        ),
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
            f"--convs-only, --prefix, --dtype, --force: no weights are written without --out {SEE}",
            id="file-options-without-file",
        ),
        pytest.param(
            ["resnet18", "--prefix", "model", "--out", "a.pt"],
            "Invalid value for '--prefix': expected a prefix of keys that ends in a dot, such as 'model.', got 'model' "
            f"{SEE}",
            id="prefix-without-dot",
        ),
        pytest.param(
            ["list", "nothing*"],
            "expected a pattern that a model's name matches, got 'nothing*'; `convsim-init list` shows the built-in "
            "ones, `convsim-init list 'timm:*'` and `convsim-init list 'torchvision:*'` those of the libraries",
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
    monkeypatch.setattr(SOURCE, "build_model", lambda *_, **__: pytest.fail("it builds the model"))
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err == f"Error: {message.format(gone=repr(str(tmp_path / 'gone')))}\n"
    assert names(tmp_path) == ["old.pt"]
    assert (tmp_path / "old.pt").read_bytes() == OLD


def test_an_unknown_option_is_refused(command):
    status, out, err = command("resnet18", "--frobnicate")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"Error: No such option.*--frobnicate.* \(see 'convsim-init --help'\)\n", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--include", "layer9.*"],
            "include: no convolution matches 'layer9.*'; the convolutions are 'conv1', 'layer1.0.conv1', "
            "'layer1.0.conv2', 'layer1.1.conv1' and 16 more",
            id="include-nothing",
        ),
        pytest.param(
            ["--exclude", "fc"],
            "exclude: no convolution matches 'fc'; the convolutions are 'conv1', 'layer1.0.conv1', 'layer1.0.conv2', "
            "'layer1.1.conv1' and 16 more",
            id="exclude-nothing",
        ),
        pytest.param(
            ["--exclude", "layer1.0.cnv1"],
            "exclude: no convolution matches 'layer1.0.cnv1'; the convolutions are 'conv1', 'layer1.0.conv1', "
            "'layer1.0.conv2', 'layer1.1.conv1' and 16 more: did you mean layer1.0.conv1 or layer4.0.conv1 "
            "or layer3.0.conv1?",
            id="exclude-mistyped",
        ),
        pytest.param(
            ["--exclude", "*", "--convs-only"],
            "convs_only: expected a report of changed convolutions, got one that changed none",
            id="no-convs-changed",
        ),
        pytest.param(
            ["--device", "cuda:99"],
            f"expected a device that is here ({', '.join(available_devices())}) or auto, got 'cuda:99': choose another",
            id="device-not-there",
        ),
    ],
)
def test_what_only_the_model_or_torch_can_tell_is_refused_too(arguments, message, command, tmp_path):
    assert command("cifar_resnet18", *arguments, "--out", "init.pt") == (2, "", f"Error: {message}\n")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "cards", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cpu"),
        ("cpu", 2, "cpu"),
        ("cuda", 2, "cuda"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda:2", 2, None),
        ("cuda", 0, None),
        ("mps", 2, None),
    ],
)
def test_a_device_is_found_by_its_name_or_refused(name, cards, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if expected is None:
        here = "cpu, cuda, cuda:0, cuda:1" if cards else "cpu"
        with pytest.raises(InputError) as caught:
            find_device(name)
        assert str(caught.value) == f"expected a device that is here ({here}) or auto, got {name!r}: choose another"
    else:
        assert find_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB"
            ),
            "CUDA out of memory",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ..."),
            "CUDA error: no kernel image is available for execution on the device",
        ),
        (
            RuntimeError("CUDA error: device is lost\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"),
            "CUDA error: device is lost",
        ),
        (RuntimeError("Triton Error [CUDA]: unknown error"), "Triton Error [CUDA]: unknown error"),
    ],
    ids=["full", "old", "gone", "in Triton"],
)
@pytest.mark.parametrize("sweeping", [False, True], ids=["one run", "a sweep"])
def test_a_gpu_that_fails_is_told_in_one_line(error, sentence, sweeping, command, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("convsim_init.initialize.initialize_layers", fail)
    status, out, err = command(*QUICK, *(["--seeds", "0:2"] if sweeping else []))
    wanted = f"the GPU cannot compute this: {sentence}; --device cpu computes it without one"
    assert status == 1
    assert (out if sweeping else err).count(wanted) == (2 if sweeping else 1)
    assert sweeping or err == f"Error: {wanted}\n"


def test_other_errors_are_not_the_gpus(command, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a tensor is too small")

    monkeypatch.setattr("convsim_init.initialize.initialize_layers", fail)
    assert "a tensor is too small (--debug shows where)" in command(*QUICK)[2]


def test_mps_is_the_cpu_and_the_run_says_so(command, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    report = json.loads(command(*QUICK, "--device", "mps", "--json")[1])
    assert report["device"] == "cpu"
    assert report["remarks"] == [MPS_REMARK]
    assert json.loads(command(*QUICK, "--json")[1])["remarks"] == []


def small(*, conv: bool = True, nan_in: str = "") -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3) if conv else nn.Flatten(), nn.Conv1d(1, 1, 1) if conv else nn.Linear(2, 2))
    model.add_module("last", nn.Conv2d(4, 4, 1) if conv else nn.ReLU())
    model.add_module("head", nn.Linear(4, 2))
    for name in nan_in.split():
        model.get_parameter(name).data.view(-1)[0] = float("nan")
    return model


@pytest.fixture
def build(monkeypatch):
    """Let every name build the given model."""
    return lambda model: monkeypatch.setattr(SOURCE, "build_model", lambda *_, **__: model)


@pytest.mark.parametrize("options", [[], ["--out", "init.pt"], ["--dry-run"]], ids=["show", "write", "dry-run"])
def test_a_model_without_convolutions_is_refused(options, build, command, tmp_path):
    build(small(conv=False))
    message = "Error: expected a model with convolutions, got Sequential, which has none\n"
    assert command("resnet18", *options) == (2, "", message)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("where", "layers"),
    [("0.weight", "layer '0'"), ("0.weight last.weight", "layer '0' and 1 more")],
    ids=["one", "two"],
)
@pytest.mark.parametrize("options", [[], ["--out", "old.pt", "--force"]], ids=["show", "write"])
def test_a_layer_that_fails_fails_the_run(where, layers, options, build, command, tmp_path):
    (tmp_path / "old.pt").write_bytes(OLD)
    build(small(nan_in=where))
    status, out, err = command("resnet18", *options)
    reason = "left as it was: its weight holds infinities or NaN"
    advice = "nothing was written; --base draws layers anew, --exclude leaves them alone, --without leaves them out"
    assert (status, err) == (1, f"Error: {layers} failed, {reason}; {advice} of the file\n")
    assert re.search(rf"^0 +4x3x3x3 +failed +{reason}$", out, re.M)
    assert out.endswith("no checkpoint written\n")
    assert (tmp_path / "old.pt").read_bytes() == OLD


@pytest.mark.parametrize(
    "remedy", [["--base", "kaiming_normal"], ["--exclude", "0", "--without", "0.*"]], ids=["drawn-anew", "left-out"]
)
def test_what_is_advised_for_a_layer_that_fails_helps(remedy, build, command, tmp_path):
    build(small(nan_in="0.weight"))
    assert command("resnet18", "--out", "init.pt", *remedy)[0] == 0
    assert names(tmp_path) == ["init.pt"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["nope.*"], "expected a pattern that a key matches, got 'nope.*'; the keys are '"),
        (["head"], "expected a pattern that a key matches, got 'head'; did you mean 'head.*'?"),
        (["*.weight", "*"], "expected patterns that leave a key, got '*.weight', '*': all keys match"),
    ],
    ids=["none-matches", "module", "all-match"],
)
@pytest.mark.parametrize("more", [[], ["--convs-only"]], ids=["all", "convs"])
def test_what_to_leave_out_is_refused_before_the_work(patterns, message, more, build, command, monkeypatch, tmp_path):
    build(small())
    monkeypatch.setattr("convsim_init.initialize.initialize_layers", lambda *_, **__: pytest.fail("worked in vain"))
    options = [word for pattern in patterns for word in ("--without", pattern)]
    status, out, err = command("resnet18", *options, *more, "--out", "init.pt")
    assert (status, out, err.startswith(f"Error: {message}")) == (2, "", True), err
    assert names(tmp_path) == []


def test_a_layer_that_fails_is_in_the_json(build, command):
    build(small(nan_in="0.weight"))
    status, out, err = command("resnet18", "--json")
    assert status == 1
    assert len(err.splitlines()) == 1
    assert [layer["outcome"] for layer in json.loads(out)["layers"]] == ["failed", "skipped", "skipped"]


@pytest.mark.parametrize("where", ["head.bias", "1.bias"], ids=["no-convolution", "bias-of-a-convolution"])
def test_other_weights_that_are_not_finite_are_refused(where, build, command, tmp_path):
    build(small(nan_in=where))
    message = f"Error: {where}: expected finite numbers, got infinities or NaN: draw it anew, or leave it out "
    message += "with exclude (--without in the shell)\n"
    assert command("resnet18", "--out", "init.pt") == (2, "", message)
    assert names(tmp_path) == []


# What fails


def raises(error: BaseException):
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("two\n  lines"), "Error: RuntimeError: two lines (--debug shows where)\n"),
        (MemoryError(), "Error: MemoryError (--debug shows where)\n"),
        (ValueError("bad"), "Error: ValueError: bad (--debug shows where)\n"),
    ],
    ids=["of-torch", "no-memory", "no-input-error"],
)
def test_an_unforeseen_error_is_one_line(error, message, command, tmp_path, monkeypatch):
    monkeypatch.setattr(SOURCE, "build_model", raises(error))
    assert command("resnet18", "--out", "init.pt") == (1, "", message)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "status", "last"),
    [
        (["resnet18"], 1, "Error: RuntimeError: why (--debug shows where)"),
        (["gone.py:make"], 2, "Error: expected a Python file to read, got 'gone.py'"),
        (["list", "nothing"], 2, "Error: expected a pattern"),
    ],
    ids=["failure", "input", "list"],
)
def test_debug_shows_the_traceback_and_keeps_the_status(arguments, status, last, command, monkeypatch):
    monkeypatch.setattr(SOURCE, "build_model", raises(RuntimeError("why")))
    actual, out, err = command(*arguments, "--debug")
    assert (actual, out) == (status, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.splitlines()[-1].startswith(last)
    assert "Traceback" not in command(*arguments)[2]


@pytest.fixture
def a_megabyte_of_disk():
    resource = pytest.importorskip("resource", reason="needs limits of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("a_megabyte_of_disk")
@pytest.mark.parametrize("name", ["init.safetensors", "init.pt"])
def test_a_full_disk_fails_in_one_line_and_keeps_the_old_file(name, command, tmp_path):
    (tmp_path / name).write_bytes(OLD)
    status, out, err = command(*QUICK, "--out", name, "--force")
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"Error: could not write '{name}': .*File too large.*; nothing changed there\n", err)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == OLD


@pytest.mark.parametrize(
    "place", ["convsim_init.initialize.initialize_layers", "safetensors.torch.save_file", "os.fsync"]
)
def test_an_interrupt_anywhere_is_one_line(place, command, tmp_path, monkeypatch):
    monkeypatch.setattr(place, raises(KeyboardInterrupt()))
    assert command(*QUICK, "--out", "init.safetensors") == (130, "", INTERRUPTED)
    assert names(tmp_path) == []


@pytest.mark.parametrize("arguments", [["resnet18"], ["env"]], ids=" ".join)
def test_python_gets_its_interrupts_back_after_the_import_of_torch(arguments, command):
    command(*arguments, "--dry-run") if arguments == ["resnet18"] else command(*arguments)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# As a process of its own


def test_two_runs_write_the_same_bytes(tmp_path):
    printed = []
    for run in ("1", "2"):
        (tmp_path / run).mkdir()
        environment = os.environ | {"PYTHONHASHSEED": run, "OMP_NUM_THREADS": run}
        arguments = ["cifar_resnet18", "--steps", "2", "--out", "init.safetensors", "--json"]
        status, out, err = run_process(*arguments, cwd=tmp_path / run, env=environment)
        assert (status, err) == (0, "")
        printed.append(without_times(json.loads(out)))
    first, second = (tmp_path / run / "init.safetensors" for run in ("1", "2"))
    assert first.read_bytes() == second.read_bytes()
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    "arguments",
    [["{}"], ["{}.py:make"], ["inspect", "{}"], ["verify", "{}", "resnet18"], ["run", "{}.py"]],
    ids=["model", "factory", "inspect", "verify", "run"],
)
def test_a_name_too_long_for_a_file_is_refused_as_any_other(arguments, command):
    status, out, err = command(*(argument.format("a" * 300) for argument in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("Error: expected ")


@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-m", "convsim_init"]], ids=["script", "module"])
def test_it_is_called_by_its_name_and_by_that_of_the_package(command, tmp_path):
    done = subprocess.run([*command, "list", "--nope"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"Error: No such option.* \(see 'convsim-init list --help'\)\n", done.stderr)
    done = subprocess.run([*command, "list", "vgg11"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "vgg11", "")


QUICKLY = """
import sys
from convsim_init.cli.main import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "numpy", "matplotlib", "safetensors", "tqdm"} & sys.modules.keys()
    print("imported:", *heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["resnet18", "--help"], 0),
        (["list"], 0),
        (["list", "--json"], 0),
        (["--version"], 0),
        (["completion", "zsh"], 0),
        ([], 2),
        (["resnet18", "--steps", "0"], 2),
        (["resnet18", "--num-classes", "0"], 2),
        (["resnet18", "--device", "gpu"], 2),
        (["resnet18", "--out", "gone/init.pt"], 2),
        (["resnet18", "--out", "init"], 2),
        (["verify", "gone.pt", "resnet18"], 2),
        (["resnet18", "--pairs", "x"], 2),
        (["inspect", "--help"], 0),
        (["compare", "--help"], 0),
        (["inspect", "gone.pt"], 2),
        (["compare", "resnet18", "gone.pt"], 2),
        (["resnet18", "--plot", "a.jpg"], 2),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_needs_no_torch_answers_without_importing_it(arguments, status, tmp_path):
    process = [sys.executable, "-c", QUICKLY, *arguments]
    done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, "imported:")


INTERRUPTED_IMPORT = """
import signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from convsim_init.cli.main import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("click", QUICK),
        ("torch", QUICK),
        ("numpy", QUICK),  # torch's C code imports it, and drops what that raises
        ("convsim_init.checkpoint.save", QUICK),
        ("numpy", ["env"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_an_interrupt_during_the_imports_ends_the_command(module, arguments, tmp_path):
    process = [sys.executable, "-c", INTERRUPTED_IMPORT, module, *arguments]
    done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", INTERRUPTED)


@pytest.mark.posix
def test_an_interrupt_before_all_other_imports_ends_the_command_without_a_word(tmp_path):
    process = [sys.executable, "-c", INTERRUPTED_IMPORT, "convsim_init.cli.signals", "list"]
    done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


TWO_SIGNALS = """
import signal, sys
from convsim_init.cli import main as command
first, second = map(int, sys.argv[1:])
def run(*_, **__):
    try:
        signal.raise_signal(first)
    finally:
        signal.raise_signal(second)
        print("cleaned up")
command._run = run
command.main()
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["then-int", "then-term"])
@pytest.mark.parametrize(
    ("first", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["int", "term"],
)
def test_a_second_signal_does_not_break_off_the_cleaning_up(first, second, status, word):
    process = [sys.executable, "-c", TWO_SIGNALS, str(int(first)), str(int(second))]
    done = subprocess.run(process, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "cleaned up\n")
    assert done.stderr == f"Error: {word}; no partial file is left\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.posix
def test_a_signal_after_the_end_says_nothing(number):
    code = "import atexit, os, sys\nfrom convsim_init.cli.main import main\n"
    code += f"atexit.register(os.kill, os.getpid(), {int(number)})\nmain()"
    done = subprocess.run([sys.executable, "-c", code, "list", "vgg11"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-number, "")
    assert done.stdout.startswith("vgg11 ")


class Terminal:
    """A terminal of 100 columns for a process to write to."""

    def __init__(self) -> None:
        fcntl, pty, termios = (pytest.importorskip(name, reason="needs POSIX") for name in ("fcntl", "pty", "termios"))
        self._ours, self.end = pty.openpty()
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.text = ""

    def read(self, until: str = "") -> str:
        """What was written, up to that text or, without one, the end."""
        deadline = time.monotonic() + 60
        while not (until and until in self.text) and time.monotonic() < deadline:
            if select.select([self._ours], [], [], 1)[0]:
                try:
                    self.text += os.read(self._ours, 4096).decode()
                except OSError:  # Linux tells the end in this way
                    break
        return self.text


def start_on_a_terminal(*arguments: str, stream: str = "stderr", **options: object):
    terminal = Terminal()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: terminal.end}
    process = start(*arguments, **streams, **options)
    os.close(terminal.end)
    return terminal, process


def test_a_terminal_shows_progress_and_only_on_stderr(tmp_path):
    terminal, process = start_on_a_terminal(*QUICK)
    shown = terminal.read()
    assert "layers:   0%" in shown
    assert "| 00:00, ? left" in shown
    assert re.search(r"\r +\r$", shown)  # the bar is wiped off
    status, out, _ = finish(process)
    assert status == 0
    assert out.startswith("layer ")
    assert "%|" not in out


def test_quiet_shows_no_progress_on_a_terminal():
    terminal, process = start_on_a_terminal(*QUICK, "--quiet")
    assert (terminal.read(), finish(process)[:2]) == (LOST.replace("\n", "\r\n"), (0, ""))


@pytest.mark.parametrize(
    ("arguments", "bold"),
    [(["--help"], "Usage: "), (["gone.py:make"], "Error:")],
    ids=["help", "error"],
)
def test_a_terminal_gets_colours_as_the_environment_says(arguments, bold):
    stream = "stderr" if bold == "Error:" else "stdout"

    def shown(**variables: str) -> str:
        rest = {key: value for key, value in os.environ.items() if not key.endswith("_COLOR")}
        terminal, process = start_on_a_terminal(*arguments, stream=stream, env=rest | variables)
        finish(process)
        return terminal.read()

    assert re.search(rf"\x1b\[[0-9;]*1m{bold}", shown())
    assert "\x1b" not in shown(NO_COLOR="1")
    assert "\x1b" not in "".join(run_process(*arguments)[1:])
    _, out, err = run_process(*arguments, env=os.environ | {"FORCE_COLOR": "1"})
    assert "\x1b" in (err if stream == "stderr" else out)


def test_a_table_fits_its_terminal_and_a_file_gets_all_of_it():
    environment = os.environ | {"COLUMNS": "72"}
    terminal, process = start_on_a_terminal(*QUICK, stream="stdout", env=environment)
    finish(process)
    header, *lines = terminal.read().replace("\r", "").splitlines()
    assert header == "\x1b[1mlayer                  similarity before -> after\x1b[0m"
    assert max(map(len, lines[:20])) <= 72
    assert lines[-1] == "left out to fit 72 columns: norm ratio, shape"
    whole = run_process(*QUICK, env=environment)[1].splitlines()
    assert (whole[0].split()[-2:], max(map(len, whole[:20])) > 72) == (["norm", "ratio"], True)


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_an_interrupt_of_the_descent_ends_it_and_leaves_no_partial_file(there, tmp_path):
    path = tmp_path / "init.safetensors"
    if there:
        path.write_bytes(OLD)
    endless = ["cifar_resnet18", "--preset", "paper", "--steps", "1000000"]
    terminal, process = start_on_a_terminal(*endless, "--out", path, "--force")
    try:
        assert "layers:   0%" in terminal.read(until="layers:   0%")
        time.sleep(0.5)  # into the descent
        process.send_signal(signal.SIGINT)
        assert terminal.read().endswith(f"\n{INTERRUPTED}".replace("\n", "\r\n"))
        assert terminal.text.count("\n") == 2  # no traceback, of a thread either
        assert finish(process)[:2] == (130, "")
    finally:
        process.kill()
    assert names(tmp_path) == [path.name] * there
    assert not there or path.read_bytes() == OLD


# Streams that end early


@pytest.mark.parametrize("arguments", [["list"], ["resnet18", "--dry-run"], ["--help"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_error(arguments):
    ours, theirs = os.pipe()
    os.close(ours)
    process = start(*arguments, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    status, _, err = finish(process)
    assert (status, err) == (1, "")


@pytest.mark.posix
def test_a_full_device_as_stdout_is_one_line(tmp_path):
    with Path("/dev/full").open("w") as full:
        status, _, err = finish(start("list", stdout=full, stderr=subprocess.PIPE))
    assert (status, err) == (1, "Error: could not write to stdout: No space left on device; send it elsewhere\n")


@pytest.mark.parametrize("line", ["list --json", "cifar_resnet18 --json", "inspect cifar_resnet18 --csv"])
@pytest.mark.posix
def test_data_for_a_closed_stdout_is_not_lost_without_a_word(line):
    program = f"'{sys.executable}' -m convsim_init"
    done = subprocess.run(f"{program} {line} >&-", shell=True, capture_output=True, text=True)
    option = line.split()[-1]
    message = f"Error: {option}: expected stdout to print to, got a closed one: send it to a file\n"
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.posix
def test_a_file_for_a_closed_stdout_is_refused_before_the_work():
    line = f"'{sys.executable}' -m convsim_init cifar_resnet18 --out - >&-"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    message = f"Error: --out -: expected stdout to go to a file or a program, got a closed one: add '> FILE' {SEE}\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize(
    ("line", "status"),
    [("list >&-", 0), ("gone.py:make 2>&-", 2), (f"{' '.join(QUICK)} >&- 2>&-", 0)],
    ids=["stdout", "stderr", "both"],
)
@pytest.mark.posix
def test_closed_streams_are_no_error(line, status):
    done = subprocess.run(f"'{SCRIPT}' {line}", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_pattern_of_a_config_file_counts_only_where_something_is_written(build, command, tmp_path):
    build(small())
    (tmp_path / "run.toml").write_text('without = ["nope.*"]\n')
    assert command("resnet18", "--config", "run.toml", "--steps", "2")[0] == 0
    assert command("resnet18", "--config", "run.toml", "--out", "init.pt")[0] == 2
