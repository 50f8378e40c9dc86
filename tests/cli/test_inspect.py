"""The commands that look: inspect, compare, and what the main command records and draws."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
import safetensors.torch
import torch
from folders import OLD, names
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from words import MISSING

from convsim_init import InputError, Settings, __version__, build_model, initialize_, measure, save_checkpoint
from convsim_init.cli.sources import INFERRED
from convsim_init.metrics.compare import compare
from convsim_init.report.table import COLUMNS

INSPECT, COMPARE = (
    import_module("convsim_init.cli.commands.inspect"),
    import_module("convsim_init.cli.commands.compare"),
)
QUICK = ["cifar_resnet18", "--include", "conv1", "--steps", "2"]
MEASURES = [
    *("similarity", "normalized_similarity"),
    *("feature_correlation_white", "effective_rank_white", "feature_correlation_natural", "effective_rank_natural"),
]


def cells(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line) for line in text.split("\n\n")[0].splitlines()]


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, groups=4))


# inspect


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors"])
def test_inspect_measures_a_file(name, command, tmp_path):
    state = small().state_dict()
    safetensors.torch.save_file(state, name) if name == "a.safetensors" else torch.save({"state_dict": state}, name)
    status, out, err = command("inspect", name)
    assert (status, err, names(tmp_path)) == (0, "", [name])
    header, *rows = cells(out)
    assert header == ["layer", "shape", *COLUMNS]
    report = measure(state)
    for row, layer in zip(rows[:2], report.layers, strict=False):
        values = [layer.before[measure] for measure in COLUMNS.values()]
        assert row == [
            layer.name,
            "x".join(map(str, layer.shape)),
            f"{values[0]:.3e}",
            *(f"{v:.4f}" for v in values[1:]),
        ]
    assert rows[2][:7] == ["3", "4x1x3x3", *"----", rows[2][6]]
    assert rows[2][6].startswith("skipped: looks depthwise")
    assert rows[3][0] == "mean of 2"
    assert f"\n{name}, 3 convolutions: 2 measured, 1 skipped\n" in out


def test_letters_that_stdout_cannot_encode_are_escaped(tmp_path):
    """As on Windows, where a pipe takes those of western Europe alone."""
    torch.save({"\u4e2d.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "a.pt")
    process = [sys.executable, "-m", "convsim_init", "inspect", "a.pt"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(process, capture_output=True, encoding="cp1252", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout.splitlines()[1].split()[0]) == (0, r"\u4e2d")


def test_inspect_measures_a_model_with_its_groups(command):
    data = json.loads(command("inspect", "cifar_resnet18", "--seed", "3", "--json")[1])
    expected = measure(build_model("cifar_resnet18", seed=3))
    assert (data["model"], data["seed"], data["file"]) == ("cifar_resnet18", 3, None)
    assert [layer["before"] for layer in data["layers"]] == [layer.before for layer in expected.layers]
    assert [layer["reason"] for layer in data["layers"]] == [None] * 20
    assert set(data["layers"][0]["before"]) == set(MEASURES)
    assert data["totals"] == expected.totals


@pytest.mark.parametrize("column", COLUMNS)
def test_inspect_sorts_from_high_to_low(column, command):
    torch.save(small().state_dict(), "a.pt")
    data = json.loads(command("inspect", "a.pt", "--sort", column, "--json")[1])
    values = [layer["before"].get(COLUMNS[column]) for layer in data["layers"]]
    assert values[2] is None
    assert values[0] > values[1]


def test_inspect_shows_the_included_layers_alone_and_their_totals(command):
    data = json.loads(command("inspect", "cifar_resnet18", "--include", "layer4.*", "--include", "conv1", "--json")[1])
    assert [layer["name"] for layer in data["layers"]][:2] == ["conv1", "layer4.0.conv1"]
    assert data["totals"]["layers"] == len(data["layers"]) == 6
    arguments = ("inspect", "cifar_resnet18", "--include", "layer4.*", "--exclude", "*.conv?")
    assert [layer["name"] for layer in json.loads(command(*arguments, "--json")[1])["layers"]] == [
        "layer4.0.downsample.0"
    ]
    status, out, err = command(*arguments, "--exclude", "*.0")
    assert (status, out, "expected patterns that leave a layer, got '*.conv?', '*.0'" in err) == (2, "", True)


def test_inspect_prints_values_for_a_spreadsheet(command):
    torch.save(small().state_dict(), "a.pt")
    rows = list(csv.DictReader(io.StringIO(command("inspect", "a.pt", "--csv")[1])))
    assert [row["name"] for row in rows] == ["0", "2", "3"]
    report = measure(torch.load("a.pt"))
    for name, value in report.layers[0].before.items():
        assert float(rows[0][name]) == pytest.approx(value, rel=1e-6)
    assert rows[2]["similarity"] == ""
    assert rows[0]["shape"] == "6x3x3x3"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_inspect_draws_a_picture(suffix, command, tmp_path):
    torch.save(small().state_dict(), "a.pt")
    status, out, err = command("inspect", "a.pt", "--plot", f"a.{suffix}", "--plot-layer", "2", "--include", "[02]")
    assert (status, err, names(tmp_path)) == (0, "", [f"a.{suffix}", "a.pt"] if suffix == "pdf" else names(tmp_path))
    assert (tmp_path / f"a.{suffix}").stat().st_size > 5000
    assert "mean of 2" in out


def test_inspect_tells_of_weights_that_are_not_finite(command):
    state = small().state_dict()
    state["0.weight"][0] = float("nan")
    torch.save(state, "a.pt")
    status, out, _ = command("inspect", "a.pt")
    assert status == 0
    assert re.search(r"^0 .* failed: its weight holds infinities or NaN$", out, re.M)


# compare


def test_compare_shows_measures_side_by_side_and_what_differs(command):
    first, second = small().state_dict(), small().state_dict()
    second["2.weight"] = -2 * second["2.weight"]
    second["1.bias"] = second["1.bias"] + 1
    torch.save(first, "a.pt")
    torch.save(second, "b.pt")
    status, out, err = command("compare", "a.pt", "b.pt")
    assert (status, err) == (0, "")
    rows = cells(out)
    assert rows[0] == ["layer", "shape", *COLUMNS, "weights"]
    assert rows[1] == ["", *"ABABABAB"]
    values = measure(first).layers[0].before
    assert rows[2][:4] == ["0", "6x3x3x3", *[f"{values['normalized_similarity']:.3e}"] * 2]
    assert [row[-1] for row in rows[2:5]] == ["identical", "different", "identical"]
    assert rows[5][0] == "mean of the measured"
    summary = out.split("\n\n")[1].splitlines()
    assert summary[0].startswith("A  a.pt, 3 convolutions: 2 measured, 1 skipped")
    assert summary[1].startswith("B  b.pt, 3 convolutions: 2 measured, 1 skipped")
    assert summary[2:] == [
        f"A, B: {INFERRED}",
        "A, B: skipped, looks depthwise, by its shape alone: one filter per group shares its channels with no other: 3",
        "11 entries of their state dicts: 9 identical, 2 different",
        "different, and no convolution's weight: 1.bias",
    ]


def test_compare_knows_weights_by_their_factors_and_under_every_name():
    def net(scale: float) -> nn.Module:
        model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        model.append(nn.Sequential(model[1]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.arange(1, parameter.numel() + 1).view_as(parameter).sqrt() * scale)
        return model

    last = compare([("a", net(1)), ("b", net(2))]).table.text().splitlines()[-1]
    assert last == "different, and no convolution's weight: 0.bias, 1.bias, 2.weight, 2.bias and 1 more"  # 3.0.bias


def test_compare_tells_which_weights_of_a_file_it_took(command):
    state = small().state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "model_ema": state}, "a.pt")
    torch.save(state, "b.pt")
    status, out, err = command("compare", "a.pt", "b.pt")
    assert (status, err) == (0, "")
    assert "A: the weights are those under 'model'; --key takes another: model_ema" in out
    assert "A: 'module.' was taken off every key of a.pt; --prefix module. puts it back" in out
    status, out, _ = command("compare", "a.pt", "b.pt", "--json")
    assert [len(remarks) for remarks in json.loads(out)["remarks"]] == [3, 1]


def test_compare_tells_of_missing_layers_and_other_shapes():
    first = {"a.weight": torch.randn(4, 3, 3, 3), "b.weight": torch.randn(4, 4, 1, 1), "head": torch.ones(10)}
    second = {"a.weight": torch.randn(8, 3, 3, 3), "c.weight": torch.randn(4, 4, 1, 1), "head": torch.ones(10)}
    compared = compare([("x", first), ("y", second), ("z", first)])
    rows = {row[0]: row for row in compared.table.rows}
    assert rows["a"][1] == "4x3x3x3 / 8x3x3x3"
    assert [rows[name][-1] for name in "abc"] == ["shapes differ", "only in A, C", "only in B"]
    assert rows["b"][2].split()[1] == "-"
    assert compared.table.text().splitlines()[-4:] == [
        "4 entries of their state dicts: 1 identical, 1 shapes differ, 2 not in all",
        "shapes differ: a.weight (4x3x3x3 / 8x3x3x3)",
        "only in A, C: b.weight",
        "only in B: c.weight",
    ]


@pytest.mark.parametrize(
    ("other", "weights"),
    [
        pytest.param(lambda w: w.clone(), "identical", id="copy"),
        pytest.param(lambda w: w.double(), "identical", id="dtype"),
        pytest.param(lambda w: w + 1e-3, "different", id="values"),
        pytest.param(lambda w: w.bfloat16(), "different", id="rounded"),
        pytest.param(lambda w: w.flip(0), "different", id="permuted"),
    ],
)
def test_weights_are_compared_by_value(other, weights):
    weight = torch.randn(4, 3, 3, 3)
    weight[0, 0, 0, 0] = float("nan")
    compared = compare([("a", {"c.weight": weight}), ("b", {"c.weight": other(weight)})])
    assert compared.layers[0].weights == weights


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(torch.uint16, torch.int32, id="unsigned"),
        pytest.param(torch.float8_e5m2, torch.int64, id="float8"),
        pytest.param(torch.float8_e5m2, torch.complex64, id="complex"),
    ],
)
def test_entries_of_dtypes_that_torch_does_not_promote_are_compared(one, other):
    for last, weights in ((3, "identical"), (4, "different")):
        entries = [torch.tensor([1, 2, 3]).to(one), torch.tensor([1, 2, last]).to(other)]
        compared = compare(
            [(name, {"c.weight": torch.ones(2, 1, 1), "x": x}) for name, x in zip("ab", entries, strict=True)]
        )
        assert [entry.weights for entry in compared.entries] == ["identical", weights]


def test_compare_takes_models_and_any_number(command):
    torch.save({f"module.{key}": value for key, value in build_model("cifar_resnet18").state_dict().items()}, "a.pt")
    data = json.loads(command("compare", "cifar_resnet18", "a.pt", "cifar_resnet18", "--json")[1])
    assert data["compared"] == ["cifar_resnet18", "a.pt", "cifar_resnet18"]
    assert {layer["weights"] for layer in data["layers"]} == {"identical"}
    assert {entry["weights"] for entry in data["entries"]} == {"identical"}
    assert len(data["entries"]) == 122
    assert data["totals"][0] == data["totals"][2]
    layer = data["layers"][0]
    assert layer["shapes"] == [[64, 3, 3, 3]] * 3
    assert set(layer["measures"][0]) == set(MEASURES)
    assert layer["outcomes"] == ["measured"] * 3


def test_compare_reads_a_file_as_the_model_beside_it(command):
    Path("own.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.ConvTranspose2d(8, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2))\n"
    )
    assert command("own.py:net", "--out", "a.pt", "-q")[0] == 0
    compared = json.loads(command("compare", "own.py:net", "a.pt", "--json")[1])
    expected = json.loads(command("inspect", "a.pt", "--like", "own.py:net", "--json")[1])
    assert [layer["measures"][1] for layer in compared["layers"]] == [layer["before"] for layer in expected["layers"]]
    assert "a.pt is read as weights of own.py:net" in command("compare", "own.py:net", "a.pt")[1]


def test_compare_tells_of_what_has_no_values():
    small, eight = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3).to(torch.float8_e4m3fn)
    models = [nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 8, 3, device="meta")) for _ in range(2)]
    compared = compare([(name, model) for name, model in zip("ab", models, strict=True)])
    assert {entry.weights for entry in compared.entries} == {"without values"}
    assert compared.table.text().endswith(f"{len(compared.entries)} without values")
    states = [{"a.weight": small, "b.weight": eight}, {"a.weight": small.to_sparse(), "b.weight": eight.float()}]
    compared = compare([(name, state) for name, state in zip("ab", states, strict=True)])
    assert {entry.weights for entry in compared.entries} == {"identical"}


OWN_NET = """
from torch import nn
def net(num_classes=5):
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, num_classes))
"""


def test_a_file_says_what_made_it(command, tmp_path):
    (tmp_path / "own.py").write_text(OWN_NET)
    assert command("own.py:net", "--num-classes", "7", "--seed", "3", "--out", "seven.safetensors")[0] == 0
    made = f"written by convsim-init {__version__}: own.py:net, seed 3, num_classes 7\n"
    for arguments in (["seven.safetensors"], ["seven.safetensors", "--like", "own.py:net", "--num-classes", "7"]):
        status, out, _ = command("inspect", *arguments)
        assert (status, made in out) == (0, True)
    state = safetensors.torch.load_file("seven.safetensors")
    for record in ('{"version": "1", "model": "a\\nb", "seed": null, "base": "model", "options": []}', "{}", "[]"):
        safetensors.torch.save_file(state, "odd.safetensors", metadata={"convsim_init": record})
        status, out, _ = command("inspect", "odd.safetensors")
        assert (status, "written by convsim-init 1: a\\nb\n" in out) == (0, "version" in record)
    model = small()
    save_checkpoint(model, "python.safetensors", report=initialize_(model))  # which no command named
    assert f"written by convsim-init {__version__}\n" in command("inspect", "python.safetensors")[1]


def test_a_part_of_a_checkpoint_is_told_as_such(command):
    state = {"0.weight": torch.randn(4, 3, 3, 3)}
    for number, count in ((1, 2), (1, 1)):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        safetensors.torch.save_file(state, name)
        status, out, _ = command("inspect", name)
        assert (status, f"{name} is part 1 of 2 of a checkpoint" in out) == (0, count == 2)


def test_a_file_without_the_classifier_is_measured_as_the_models(command, tmp_path):
    (tmp_path / "own.py").write_text(OWN_NET)
    assert command("own.py:net", "--num-classes", "7", "--out", "seven.safetensors")[0] == 0
    status, out, _ = command("inspect", "seven.safetensors", "--like", "own.py:net")
    assert status == 0
    assert "2 convolutions: 2 measured\n" in out
    assert "other shape, 2: 3.weight (file 7x4, model 5x4), 3.bias (file 7, model 5)\n" in out
    state = safetensors.torch.load_file("seven.safetensors")
    del state["1.bias"]
    safetensors.torch.save_file(state, "less.safetensors")
    status, _, err = command("inspect", "less.safetensors", "--like", "own.py:net")
    assert (status, "expected a file with all convolutions of the model, got less.safetensors" in err) == (2, True)
    status, _, err = command("seven.safetensors", "--like", "own.py:net", "--out", "eight.safetensors")
    assert (status, "expected a file that is complete for the model" in err) == (2, True)


def test_compare_draws_a_picture(command, tmp_path):
    for seed in (0, 1):
        torch.save(small(seed).state_dict(), f"{seed}.pt")
    assert command("compare", "0.pt", "1.pt", "--plot", "a.png", "--plot-layer", "2")[0] == 0
    assert names(tmp_path) == ["0.pt", "1.pt", "a.png"]


def test_a_parametrized_layer_is_compared_by_its_entries():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    compared = compare([("a", model), ("b", model)])
    assert [layer.weights for layer in compared.layers] == ["computed by a parametrization"]
    assert {entry.weights for entry in compared.entries} == {"identical"}
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    compared = compare([("a", plain), ("b", model), ("c", nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3)))])
    assert [layer.weights for layer in compared.layers] == ["not in all", "not in all"]
    compared = compare([("a", plain), ("b", model)])
    assert [layer.weights for layer in compared.layers] == ["computed by a parametrization"]
    assert "only in" not in compared.table.rows[1][-1]


def test_one_alone_cannot_be_compared():
    with pytest.raises(InputError, match="at least two"):
        compare([("a", small())])


# What the main command records and draws


@pytest.fixture
def small_model(monkeypatch) -> None:
    """Let every name build a model that is quick to treat."""
    monkeypatch.setattr(import_module("convsim_init.cli.sources"), "build_model", lambda *_, seed, **__: small(seed))


@pytest.mark.usefixtures("small_model")
def test_the_run_is_recorded_and_drawn(command, tmp_path):
    status, out, err = command(
        "resnet18",
        "--include",
        "0",
        "--steps",
        "2",
        "--seed",
        "4",
        "--out",
        "a.pt",
        "--report",
        "a.json",
        "--plot",
        "a.png",
        "--json",
    )
    assert (status, err, names(tmp_path)) == (0, "", ["a.json", "a.png", "a.pt"])
    data, record = json.loads(out), json.loads((tmp_path / "a.json").read_text())
    for key in ("model", "seed", "settings", "totals", "seconds", "file", "file_bytes"):
        assert record[key] == data[key]
    assert record["settings"] == asdict(Settings(steps=2))
    layer = record["layers"][0]
    assert set(layer["before"]) == set(MEASURES)
    assert set(layer["after"]) == {*MEASURES, "norm_ratio"}
    assert len(layer["losses"]) == layer["steps"] + 1 == 3
    expected = measure(small(4)).layers[0].before
    assert layer["before"] == pytest.approx(expected, rel=1e-5)
    written = measure(torch.load(tmp_path / "a.pt")).layers[0].before
    for name in MEASURES:
        assert layer["after"][name] == pytest.approx(written[name], rel=1e-4)
    assert all(not layer["before"] for layer in record["layers"][1:])


@pytest.mark.usefixtures("small_model")
def test_a_report_or_a_picture_changes_nothing_of_the_weights(command, tmp_path):
    command("resnet18", "--out", "a.safetensors")
    command("resnet18", "--out", "b.safetensors", "--report", "b.json", "--plot", "b.svg", "--plot-layer", "2")
    first, second = (safetensors.torch.load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("small_model")
def test_two_runs_draw_the_same_picture(command, tmp_path):
    for name in ("a", "b"):
        assert command("resnet18", "--plot", f"{name}.svg", "-q") == (0, "", "")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.usefixtures("small_model")
def test_a_dry_run_records_and_draws_nothing(command, tmp_path):
    status, _, err = command("resnet18", "--dry-run", "--report", "a.json", "--plot", "a.png")
    assert (status, err, names(tmp_path)) == (0, "", [])


@pytest.mark.usefixtures("small_model")
def test_force_replaces_a_report_and_a_picture(command, tmp_path):
    for name in ("a.json", "a.png"):
        (tmp_path / name).write_bytes(OLD)
    assert command("resnet18", "--report", "a.json", "--plot", "a.png", "--force")[0] == 0
    assert OLD not in ((tmp_path / "a.json").read_bytes(), (tmp_path / "a.png").read_bytes())


def test_a_layer_that_fails_leaves_neither_record_nor_picture(command, tmp_path, monkeypatch):
    model = small()
    with torch.no_grad():
        model[0].weight[0] = float("inf")
    monkeypatch.setattr(import_module("convsim_init.cli.sources"), "build_model", lambda *_, **__: model)
    status, _, err = command("resnet18", "--report", "a.json", "--plot", "a.png")
    assert (status, names(tmp_path)) == (1, [])
    assert "nothing was written" in err


# What is refused


def see(name: str = "") -> str:
    return f"(see 'convsim-init {name} --help')" if name else "(see 'convsim-init --help')"


EXISTS = "exists already: choose another name or pass overwrite=True (--force in the shell)"
ENDING = "expected a file name ending in"
NOT_DRAWN = "nothing is drawn without --plot"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            pytest.param(["resnet18", *options], message, id=f"init{''.join(options)}")
            for options, message in [
                (["--report", "old.json"], f"'old.json' {EXISTS}"),
                (["--plot", "old.png"], f"'old.png' {EXISTS}"),
                (["--report", "new.txt"], f"{ENDING} .json, .html, got 'new.txt': choose another name"),
                (["--plot", "new.jpg"], f"{ENDING} .png, .svg, .pdf, got 'new.jpg': choose another name"),
                (
                    ["--report", "gone/a.json"],
                    "expected an existing folder to write to, got {gone}: create it first",
                ),
                (["--plot-layer", "conv1"], f"--plot-layer: {NOT_DRAWN} {see()}"),
                (["--report", "new.json", "--plot", "old.png"], f"'old.png' {EXISTS}"),
            ]
        ),
        *(
            pytest.param(["inspect", *rest], message, id=f"inspect {' '.join(rest)}")
            for rest, message in [
                ([], f"Missing argument 'FILE|MODEL' {see('inspect')}"),
                (["gone.pt"], f"cannot read 'gone.pt': {MISSING}; check the path"),
                (
                    ["https://x/y.pt"],
                    "expected a file, got the address 'https://x/y.pt': nothing is downloaded here; download it first",
                ),
                (
                    ["old.json"],
                    f"{ENDING} .safetensors, .pt, .pth, .ckpt, .bin, .th, .tar or a model's name, got 'old.json': "
                    "if it is a checkpoint, rename it",
                ),
                (["resnet18", "--json", "--csv"], f"--json and --csv: choose one {see('inspect')}"),
                (["old.pt", "--seed", "1"], f"--seed: a file has its weights already {see('inspect')}"),
                (["resnet18", "--force"], f"--force: {NOT_DRAWN} {see('inspect')}"),
                (["resnet18", "--force", "--plot-layer", "x"], f"--plot-layer, --force: {NOT_DRAWN} {see('inspect')}"),
                (["resnet18", "--plot", "old.png"], f"'old.png' {EXISTS}"),
            ]
        ),
        *(
            pytest.param(["compare", *rest], message, id=f"compare {' '.join(rest)}")
            for rest, message in [
                ([], f"expected at least two models or checkpoints to compare {see('compare')}"),
                (["resnet18"], f"expected at least two models or checkpoints to compare {see('compare')}"),
                (["resnet18", "gone.pt"], f"cannot read 'gone.pt': {MISSING}; check the path"),
                (["resnet18", "resnet34", "--plot-layer", "x"], f"--plot-layer: {NOT_DRAWN} {see('compare')}"),
                (["resnet18", "resnet34", "--plot", "old.png"], f"'old.png' {EXISTS}"),
            ]
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(arguments, message, command, tmp_path, monkeypatch):
    for name in ("old.json", "old.png", "old.pt"):
        (tmp_path / name).write_bytes(OLD)
    source = import_module("convsim_init.cli.sources")
    monkeypatch.setattr(source, "build_model", lambda *_, **__: pytest.fail("it builds the model"))
    status, out, err = command(*arguments)
    assert (status, out, err) == (2, "", f"Error: {message.format(gone=repr(str(tmp_path / 'gone')))}\n")
    assert all((tmp_path / name).read_bytes() == OLD for name in ("old.json", "old.png", "old.pt"))
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "bad.pt"], "expected a file written by torch.save, got 'bad.pt'"),
        (["inspect", "head.pt"], "of rank 3 to 5, got 'head.pt', none of whose 1 tensors is one: name"),
        (
            ["inspect", "cifar_resnet18", "--include", "x*"],
            "include: no convolution matches 'x*'; the convolutions are 'conv1'",
        ),
        (["inspect", "cifar_resnet18", "--plot", "a.png", "--plot-layer", "fc"], "expected a layer to draw, got 'fc'"),
        (["compare", "cifar_resnet18", "head.pt"], "expected a file with convolution weights"),
        (
            [*QUICK, "--plot", "a.png", "--plot-layer", "fc"],
            "expected a layer to draw, got 'fc': the choices are 'conv1'",
        ),
        ([*QUICK, "--plot", "a.png", "--plot-layer", "convl"], "and 16 more: did you mean conv1?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_only_the_weights_can_tell_is_refused_too(arguments, words, command, tmp_path, monkeypatch):
    (tmp_path / "bad.pt").write_bytes(OLD)
    torch.save({"head.weight": torch.ones(2, 2)}, tmp_path / "head.pt")
    monkeypatch.setattr("convsim_init.initialize.initialize_layers", lambda *_, **__: pytest.fail("it computes"))
    status, out, err = command(*arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert words in err
    assert names(tmp_path) == ["bad.pt", "head.pt"]


def test_an_unknown_column_is_refused_with_those_there_are(command):
    status, _, err = command("inspect", "resnet18", "--sort", "size")
    assert status == 2
    assert all(repr(column) in err for column in COLUMNS)


# The help


@pytest.mark.parametrize("module", [INSPECT, COMPARE], ids=["inspect", "compare"])
def test_the_examples_of_the_help_are_right(module, command):
    for name in ("checkpoint.safetensors", "init.safetensors"):
        safetensors.torch.save_file(build_model("resnet18").state_dict(), name)
    for name in ("checkpoint.pt", "before.pt", "after.pt"):
        torch.save(small().state_dict(), name)
    examples = re.findall(r"^ +convsim-init (.+)$", module.EPILOG, re.M)
    assert examples
    for example in examples:
        assert command(*example.replace("resnet50", "resnet18").replace("'", "").split())[0] == 0
