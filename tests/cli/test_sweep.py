"""Several models and seeds in one command: what each run writes, what is kept, and what fails alone."""

import json
import os
import subprocess
import sys
import weakref
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convsim_init.cli.runs.plan import file_safe, fill, parse_seeds
from convsim_init.errors import InputError

SOURCE = import_module("convsim_init.cli.sources")
NETWORKS = """
import os
from pathlib import Path
import torch
from torch import nn

def small(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, groups=width))

def wide():
    return small(width=6)

def broken():
    model = small()
    model[0].weight.data.view(-1)[0] = float("nan")
    return model

def raising():
    raise RuntimeError("not today")

def overtaken():
    Path("nets-overtaken-s0.safetensors").write_text("of another command")
    return small()

def moving():
    os.chdir("elsewhere")
    return small()
"""
SMALL, WIDE, BROKEN, RAISING = (f"nets.py:{name}" for name in ("small", "wide", "broken", "raising"))
OVERTAKEN, MOVING = "nets.py:overtaken", "nets.py:moving"
PATTERN = ["--out", "{model}-s{seed}.safetensors"]
QUICK = ["--steps", "2"]
UNTOLD = "kept, though nothing in them says what made them: "


@pytest.fixture(autouse=True)
def _networks(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORKS)


def written(folder, *suffixes):
    return sorted(path.name for path in folder.iterdir() if path.suffix in (suffixes or (".safetensors", ".pt")))


# The names of files


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("resnet18", "resnet18"),
        ("timm:resnet18", "timm-resnet18"),
        ("timm:resnet18.a1_in1k", "timm-resnet18.a1_in1k"),
        ("package.module:factory", "package.module-factory"),
        ("path/to/net.py:Model.small", "net-Model.small"),
        ("../net.py:small", "net-small"),
        ("path/to/weights.safetensors", "weights"),
        ("weights.best.pt", "weights.best"),
        ("net.v2.pth.tar", "net.v2"),
        ("net.tar", "net"),
        ("of tuesday (2).pth", "of-tuesday-2"),
        ("größe.pt", "größe"),
        ("a:b/w.pt", "w"),
        ("-.pt", "model"),
    ],
)
def test_a_model_becomes_a_part_of_a_file_name(model, name):
    assert file_safe(model) == name


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("inits/{model}-s{seed}.pt", "inits/timm-x-s7.pt"),
        ("{seed}/{model}{seed}.pt", "7/timm-x7.pt"),
        ("{{model}}-{{{seed}}}.pt", "{model}-{7}.pt"),
        ("plain.pt", "plain.pt"),
    ],
)
def test_a_pattern_is_filled(pattern, path):
    assert fill(pattern, model="timm:x", seed=7) == path


@pytest.mark.parametrize(
    "pattern", ["{name}.pt", "{}.pt", "{0}.pt", "{seed", "seed}", "{seed:03}.pt", "{model!r}.pt", "{seed.real}.pt"]
)
def test_other_braces_are_refused(pattern):
    with pytest.raises(InputError, match="alone in braces"):
        fill(pattern, model="resnet18", seed=0)


def test_a_file_without_a_seed_cannot_be_named_after_it():
    assert fill("{model}.pt", model="w.pt", seed=None) == "w.pt"
    with pytest.raises(InputError, match=r"take \{seed\} out"):
        fill("{model}-{seed}.pt", model="w.pt", seed=None)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("3", [3]),
        ("0:4", [0, 1, 2, 3]),
        ("0,3,5", [0, 3, 5]),
        ("5,0:2, 9", [5, 0, 1, 9]),
        (str(2**63 - 1), [2**63 - 1]),
    ],
)
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1.5", "0:", ":3", "0:4:2", "3:3", "4:0", "0,,1", "0:3,2", "٣", str(2**63), "0:999999999999"],
)
def test_other_seeds_are_refused(text):
    with pytest.raises(InputError, match="--seeds: expected") as caught:
        parse_seeds(text)
    assert (str(2**63 - 1) in str(caught.value)) == (text == str(2**63))


# What is written


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_each_file_has_the_bytes_that_a_command_of_its_own_writes(suffix, command, tmp_path):
    options = [*QUICK, "--base", "orthogonal", "--dtype", "bfloat16", "--prefix", "net."]
    status, out, err = command(WIDE, SMALL, "--seeds", "3,0", "--out", "{model}-s{seed}" + suffix, *options)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 5
    assert written(tmp_path) == sorted(f"nets-{name}-s{seed}{suffix}" for name in ("small", "wide") for seed in (0, 3))
    for name in ("small", "wide"):
        for seed in ("0", "3"):
            assert command(f"nets.py:{name}", "--seed", seed, "--out", f"alone{suffix}", "--force", *options)[0] == 0
            alone = (tmp_path / f"alone{suffix}").read_bytes()
            assert alone == (tmp_path / f"nets-{name}-s{seed}{suffix}").read_bytes()


def test_files_are_started_from_too(command, tmp_path):
    torch.manual_seed(1)
    for name in ("a", "b"):
        save_file({"0.weight": torch.randn(4, 3, 3, 3)}, tmp_path / f"{name}.safetensors")
    status, _, err = command("a.safetensors", "b.safetensors", SMALL, "--seed", "2", "--out", "{model}-new.pt", *QUICK)
    assert (status, err) == (0, "")
    assert written(tmp_path, ".pt") == ["a-new.pt", "b-new.pt", "nets-small-new.pt"]
    assert command("b.safetensors", "--out", "alone.pt", *QUICK)[0] == 0
    assert (tmp_path / "alone.pt").read_bytes() == (tmp_path / "b-new.pt").read_bytes()


def test_a_file_drawn_anew_has_seeds(command, tmp_path):
    save_file({"0.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "a.safetensors")
    assert command("a.safetensors", "--seeds", "0:2", "--base", "kaiming_normal", *PATTERN, *QUICK)[0] == 0
    first, second = (load_file(tmp_path / f"a-s{seed}.safetensors")["0.weight"] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_single_run_fills_patterns_as_well(command, tmp_path):
    status, out, _ = command(SMALL, "--seed", "7", *PATTERN, *QUICK)
    assert status == 0
    assert out.startswith("layer ")
    assert written(tmp_path) == ["nets-small-s7.safetensors"]
    assert "exists already" in command(SMALL, "--seed", "7", *PATTERN, *QUICK)[2]  # and it keeps nothing in silence


def test_one_seed_of_a_list_is_a_sweep(command):
    assert command(SMALL, "--seeds", "7", *PATTERN, *QUICK)[1].splitlines()[-1] == "1 runs: 1 done"
    assert "kept" in command(SMALL, "--seeds", "7", *PATTERN, *QUICK)[1]


def test_no_model_is_kept_in_memory_beyond_its_run(command, monkeypatch):
    build, models, alive = SOURCE.build_model, [], []

    def watched(*arguments, **options):
        alive.append(sum(model() is not None for model in models))
        model = build(*arguments, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(SOURCE, "build_model", watched)
    assert command(SMALL, BROKEN, RAISING, WIDE, "--seeds", "0:2", *PATTERN, *QUICK)[0] == 1
    assert len(models) == 6
    assert alive == [0] * 8


# What is there already


def test_finished_files_are_kept_and_force_redoes_them(command, tmp_path):
    arguments = [SMALL, "--seeds", "0:3", *PATTERN, *QUICK]
    assert command(*arguments)[0] == 0
    paths = [tmp_path / f"nets-small-s{seed}.safetensors" for seed in range(3)]
    bytes_before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    inodes = [paths[seed].stat().st_ino for seed in (0, 2)]
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    first, second, third, last = out.splitlines()
    assert first == "nets.py:small seed 0  kept  nets-small-s0.safetensors"
    assert "1 initialized" in second
    assert third.split()[3] == "kept"
    assert last == "3 runs: 1 done, 2 kept; --force redoes what was kept"
    assert [paths[seed].stat().st_ino for seed in (0, 2)] == inodes
    for path in paths:
        path.write_bytes(b"another")
    assert command(*arguments, "--force")[1].splitlines()[-1] == "3 runs: 3 done"
    assert [path.read_bytes() for path in paths] == bytes_before


@pytest.mark.parametrize("name", ["{model}-s{seed}.safetensors", "{model}-s{seed}.json", "{model}-s{seed}/"])
def test_what_was_made_otherwise_is_not_kept_in_silence(name, command, tmp_path):
    option = "--report" if name.endswith(".json") else "--out"
    arguments = ["timm:resnet10t", "--include", "conv1.*", "--seeds", "1:2", option, name]
    assert command(*arguments, "--steps", "2")[0] == 0
    assert command(*arguments, "--steps", "2", "--channels", "auto")[1].splitlines()[-1].startswith("1 runs: 1 kept")
    status, out, err = command(*arguments, "--steps", "3", "--norm", "free", "--calibrate", "3x32x32")
    path = name.format(model="timm-resnet10t", seed=1).rstrip("/")
    assert (status, out) == (2, "")
    assert err == (
        f"Error: expected the files of an earlier run of this command or none, got '{path}', made with norm "
        "'preserve', not 'free', steps 2, not 3, calibrated default, not [3, 32, 32]: choose another name, or write it "
        "anew with --force\n"
    )


@pytest.mark.parametrize(
    ("model", "seed", "options", "message"),
    [
        ("nets.py:wide", "0", [], "model 'nets.py:small', not 'nets.py:wide'"),
        ("./nets.py:small", "1", [], "seed 0, not 1"),
        ("nets.py:small", "0", ["--base", "orthogonal"], "base 'model', not 'orthogonal'"),
        ("other/nets.py:small", "0", [], "model 'nets.py:small', not 'other/nets.py:small'"),
        ("nets.py:small", "0", ["--exclude", "2"], "exclude default, not ['2']"),
        ("nets.py:small", "0", ["--include", "0"], "include default, not ['0']"),
        ("nets.py:small", "0", ["--dtype", "float16"], "dtype default, not 'float16'"),
        ("nets.py:small", "0", ["--model-arg", "width=6"], "model_arg default, not ['width=6']"),
        (
            "nets.py:small",
            "0",
            ["--prefix", "a.", "--convs-only"],
            "convs_only default, not True, prefix default, not 'a.'",
        ),
        ("nets.py:small", "0", ["--without", "1.*"], "without default, not ['1.*']"),
        ("./nets.py:small", "0", [], ""),
    ],
)
@pytest.mark.parametrize("out", ["a.safetensors", "a.pt"])
def test_a_file_of_one_name_may_be_of_another_run(out, model, seed, options, message, command, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/nets.py").write_text(NETWORKS)
    assert command(SMALL, "--seeds", "0", "--out", out, *QUICK)[0] == 0
    status, _, err = command(model, "--seeds", seed, "--out", out, *QUICK, *options)
    assert (status, f"made with {message}: choose" in err) == ((2, True) if message else (0, False))
    assert command(model, "--seeds", seed, "--out", out, *QUICK, *options, "--force")[0] == 0
    assert command(model, "--seeds", seed, "--out", out, *QUICK, *options)[::2] == (0, "")
    status, _, err = command(SMALL, "--seeds", "0", "--out", out, *QUICK)
    assert status == (2 if message else 0)  # what was given then, and is not now, counts as well


@pytest.mark.parametrize("first", ["timm:resnet10t", "resnet10t"])
def test_a_library_is_a_part_of_a_models_name(first, command):
    arguments = ["--seeds", "0", "--include", "conv1.*", "--out", "a.safetensors", "--steps", "1"]
    assert command(first, *arguments)[0] == 0
    for same in ("timm:resnet10t", "resnet10t"):
        assert command(same, *arguments)[::2] == (0, "")
    status, _, err = command("torchvision:resnet10t", *arguments)
    assert (status, "made with model 'timm:resnet10t', not 'torchvision:resnet10t'" in err) == (2, True)


def test_other_files_of_its_run_speak_for_a_picture(command, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = [SMALL, "--seeds", "0", "--plot", "a.png", *QUICK]
    assert command(*arguments, "--out", "a.pt")[0] == 0
    assert command(*arguments, "--out", "a.pt")[::2] == (0, "")
    assert command(*arguments)[2] == f"{UNTOLD}a.png; --force writes them anew\n"


def test_a_folder_is_the_same_with_a_separator_behind_it(command, tmp_path):
    (tmp_path / "w").mkdir()
    assert command(SMALL, "--out", "w/model.safetensors", *QUICK)[0] == 0
    arguments = ["--base", "orthogonal", "--seeds", "0", "--out", "a.safetensors", *QUICK]
    assert command("w", *arguments)[0] == 0
    assert command("w/", *arguments)[1].splitlines()[-1].startswith("1 runs: 1 kept")


@pytest.mark.parametrize("text", ["", "[]", '{"settings": [1]}', '{"settings": {"steps": "' + "x" * 999 + '"}}'])
def test_what_says_little_of_its_run_is_kept_and_named(text, command, tmp_path):
    (tmp_path / "a.json").write_text(text)
    status, _, err = command(SMALL, "--seeds", "0", "--report", "a.json", *QUICK)
    assert (status, len(err) < 400) == (2 if "steps" in text else 0, True)
    assert err.startswith("Error: " if status else f"{UNTOLD}a.json;")


@pytest.mark.parametrize(
    ("model", "options", "source"),
    [
        (SMALL, [], "nets.py"),
        ("w.pt", ["--base", "orthogonal"], "w.pt"),
        ("w/", ["--base", "orthogonal"], "w/model.safetensors"),
        ("w.pt", ["--base", "orthogonal", "--like", SMALL], "nets.py"),
    ],
    ids=["code", "weights", "folder", "like"],
)
def test_what_is_older_than_its_source_is_kept_and_named(model, options, source, command, tmp_path):
    assert command(SMALL, "--out", "w.pt", *QUICK)[0] == 0
    (tmp_path / "w").mkdir()
    save_file(torch.load(tmp_path / "w.pt"), tmp_path / "w" / "model.safetensors")
    arguments = [model, "--seeds", "0:2", "--out", "o{seed}.pt", *options, *QUICK]
    assert command(*arguments)[2] == ""
    assert command(*arguments)[2] == ""
    later = (tmp_path / "o1.pt").stat().st_mtime_ns
    os.utime(tmp_path / "o0.pt", ns=(later - 10, later - 10))
    os.utime(tmp_path / source, ns=(later, later))
    status, out, err = command(*arguments)
    assert (status, err) == (0, f"kept, though {Path(source)} is newer: o0.pt; --force writes them anew\n")
    assert "2 runs: 2 kept" in out
    assert command(*arguments, "--force")[2] == ""


def test_what_is_all_there_needs_no_torch(tmp_path):
    for seed in range(2):
        (tmp_path / f"resnet18-s{seed}.safetensors").write_bytes(b"")
    code = "import sys; from convsim_init.cli.main import cli; cli.main(sys.argv[1:], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    process = [sys.executable, "-c", code, "resnet18", "--seeds", "0:2", *PATTERN]
    done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path)
    files = "resnet18-s0.safetensors, resnet18-s1.safetensors"
    assert (done.returncode, done.stderr) == (0, f"{UNTOLD}{files}; --force writes them anew\n")
    assert done.stdout.endswith("2 runs: 2 kept; --force redoes what was kept\n")


def test_records_and_pictures_have_names_of_their_own(command, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = [SMALL, WIDE, *QUICK, "--out", "{model}.pt", "--report", "{model}.json"]
    assert command(*arguments, "--plot", "{model}.png")[0] == 0
    assert written(tmp_path, ".json", ".png") == [
        "nets-small.json",
        "nets-small.png",
        "nets-wide.json",
        "nets-wide.png",
    ]
    record = json.loads((tmp_path / "nets-wide.json").read_text())
    assert (record["model"], record["file"]) == (WIDE, "nets-wide.pt")
    (tmp_path / "nets-wide.json").unlink()
    kept = (tmp_path / "nets-wide.pt").stat().st_ino
    first, second, _ = command(*arguments)[1].splitlines()
    assert first == "nets.py:small seed 0  kept  nets-small.pt  nets-small.json"
    assert second.endswith(" s  nets-wide.json")  # the file that is there is left alone
    assert (tmp_path / "nets-wide.pt").stat().st_ino == kept
    again = json.loads((tmp_path / "nets-wide.json").read_text())
    assert [layer["losses"] for layer in again["layers"]] == [layer["losses"] for layer in record["layers"]]


def test_what_another_command_writes_in_the_meantime_is_kept(command, tmp_path):
    status, out, err = command(OVERTAKEN, "--seeds", "0:2", *PATTERN, *QUICK)
    assert (status, err) == (0, f"{UNTOLD}nets-overtaken-s0.safetensors; --force writes them anew\n")
    assert out.splitlines()[0] == "nets.py:overtaken seed 0  kept  nets-overtaken-s0.safetensors"
    assert out.splitlines()[-1] == "2 runs: 1 done, 1 kept; --force redoes what was kept"
    assert (tmp_path / "nets-overtaken-s0.safetensors").read_text() == "of another command"
    assert written(tmp_path) == ["nets-overtaken-s0.safetensors", "nets-overtaken-s1.safetensors"]


@pytest.mark.parametrize("runs", [[MOVING], [MOVING, "nets.py:small"]], ids=["one", "two"])
def test_a_model_that_changes_the_working_folder_moves_no_file(runs, command, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    status, out, err = command(*runs, "--out", "{model}.safetensors", "--report", "{model}.json", *QUICK)
    assert (status, err) == (0, "")
    assert written(tmp_path, ".safetensors") == sorted(f"nets-{run[8:]}.safetensors" for run in runs)
    assert written(tmp_path, ".json") == sorted(f"nets-{run[8:]}.json" for run in runs)
    assert written(tmp_path / "elsewhere") == []
    assert "nets-moving.safetensors" in out
    assert str(tmp_path) not in out


# What fails


def test_what_fails_fails_alone_and_is_named_at_the_end(command, tmp_path):
    status, out, err = command(SMALL, RAISING, BROKEN, WIDE, "--seeds", "0:2", *PATTERN, *QUICK)
    assert status == 1
    assert written(tmp_path) == [f"nets-{name}-s{seed}.safetensors" for name in ("small", "wide") for seed in (0, 1)]
    lines = out.splitlines()
    assert len(lines) == 9
    assert lines[2].startswith("nets.py:raising seed 0  failed: nets.py:raising raised RuntimeError: not today")
    assert "failed: layer '0' failed, left as it was: its weight holds infinities or NaN" in lines[4]
    assert lines[-1] == "8 runs: 4 done, 4 failed"
    assert len(err.splitlines()) == 1
    assert err.startswith("Error: 4 of 8 runs failed; nets.py:raising seed 0, nets.py:raising seed 1: ")
    assert "; nets.py:broken seed 0, nets.py:broken seed 1: layer '0' failed" in err


def test_a_pattern_that_matches_in_one_model_alone_fails_the_others(command, tmp_path):
    status, _, err = command(SMALL, "cifar_resnet18", "--include", "conv1", *QUICK, "--out", "{model}.pt")
    assert (status, written(tmp_path)) == (1, ["cifar_resnet18.pt"])
    assert "1 of 2 runs failed; nets.py:small seed 0: include: no convolution matches 'conv1'" in err


def test_an_unforeseen_error_fails_its_run_alone(command, monkeypatch, tmp_path):
    build = SOURCE.build_model

    def failing(*arguments, seed, **options):
        if seed == 0:
            raise MemoryError("of\ntwo lines")
        return build(*arguments, seed=seed, **options)

    monkeypatch.setattr(SOURCE, "build_model", failing)
    arguments = [SMALL, "--seeds", "0:2", *PATTERN, *QUICK]
    status, _, err = command(*arguments)
    assert (status, written(tmp_path)) == (1, ["nets-small-s1.safetensors"])
    why = "MemoryError: of two lines (--debug shows where)"
    assert err == f"Error: 1 of 2 runs failed; nets.py:small seed 0: {why}\n"
    assert "Traceback (most recent call last)" in command(*arguments, "--force", "--debug")[2]


def test_an_interrupt_keeps_what_is_finished(command, monkeypatch, tmp_path):
    initialize = import_module("convsim_init.initialize")
    do, calls = initialize.initialize_layers, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return do(*arguments, **options)

    monkeypatch.setattr(initialize, "initialize_layers", interrupted)
    status, out, err = command(SMALL, "--seeds", "0:3", *PATTERN, *QUICK)
    assert (status, err) == (130, "Error: interrupted; no partial file is left\n")
    assert written(tmp_path) == ["nets-small-s0.safetensors"]
    assert out.splitlines()[-1] == "3 runs: 1 done, 2 not run"


def test_a_reader_that_leaves_early_ends_a_sweep_with_a_word(tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)
    arguments = [sys.executable, "-m", "convsim_init", SMALL, "--seeds", "0:3", *PATTERN, *QUICK]
    done = subprocess.run(arguments, stdout=theirs, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "Error: stdout was closed after 1 of 3 runs: send it to a file\n")
    assert written(tmp_path) == ["nets-small-s0.safetensors"]


# What is shown


def test_json_is_a_line_for_each_run(command, tmp_path):
    (tmp_path / "nets-small-s1.pt").write_bytes(b"")
    status, out, err = command(SMALL, RAISING, "--seeds", "0:2", "--out", "{model}-s{seed}.pt", "--json", *QUICK)
    assert (status, len(err.splitlines())) == (1, 2)
    done, kept, *failed = map(json.loads, out.splitlines())
    alone = json.loads(command(SMALL, "--out", "alone.pt", "--json", *QUICK)[1])
    assert done.keys() == alone.keys() | {"status", "error"}
    assert (done["status"], done["error"], done["file"]) == ("done", None, "nets-small-s0.pt")
    assert done["totals"] == alone["totals"]
    assert kept == {"status": "kept", "error": None, "model": SMALL, "seed": 1, "file": "nets-small-s1.pt"}
    assert [(run["status"], run["seed"], run["file"]) for run in failed] == [("failed", 0, None), ("failed", 1, None)]
    assert "not today" in failed[0]["error"]


def test_a_model_has_one_name_in_all_lines(command):
    arguments = ["mobilenet_v3_small", "--seeds", "0:1", "--steps", "1", "--out", "a.pt", "--json"]
    done, kept = (json.loads(command(*arguments)[1]) for _ in range(2))
    assert [(run["status"], run["model"]) for run in (done, kept)] == [
        ("done", "mobilenet_v3_small"),
        ("kept", "mobilenet_v3_small"),
    ]


HALF = """
from torch import nn

def half():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model[0].weight.data[0] = float("nan")
    return model
"""


def test_what_failed_is_shown_in_full_where_it_was_to_be_recorded(command, tmp_path):
    (tmp_path / "half.py").write_text(HALF)
    for seeds in ([], ["--seeds", "0:1"]):
        status, out, _ = command("half.py:half", *seeds, "--report", "a.json", "--json", "--steps", "1")
        failed, treated = json.loads(out)["layers"]
        assert (status, failed["outcome"], treated["outcome"]) == (1, "failed", "initialized")
        assert "effective_rank_white" in treated["before"]
        assert "effective_rank_white" in treated["after"]


@pytest.mark.parametrize(("model", "status"), [(SMALL, 0), (RAISING, 1)])
def test_quiet_tells_failures_alone(model, status, command):
    actual, out, err = command(model, "--seeds", "0:2", "--quiet", *PATTERN, *QUICK)
    assert (actual, out, len(err.splitlines())) == (status, "", status)


def test_a_model_that_is_returned_twice_is_refused(command, tmp_path):
    (tmp_path / "cached.py").write_text(
        "from functools import lru_cache\nfrom torch import nn\n"
        "@lru_cache\ndef make(): return nn.Sequential(nn.Conv2d(3, 8, 3))\n"
    )
    status, out, err = command("cached.py:make", "--seeds", "0:2", *QUICK)
    assert (status, out.splitlines()[-1]) == (1, "2 runs: 1 done, 1 failed")
    assert "seed 1: cached.py:make: expected a new model, got the one that it returned before" in err


def test_a_line_tells_what_the_table_of_a_single_run_sums_up(command):
    data = json.loads(command(SMALL, "--json", *QUICK)[1])
    line = command(SMALL, WIDE, *QUICK)[1].splitlines()[0]
    before, after = (data["totals"][when]["normalized_similarity"] for when in ("before", "after"))
    assert f"1 initialized, 1 skipped  {before:.3e} -> {after:.3e}" in line
    assert f" {after / before:.1%} " in line


def test_remarks_are_told_once(command, tmp_path):
    save_file({"0.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "a.safetensors")
    save_file({"0.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "b.safetensors")
    out = command("a.safetensors", "b.safetensors", *QUICK)[1]
    assert out.count("\nlayers of a file are inferred") == 1
    out = command("a.safetensors", SMALL, *QUICK)[1]
    assert out.count("\na.safetensors: layers of a file are inferred") == 1


def test_a_dry_run_tells_which_files_would_be_written(command, tmp_path):
    (tmp_path / "nets-small-s1.safetensors").write_bytes(b"")
    status, out, err = command(SMALL, "--seeds", "0:2", *PATTERN, "--dry-run")
    assert (status, err) == (0, f"{UNTOLD}nets-small-s1.safetensors; --force writes them anew\n")
    first, second, last = out.splitlines()
    assert "1 planned, 1 skipped" in first
    assert first.endswith("nets-small-s0.safetensors")
    assert "kept" in second
    assert last.startswith("2 runs: 1 kept, 1 planned")
    assert written(tmp_path) == ["nets-small-s1.safetensors"]


def test_a_terminal_shows_one_bar_for_all_runs(command, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = command(SMALL, "--seeds", "0:2", *QUICK)
    assert status == 0
    assert len(out.splitlines()) == 3
    assert "runs:   0%" in err
    assert "layers:" not in err


# What is refused before any work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([SMALL, SMALL, *PATTERN], "expected each MODEL once, got 'nets.py:small' 2 times", id="twice"),
        pytest.param(
            ["resnet18", "--seeds", "0:2", "--out", "{model}.pt"],
            "expected a file of its own for each run, got 'resnet18.pt' for resnet18 seed 0 and for resnet18 seed 1: "
            "put {seed} into its name",
            id="no-seed",
        ),
        pytest.param([SMALL, WIDE, "--out", "init.pt"], "seed 0: put {model} into its name", id="no-model"),
        pytest.param(
            [SMALL, f"./{SMALL}", *PATTERN], "./nets.py:small seed 0: use a command for each", id="names-alike"
        ),
        pytest.param(
            [SMALL, WIDE, "--out", "{model}.pt", "--report", "all.json"], "got 'all.json' for", id="one-record"
        ),
        pytest.param([SMALL, WIDE, "--out", "{name}.pt"], "expected {model} and {seed} alone in braces", id="field"),
        pytest.param(["old.pt", SMALL, "--out", "{model}.pt"], "'old.pt', which a run starts from", id="own-source"),
        pytest.param([SMALL, WIDE, "--out", "gone/{model}.pt"], "create it first", id="folder"),
        pytest.param([SMALL, "--seeds", "0:2", "--out", "{model}-{seed}"], "expected a file name ending", id="suffix"),
        pytest.param([SMALL, "--seeds", "0:2", "--seed", "1"], "--seed and --seeds: choose one", id="seed-and-seeds"),
        pytest.param([SMALL, "--seeds", "a"], "--seeds: expected whole numbers", id="seeds"),
        pytest.param(["old.pt", SMALL, "--seeds", "0:2"], "'old.pt' has its weights already", id="seeds-of-a-file"),
        pytest.param(["old.pt", SMALL, *PATTERN], "take {seed} out of", id="seed-of-a-file"),
        pytest.param([SMALL, "resnet81", *PATTERN], "'resnet81'", id="unknown-model"),
        pytest.param([SMALL, "gone.py:small", *PATTERN], "got 'gone.py'", id="unknown-file"),
        pytest.param(
            [SMALL, "resnet18", *PATTERN, "--model-arg", "width=8"], "resnet18", id="argument-not-taken-by-one"
        ),
        pytest.param([SMALL, "list"], "'list' is a command, not a model", id="command"),
        pytest.param([SMALL, WIDE, "--prefix", "x."], "--prefix: no weights are written without --out", id="no-out"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, message, command, tmp_path, monkeypatch):
    (tmp_path / "old.pt").write_bytes(b"old")
    monkeypatch.setattr(SOURCE, "build_model", lambda *_, **__: pytest.fail("it builds a model"))
    monkeypatch.setattr("convsim_init.models.libraries.installed", lambda: [])
    status, out, err = command(*arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert written(tmp_path) == ["old.pt"]


# What is found before any run begins


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        pytest.param("timm:resnt10t", "of timm, got 'resnt10t': did you mean timm:resnet10t", id="library"),
        pytest.param(
            "resnt10t", "expected the name of a model, got 'resnt10t': did you mean timm:resnet10t", id="bare"
        ),
        pytest.param("nets.py:smal", "in nets.py, got 'smal': did you mean small?", id="factory"),
        pytest.param("broken.py:make", "broken.py raised ZeroDivisionError", id="import"),
    ],
)
@pytest.mark.parametrize("option", ["--quiet", "--dry-run"])
def test_no_run_begins_before_every_model_is_found(missing, message, option, command, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.setattr(SOURCE, "build_model", lambda *_, **__: pytest.fail("it builds a model"))
    status, out, err = command(SMALL, missing, "--out", "{model}.pt", option)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert written(tmp_path) == []


def test_a_model_that_a_file_is_like_is_found_first_too(command, tmp_path):
    save_file({"0.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "a.safetensors")
    status, out, err = command("a.safetensors", SMALL, "--like", "nets.py:smal", "--out", "{model}.pt")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "did you mean small?" in err


def test_what_is_kept_need_not_be_found(command, tmp_path):
    (tmp_path / "nets-gone-s0.safetensors").write_bytes(b"")
    status, _, err = command("nets.py:gone", SMALL, *PATTERN, *QUICK)
    assert (status, err) == (0, f"{UNTOLD}nets-gone-s0.safetensors; --force writes them anew\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["verfy", "old.pt", SMALL], "'verfy' is neither a command nor a model: did you mean verify?", id="1"
        ),
        pytest.param(["--quiet", "inspct", SMALL], "'inspct' is neither a command", id="after-an-option"),
        pytest.param(["compar", SMALL, SMALL], "did you mean compare?", id="one-letter"),
        pytest.param(["lst"], "did you mean list?", id="alone"),
        pytest.param(["resnet81", SMALL], "did you mean resnet18", id="a-model"),
    ],
)
@pytest.mark.parametrize("libraries", [True, False], ids=["libraries", "alone"])
def test_a_mistyped_command_is_no_model(arguments, message, libraries, command, tmp_path, monkeypatch):
    save_file({"0.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "old.pt")
    monkeypatch.setattr(SOURCE, "build_model", lambda *_, **__: pytest.fail("it builds a model"))
    if not libraries:
        monkeypatch.setattr("convsim_init.models.libraries.installed", lambda: [])
    status, out, err = command(*arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_a_model_whose_name_is_like_a_commands_goes_on(command, monkeypatch):
    monkeypatch.setattr(import_module("convsim_init.cli.commands.init_checks"), "check_found", lambda *_: None)
    assert "expected the name of a model, got 'verifynet'" in command("verifynet")[2]


# Names are data

NASTY = "a\n\x1b[2J\u202eb"


@pytest.mark.parametrize("options", [[], ["--csv"]], ids=["table", "csv"])
def test_no_name_of_a_file_reaches_the_terminal_raw(options, command, tmp_path):
    names = [NASTY, "layer" * 600, "=1+1"]
    save_file({f"model.{name}.weight": torch.randn(4, 3, 3, 3) for name in names}, tmp_path / "w.safetensors")
    outputs = [command("inspect", "w.safetensors", *options), command("w.safetensors", "w.safetensors", "--seeds", "0")]
    outputs += [command("compare", "w.safetensors", SMALL), command("verify", "w.safetensors", SMALL)]
    outputs += [command("w.safetensors"), command("inspect", "w.safetensors", "--include", NASTY[::-1])]
    for status, out, err in outputs:
        assert status in (0, 2, 3)
        assert all(map(str.isprintable, (out + err).split("\n")))
        assert options or max(map(len, (out + err).splitlines())) < 1000
    data = json.loads(command("inspect", "w.safetensors", "--json")[1])
    assert {layer["name"] for layer in data["layers"]} == set(names)


@pytest.mark.posix
def test_a_file_with_any_name_is_shown_on_one_line(command, tmp_path):
    name = "\x1b[31m\n\u202e.safetensors"
    save_file({"0.weight": torch.randn(4, 3, 3, 3)}, tmp_path / name)
    for arguments in ([name], [name, SMALL], ["inspect", name], ["compare", name, name], ["verify", name, SMALL]):
        status, out, err = command(*arguments)
        assert status in (0, 3)
        assert r"\x1b[31m\n\u202e.safetensors" in out
        assert all(map(str.isprintable, (out + err).split("\n")))
