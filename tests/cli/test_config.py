"""Options from a settings file, from pyproject.toml and from the environment: which wins, what is told and refused."""

import json
from pathlib import Path

import pytest
import safetensors

QUICK = ["cifar_resnet18", "--include", "conv1"]
READ = "options read from [tool.convsim-init] in pyproject.toml\n"


def write(**files: str) -> None:
    names = {"run": "run.toml", "pyproject": "pyproject.toml"}
    for name, text in files.items():
        Path(names[name]).write_text("[tool.convsim-init]\n" * (name == "pyproject") + text)


def dry(command, *arguments: str) -> tuple[dict, str]:
    status, out, err = command("cifar_resnet18", *arguments, "--dry-run", "--json")
    assert status == 0, err
    return json.loads(out), err


def test_the_command_line_wins_over_the_environment_over_the_file_over_pyproject(command, monkeypatch):
    write(pyproject="steps = 1\n")
    report, err = dry(command)
    assert (report["settings"]["steps"], report["remarks"], err) == (1, ["from pyproject.toml: --steps 1"], READ)
    write(run="steps = 2\n")
    report, err = dry(command, "--config", "run.toml")
    assert (report["settings"]["steps"], report["remarks"], err) == (2, ["from run.toml: --steps 2"], READ)
    monkeypatch.setenv("CONVSIM_INIT_STEPS", "3")
    report, _ = dry(command, "--config", "run.toml")
    assert (report["settings"]["steps"], report["remarks"]) == (3, ["from CONVSIM_INIT_STEPS: --steps 3"])
    report, _ = dry(command, "--steps", "4", "--config", "run.toml")
    assert (report["settings"]["steps"], report["remarks"]) == (4, [])


def test_a_file_may_begin_with_a_byte_order_mark(command, tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\n")
    assert dry(command, "--config", "run.toml")[0]["settings"]["steps"] == 3


def test_names_may_be_written_as_in_python(command):
    write(run="num_classes = 7\n", pyproject="in-chans = 1\n")
    assert dry(command, "--config", "run.toml")[0]["options"] == {"num_classes": 7, "in_chans": 1}


def test_every_kind_of_option_is_taken_from_a_file_and_from_the_environment(command, tmp_path, monkeypatch):
    monkeypatch.setenv("CONVSIM_INIT_EXCLUDE", "layer1* layer2*")
    monkeypatch.setenv("CONVSIM_INIT_CONVS_ONLY", "yes")
    write(run='seed = 3\nsteps = 1\nout = "a.safetensors"\nnorm = "free"\nprefix = "m."\nin-chans = 1\njson = true\n')
    status, out, err = command("cifar_resnet18", "--config", "run.toml")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["remarks"] == [
        "from run.toml: --out a.safetensors, --in-chans 1, --seed 3, --norm free, --steps 1, --prefix m., --json",
        "from CONVSIM_INIT_EXCLUDE: --exclude layer1*, --exclude layer2*",
        "from CONVSIM_INIT_CONVS_ONLY: --convs-only",
        "left out of the file: m.bn1.weight, m.bn1.bias, m.bn1.running_mean, m.bn1.running_var and 107 more",
    ]
    assert report["totals"]["skipped"] == 9
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert len(file.keys()) == 11
        assert file.get_tensor("m.conv1.weight").shape[1] == 1
        about = json.loads(file.metadata()["convsim_init"])
    assert (about["seed"], about["settings"]) == (3, report["settings"] | {"channels": "matched"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3", "'stepps' is no option: did you mean steps?"),
        ("debug = true", "'debug' is no option"),
        ("steps = 2.5", "steps: '2.5' is not a valid whole number"),
        ("steps = 0", "steps: 0 is not in the range x>=1"),
        ("steps = [1]", "steps: expected one value, got [1]"),
        ("exclude = [['a']]", "exclude: expected a list of texts, got [['a']]"),
        ("exclude = {a = 1}", "exclude: expected a list of texts, got {'a': 1}"),
        ("norm = 'y'", "norm: 'y' is not one of 'preserve', 'free'"),
        (r'out = "a\u0000.pt"', "out: embedded null"),
        ("calibrate = '3x'", "calibrate: expected channels and sizes such as 3x224x224, got '3x'"),
        ("steps", "expected a TOML file, got "),
        ("x = " + "[" * 100_000, "expected a TOML file, got "),
        ("a = '\ud800'", "expected a TOML file, got "),
    ],
)
@pytest.mark.parametrize("name", ["run.toml", "pyproject.toml"])
def test_a_file_that_cannot_be_taken_is_refused_in_one_line(name, text, message, command, tmp_path):
    head = "[tool.convsim-init]\n" if name == "pyproject.toml" else ""
    (tmp_path / name).write_bytes((head + text).encode(errors="surrogatepass"))
    status, out, err = command(*QUICK, *(["--config", name] if name == "run.toml" else []))
    assert (status, out) == (2, "")
    *read, error = err.splitlines()
    assert error.startswith(f"Error: {name}: {message}")
    assert read in ([], [READ.strip()])


@pytest.mark.parametrize("key", ["like", "force"])
def test_what_runs_code_or_replaces_files_is_not_taken_from_what_lies_in_the_folder(key, command, tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "weights.pt").write_bytes(b"")
    write(pyproject=f"{key} = 'evil.py:build'\n")
    status, _, err = command("weights.pt")
    assert status == 2
    assert err.endswith(
        f"Error: pyproject.toml: {key} is taken only from the command line or a file of --config "
        "(see 'convsim-init --help')\n"
    )


def test_a_table_called_like_the_package_is_read_too(command, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.convsim_init]\nsteps = 1\n")
    report, err = dry(command)
    assert (report["settings"]["steps"], err) == (1, READ.replace("convsim-init", "convsim_init"))


@pytest.mark.parametrize("text", ["", "tool = 3", "[tool.other]\nsteps = 3"], ids=["empty", "no table", "others"])
def test_a_pyproject_of_others_is_not_told_of(text, command, tmp_path):
    (tmp_path / "pyproject.toml").write_text(text)
    report, err = dry(command)
    assert (report["remarks"], err) == ([], "")


def test_a_variable_that_cannot_be_taken_is_named(command, monkeypatch):
    monkeypatch.setenv("CONVSIM_INIT_STEPS", "0")
    status, _, err = command(*QUICK)
    message = "CONVSIM_INIT_STEPS: 0 is not in the range x>=1 (see 'convsim-init --help')"
    assert (status, err) == (2, f"Error: {message}\n")


def test_a_shape_is_told_as_it_is_typed_and_a_head_is_not_left_out_of_no_file(command, monkeypatch):
    monkeypatch.setenv("CONVSIM_INIT_CALIBRATE", "3x16x16")
    monkeypatch.setenv("CONVSIM_INIT_HEAD", "drop")
    report, _ = dry(command)
    told = ["from CONVSIM_INIT_CALIBRATE: --calibrate 3x16x16", "from CONVSIM_INIT_HEAD: --head drop"]
    assert sorted(report["remarks"]) == told


def test_a_variable_that_is_not_read_is_told_with_the_nearest_that_is(command, monkeypatch):
    monkeypatch.setenv("CONVSIM_INIT_COMPILED", "1")
    monkeypatch.setenv("CONVSIM_INIT_STEP", "0")
    monkeypatch.setenv("CONVSIM_INIT_LEARNING_RATE\n", "1")
    first, second = sorted(dry(command)[1].splitlines())
    assert first == r"CONVSIM_INIT_LEARNING_RATE\n is not read"
    assert second.startswith("CONVSIM_INIT_STEP is not read: did you mean CONVSIM_INIT_STEPS?")


def test_help_and_other_commands_need_no_file(command, tmp_path):
    write(pyproject="stepps = 3\n")
    assert command("--help")[0] == command("list")[0] == 0


def test_what_does_not_apply_is_refused_only_on_the_command_line(command, tmp_path):
    write(run="seed = 3\nnum-classes = 4\nprefix = 'm.'\n", pyproject="steps = 1\n")
    assert command(*QUICK, "--out", "a.pt")[0] == 0
    status, out, _ = command("a.pt", "--config", "run.toml", "--json")
    assert (status, json.loads(out)["seed"]) == (0, None)
    status, out, _ = command(*QUICK, "--seeds", "0:2", "--config", "run.toml", "--json")
    reports = [json.loads(line) for line in out.splitlines()]
    assert [report["seed"] for report in reports] == [0, 1]
    assert reports[0]["remarks"][0] == "from run.toml: --num-classes 4, --prefix m."


@pytest.mark.parametrize(
    ("variable", "run", "pyproject", "seeds"),
    [
        ("SEED=3", "seeds = '0:2'", "", [3]),
        ("SEEDS=0:2", "seed = 3", "", [0, 1]),
        ("", "seed = 3", "seeds = '0:2'", [3]),
        ("", "seeds = '0:2'", "seed = 3", [0, 1]),
        ("SEED=5", "seeds = '0:2'", "seed = 3", [5]),
        ("SEED=", "seeds = '0:2'", "", [0, 1]),
        ("SEEDS=", "seed = 3", "", [3]),
    ],
)
def test_of_seed_and_seeds_the_first_place_that_has_one_counts(variable, run, pyproject, seeds, command, monkeypatch):
    write(run=run, pyproject=pyproject)
    if variable:
        monkeypatch.setenv("CONVSIM_INIT_" + variable.partition("=")[0], variable.partition("=")[2])
    status, out, err = command("cifar_resnet18", "--dry-run", "--json", "--config", "run.toml")
    assert status == 0, err
    found = [json.loads(out)] if len(seeds) == 1 else [json.loads(line) for line in out.splitlines()]
    assert [record["seed"] for record in found] == seeds
