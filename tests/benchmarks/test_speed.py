"""The speed benchmark: what its peers compute, and that it counts and measures what it says. Nothing is timed."""

import itertools
import subprocess
import sys
from itertools import islice
from pathlib import Path

import naive
import pytest
import torch

import convsim_init as ci
from benchmarks.machine import file_name, in_turn, run
from benchmarks.speed import __main__ as speed
from benchmarks.speed import commands, descents, peers, shapes, steps
from convsim_init.functional.bank import filter_bank
from convsim_init.optim.descent import descend

ROOT = Path(__file__).parents[2]
SHAPES = [(5, 3, 3, 3), (4, 2, 3, 2), (3, 4, 1, 1), (2, 1, 2, 4)]


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# The peers' mathematics


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("similarity", "pairs"),
    [
        pytest.param(peers.adjacent_similarity, "adjacent", id="grouped-conv2d"),
        pytest.param(peers.rfft_similarity, "all", id="rfft"),
    ],
)
def test_the_peers_similarity_is_that_of_the_definition(similarity, pairs, shape):
    weight = drawn(*shape)
    torch.testing.assert_close(similarity(weight), naive.convolutional_similarity(weight, pairs=pairs))
    torch.testing.assert_close(similarity(weight), ci.convolutional_similarity(weight, pairs=pairs))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ocnn_sums_over_channels_before_squaring(shape):
    weight = drawn(*shape)
    shifts = list(itertools.product(*(range(1 - k, k) for k in shape[2:])))
    expected = sum(
        sum(naive.correlation_at(a, b, shift) for a, b in zip(first, second, strict=True)) ** 2
        for first, second in itertools.combinations(weight, 2)
        for shift in shifts
    )
    torch.testing.assert_close(peers.ocnn_similarity(weight), expected)


def test_with_one_channel_ocnn_is_convolutional_similarity():
    weight = drawn(5, 1, 3, 3)
    torch.testing.assert_close(peers.ocnn_similarity(weight), ci.convolutional_similarity(weight))


def test_the_plain_port_goes_the_way_of_the_published_recipe():
    weight = drawn(6, 3, 3, 3)
    before = weight.clone()
    expected = descend(filter_bank(weight), ci.Settings.paper(steps=5)).losses
    assert list(islice(peers.adam(weight, peers.adjacent_similarity), 6)) == pytest.approx(expected)
    assert torch.equal(weight, before)


def test_norms_are_restored_after_each_step():
    weight = drawn(6, 3, 3, 3)
    settings = ci.Settings(optimizer="adam", steps=5, tolerance=0, learning_rate=0.1)
    expected = descend(filter_bank(weight), settings).losses
    losses = list(islice(peers.adam(weight, peers.rfft_similarity, rate=0.1, preserve=True), 6))
    assert losses == pytest.approx(expected)


def test_the_peer_says_whether_it_reached_the_target():
    weight = torch.randn(8, 16, 3, 3) / 100  # so that steps of Adam are long
    assert peers.time_to_target(weight, cap=1000)[1]
    assert not peers.time_to_target(weight, cap=0)[1]


# Ours


def test_ours_needs_as_many_steps_as_it_takes_to_the_target():
    weight = torch.randn(16, 16, 3, 3)
    needed = descents.steps_to_target(weight)
    start = ci.convolutional_similarity(weight, normalized=True)
    for taken, there in ((needed, True), (needed - 1, False)):
        lowered = ci.convsim_(weight.clone(), settings=ci.Settings(steps=taken, tolerance=0))
        assert (ci.convolutional_similarity(lowered, normalized=True) <= peers.TARGET * start).item() == there


def test_what_never_gets_there_needs_no_number_of_steps():
    assert descents.steps_to_target(torch.randn(32, 4, 1, 1)) is None


def test_a_descent_that_ends_early_is_no_measurement():
    with pytest.raises(RuntimeError, match="expected each layer to take"):
        descents.time_step(torch.eye(8)[:, :, None, None])


# Shapes


@pytest.mark.parametrize(("network", "layers"), [("ResNet-18", 20), ("ResNet-50", 53)])
def test_the_layers_of_built_in_networks(network, layers):
    found = shapes.conv_shapes(network)
    assert found.total() == layers == len(shapes.state_dict(found))
    assert found[512, 512, 3, 3] == 3


def test_the_table_of_convnext_is_timms():
    pytest.importorskip("timm")
    assert shapes.conv_shapes("ConvNeXt-T") == shapes.shapes_of(ci.build_model("timm:convnext_tiny"))


# Processes and rows


@pytest.mark.posix
def test_a_process_does_not_inherit_the_peak_memory_of_the_benchmark():
    torch.ones(2**27)  # 512 MiB
    seconds, memory = run([sys.executable, "-I", "-c", "pass"])
    assert seconds > 0
    assert memory < 100
    assert run([sys.executable, "-I", "-c", "x = bytearray(b'1' * 2**27)"])[1] > 128


@pytest.mark.posix
def test_what_a_process_imports_is_kept_compiled_as_at_a_users(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "imported.py").write_text("")
    run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import imported"])
    assert [path.suffix for path in (tmp_path / "__pycache__").iterdir()] == [".pyc"]


@pytest.mark.posix
def test_a_command_that_fails_ends_the_benchmark_with_what_it_said():
    with pytest.raises(SystemExit, match="failed: no such thing"):
        run([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


def test_parts_are_measured_in_turn_after_a_round_to_warm_up():
    order = []
    results = in_turn([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b"] * 3
    assert results == [[None] * 2] * 2


def test_ratios_say_how_many_times_as_fast_ours_is():
    parts = [lambda seconds=seconds: seconds for seconds in (0.01, 0.2, 0.03, 0.005)]
    rows = list(steps.against_peers("a step", parts, 1, ["≥ 20", "", ""]))
    assert [row[3] for row in rows] == ["20.0 times as fast", "3.0 times as fast", "0.5 times as fast"]
    assert rows[0][:3] == ("a step", "10.0 ms", "grouped conv2d, adjacent pairs, autograd, Adam 200.0 ms")
    assert rows[0][4] == "≥ 20"


def test_a_peer_that_gave_up_before_the_target_is_a_lower_bound(monkeypatch):
    layers = shapes.Shapes({(8, 16, 3, 3): 2, (32, 4, 1, 1): 1})  # the second never gets there
    monkeypatch.setattr(steps, "NETWORKS", ("ResNet-18",))
    monkeypatch.setattr(steps, "conv_shapes", lambda network: layers)
    monkeypatch.setattr(peers, "time_to_target", lambda weight, cap: (cap, False))
    (row,) = steps.target_rows(1, cap=100)
    assert row[0] == "ResNet-18 to 10 % of its normalized similarity: 2 of 3 layers get there (3×3)"
    assert row[2].endswith("more than 200 s")
    assert row[3].startswith("more than ")


def test_a_timm_that_is_missing_is_said_in_its_row(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "IMPORT_TIMM", [sys.executable, "-c", "raise ImportError('no timm')"])
    (row,) = commands.timm_rows(tmp_path / "a.safetensors", 1)
    assert row[1] == "not measured, `import timm` fails: ImportError: no timm"


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.80GHz, 2 cores", "intel-xeon-2.80ghz-2-cores"),
        ("AMD EPYC, 2 cores", "amd-epyc-2-cores"),
        ("arm64, 8 cores", "arm64-8-cores"),
    ],
)
def test_results_are_named_for_the_processor(cpu, name):
    assert file_name(cpu) == name


def test_the_script_says_what_it_takes():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert all(option in done.stdout for option in ("--parts", "--repeats", "--cap", "--write"))


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--parts", "all"], "invalid choice"), (["--repeats", "0"], "at least 1, got 0")]
)
def test_wrong_options_are_refused_before_anything_is_measured(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        speed.main()
    assert said in capsys.readouterr().err


def test_chosen_parts_are_shown_and_written(monkeypatch, capsys, tmp_path):
    taken = []
    rows = {
        "target": lambda repeats, cap: taken.append((repeats, cap)) or [("target", "", "", "", "")],
        "step": lambda repeats: taken.append(repeats) or [("step", "1 ms", "2 ms", "2 times as fast", "≥ 20")],
        "sweep": None,
    }
    monkeypatch.setattr(speed, "PARTS", rows)
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["speed.py", "--parts", "step", "target", "--repeats", "3", "--cap", "7", "--write"]
    )
    speed.main()
    assert taken == [3, (3, 7)]
    (written,) = tmp_path.glob("speed-*-step-target.md")  # the table of all parts is not replaced
    table = written.read_text(encoding="utf-8")
    assert "| step | 1 ms | 2 ms | 2 times as fast | ≥ 20 |\n| target |" in table
    assert table in capsys.readouterr().out
