"""Several processes at one command or one model: what they write, what they show, and how they fail together."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.speed import scale_model
from benchmarks.speed.scale_model import Count, network
from convsim_init import InputError
from convsim_init.cli.devices import find_device
from convsim_init.parallel.launch import Launch, launched
from convsim_init.parallel.partition import deal

NETWORKS = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

RANK = os.environ.get("RANK")

def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(16, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        weight_norm(nn.Conv2d(8, 12, 3)),
        spectral_norm(nn.Conv2d(12, 12, 3)),
        nn.Conv3d(2, 4, 3),
    )

def wide():
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 16, 3))

def nan():
    model = small()
    model[2].weight.data[0] = float("nan")
    return model

def raising():
    raise RuntimeError("not today")

def raising_in_rank_1():
    if RANK == "1":
        raise RuntimeError("not here")
    return small()

def killed_in_rank_1():
    if RANK == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return small()

def overtaken():
    if RANK == "0":
        Path("init.safetensors").write_text("of somebody else")
    return small()
"""
OUT = ["--out", "init.safetensors"]
PATIENCE = 300  # seconds; what hangs, hangs for longer


@pytest.fixture(autouse=True)
def _networks(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in {"nets.py", "__pycache__"})


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, "-m", "convsim_init", *arguments], capture_output=True, text=True, timeout=PATIENCE
    )


def job(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment of a process."""
    meeting = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    return os.environ | meeting | {name: str(number) for name, number in numbers.items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks(processes: int, *arguments: str, program=("-m", "convsim_init"), machines: Sequence[Path] = ()):
    """What torchrun does, without its messages and without its ending the others: status, stdout and stderr of each.

    With folders given for machines, each process believes to be on one of its own, in that folder.
    """
    port, started = free_port(), []
    for rank in range(processes):
        apart = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if machines else {}
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=machines[rank] if machines else None,
            env=job(rank, processes, port) | apart,
        )
        started.append(process)
    try:
        told = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(started, told, strict=True)]


# The same files, under torchrun itself


@pytest.mark.posix
def test_one_run_is_divided_by_layers_and_written_as_by_one_process(command, tmp_path):
    files = ["--out", "{}.safetensors", "--report", "{}.json"]
    one, two = ([text.format(name) for text in files] for name in ("one", "two"))
    _, _, _ = command("nets.py:small", *one)
    done = torchrun(2, "nets.py:small", *two, "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert written(tmp_path) == ["one.json", "one.safetensors", "two.json", "two.safetensors"]

    shown = json.loads(done.stdout)  # shown once
    alone, together = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (alone["processes"], together["processes"], shown["processes"]) == (1, 2, 2)
    for record in (alone, together):
        for entry in (record, *record["layers"]):
            del entry["seconds"]
        del record["processes"], record["file"]
    assert together == alone


@pytest.mark.posix
def test_a_sweep_is_divided_by_runs_and_written_as_by_one_process(command, tmp_path):
    runs = ["nets.py:small", "nets.py:raising", "nets.py:wide", "--seeds", "0:2"]
    for folder in ("one", "three"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "nets-wide-1.pt").write_text("kept")
    status, out, err = command(*runs, "--out", "one/{model}-{seed}.pt", "--json")
    done = torchrun(3, *runs, "--out", "three/{model}-{seed}.pt", "--json")
    assert (status, done.returncode) == (1, 1)
    lines = [[line for line in text.splitlines() if line.startswith("Error: ")] for text in (err, done.stderr)]
    assert lines[0] == lines[1] != []
    assert written(tmp_path / "three") == written(tmp_path / "one") == [f"nets-{run}.pt" for run in DONE]
    for name in written(tmp_path / "one"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    alone, together = ([json.loads(line) for line in text.splitlines()] for text in (out, done.stdout))
    keys = ("model", "seed", "status", "error", "totals", "processes")
    assert [[line.get(key) for key in keys] for line in together] == [[line.get(key) for key in keys] for line in alone]


DONE = ["small-0", "small-1", "wide-0", "wide-1"]


def test_three_processes_have_more_than_enough_for_two_layers(command, tmp_path):
    command("nets.py:wide", "--out", "one.pt", "--base", "orthogonal")
    (first, *others) = ranks(3, "nets.py:wide", "--out", "three.pt", "--base", "orthogonal")
    assert first[0] == 0, first[2]
    assert "s on cpu in 3 processes, three.pt" in first[1]
    assert others == [(0, "", "")] * 2
    assert (tmp_path / "three.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()
    assert written(tmp_path) == ["one.pt", "three.pt"]


def test_machines_need_no_disk_in_common(command, tmp_path):
    command(f"{tmp_path}/nets.py:wide", "--out", "one.pt")
    machines = [tmp_path / name for name in ("first", "second")]
    for machine in machines:
        machine.mkdir()
    (machines[0] / "inits").mkdir()
    first, second = ranks(2, f"{tmp_path}/nets.py:wide", "--out", "inits/two.pt", machines=machines)
    assert (first[0], second) == (0, (0, "", "")), first[2]
    assert (machines[0] / "inits" / "two.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()
    assert list(machines[1].iterdir()) == []


def test_each_machine_tells_of_what_it_cannot_read(tmp_path):
    for status, out, err in ranks(2, "missing.pt", *OUT, machines=[tmp_path, tmp_path]):
        assert (status, out) == (2, "")
        assert err.startswith("Error: cannot read 'missing.pt'")


def test_a_table_on_stderr_is_shown_once():
    program = "import sys; sys.stdout = open('weights', 'w'); from convsim_init.cli.main import main; main()"
    first, second = ranks(2, "nets.py:wide", "--out", "-", program=("-c", program))
    assert (first[2].count("2 convolutions: 2 initialized"), second) == (1, (0, "", ""))


# Failing together


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        pytest.param("nets.py:raising", 2, "nets.py:raising raised RuntimeError: not today", id="all-raise"),
        pytest.param(
            "nets.py:raising_in_rank_1",
            2,
            "rank 1: nets.py:raising_in_rank_1 raised RuntimeError: not here; --debug shows where",
            id="one-raises",
        ),
        pytest.param(
            "nets.py:nan", 1, "layer '2' failed, left as it was: its weight holds infinities", id="layer-fails"
        ),
    ],
)
def test_an_error_is_told_once_and_ends_all(model, status, message, tmp_path):
    first, second = ranks(2, model, *OUT)
    assert (first[0], second[0]) == (status, status)
    assert first[2].startswith("Error: ")
    assert message in first[2]
    assert first[2].count("\n") == 1
    assert second[1:] == ("", "")
    assert written(tmp_path) == []


def test_where_an_error_was_raised_its_own_process_shows():
    first, second = ranks(2, "nets.py:raising_in_rank_1", "--debug", *OUT)
    assert first[2].endswith("RuntimeError: not here; --debug shows where\n")
    assert "in raising_in_rank_1" in second[2]


def test_a_file_that_cannot_be_written_ends_all(tmp_path):
    first, second = ranks(2, "nets.py:overtaken", *OUT)
    assert (first[0], second[0]) == (2, 2)
    assert "exists already" in first[2]
    assert second[1:] == ("", "")
    assert (tmp_path / "init.safetensors").read_text() == "of somebody else"


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        pytest.param(["nets.py:killed_in_rank_1", *OUT], [], id="run"),
        pytest.param(
            ["nets.py:small", "nets.py:killed_in_rank_1", "--seeds", "0:2", "--out", "{model}-{seed}.pt"],
            ["nets-small-0.pt", "nets-small-1.pt"],
            id="second-turn-of-a-sweep",
        ),
    ],
)
@pytest.mark.posix
def test_a_rank_that_dies_ends_all_and_leaves_whole_files(arguments, left, tmp_path):
    first, dead, third = ranks(3, *arguments) if not left else (*ranks(2, *arguments), None)
    assert dead[0] == -signal.SIGKILL
    assert first[0] == 1
    assert first[2].startswith("Error: expected all ")
    assert first[2].count("\n") == 1
    assert third is None or third == (1, "", "")
    assert written(tmp_path) == left


@pytest.mark.posix
def test_torchrun_ends_when_a_rank_dies(tmp_path):
    done = torchrun(2, "nets.py:killed_in_rank_1", *OUT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if line.startswith("Error: ")]) == 1
    assert written(tmp_path) == []


def test_wrong_usage_is_told_once_before_anybody_meets(tmp_path):
    first, second = ranks(2, "nets.py:small", "--out", "no/such/folder.pt")
    assert (first[0], second[0]) == (2, 2)
    assert first[2].startswith("Error: expected an existing folder")
    assert second[1:] == ("", "")


ALONE = """
import os, sys
from datetime import timedelta
from convsim_init.parallel import processes as ranks
from convsim_init.cli.main import main
ranks.RENDEZVOUS_TIMEOUT = timedelta(seconds=1)
main(sys.argv[1:])
"""


def test_who_waits_for_the_others_in_vain_says_so(tmp_path):
    process = [sys.executable, "-c", ALONE, "nets.py:small", *OUT]
    done = subprocess.run(process, capture_output=True, text=True, env=job(0, 2, free_port()), timeout=PATIENCE)
    assert done.returncode == 1
    assert "env -u TORCHELASTIC_RUN_ID" in done.stderr
    assert written(tmp_path) == []


# Other commands are done once


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "Usage: convsim-init"),
        (["--version"], "convsim-init"),
        (["list", "vgg11"], "vgg11"),
        (["inspect", "nets.py:wide"], "similarity"),
        (["nets.py:wide", "--dry-run"], "planned"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_divided_is_done_by_one(arguments, shown):
    first, second = ranks(2, *arguments)
    assert first[0] == 0, first[2]
    assert shown in first[1]
    assert second == (0, "", "")


# In Python

SCRIPT = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
sys.path.insert(0, ".")
import nets
import convsim_init as ci

torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.get_rank()

def drawn(factory):
    torch.manual_seed(0)
    return factory()

def start():
    model = nets.small()
    model.append(torch.nn.Conv2d(4, 6, 3, dtype=torch.bfloat16))
    model.append(torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last))
    model.append(torch.nn.utils.weight_norm(torch.nn.Conv2d(4, 6, 3)))
    return model

def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)

alone, together, entries, among_two = drawn(start), drawn(start), drawn(start).state_dict(), drawn(start)
state = torch.get_rng_state()
one = ci.initialize_(alone)
two = ci.initialize_(together, group=dist.group.WORLD)
assert one.processes == 1 and two.processes == 3
assert same(alone.state_dict(), together.state_dict())
assert together[10].weight.equal(alone[10].weight)
assert [(a.name, a.outcome, a.reason, a.losses, a.before, a.after) for a in one.layers] == [
    (b.name, b.outcome, b.reason, b.losses, b.before, b.after) for b in two.layers
]
assert torch.equal(torch.get_rng_state(), state)

with torch.inference_mode():
    inside, expected = drawn(nets.wide), drawn(nets.wide)
    ci.initialize_(expected)
    ci.initialize_(inside, group=dist.group.WORLD)
    assert same(inside.state_dict(), expected.state_dict())

ci.initialize_(entries, group=dist.group.WORLD)
by_itself = drawn(start).state_dict()
ci.initialize_(by_itself)
assert same(entries, by_itself)

pair = dist.new_group([1, 2])
if rank:
    ci.initialize_(among_two, group=pair)
    assert same(among_two.state_dict(), alone.state_dict())
else:
    try:
        ci.initialize_(among_two, group=pair)
    except ci.InputError as error:
        assert "a process group that this process is in" in str(error)
    else:
        raise AssertionError

def refused(other, why, settings=None):
    try:
        ci.initialize_(other, settings=settings, group=dist.group.WORLD)
    except ci.InputError as error:
        assert why in str(error)
    else:
        raise AssertionError

refused(drawn(nets.wide if rank == 2 else nets.small), "another in rank 2 than in rank 0")
other = drawn(nets.small)
other[2].weight.data[0] *= 1 + rank // 2
refused(other, "the same weights, got others for '2' in rank 2 than in rank 0")
refused(drawn(nets.small), "the same settings", ci.Settings(steps=3 + rank))
if rank == 1:
    ci.initialize_(other)  # talks to nobody
dist.barrier()
dist.destroy_process_group()
print("well")
"""


def test_a_group_divides_a_model_and_all_of_it_have_the_weights_of_one():
    for status, out, err in ranks(3, program=("-W", "ignore", "-c", SCRIPT)):
        assert status == 0, err
        assert out == "well\n"


# Who takes what


@pytest.mark.parametrize(
    ("costs", "hands", "owners"),
    [
        ([5, 4, 3, 3, 3], 2, [0, 1, 1, 0, 1]),
        ([1, 1, 1], 1, [0, 0, 0]),
        ([2, 9], 3, [1, 0]),
        ([0, 0, 7], 2, [1, 1, 0]),
        ([], 2, []),
        ([3, 3, 3, 3], 4, [0, 1, 2, 3]),
    ],
)
def test_the_dearest_goes_first_to_the_least_busy(costs, hands, owners):
    assert deal(costs, hands) == owners


def test_no_division_is_much_better():
    costs = torch.randint(1, 50, (20, 7), generator=torch.Generator().manual_seed(0)).tolist()

    def busiest(some, owners):
        return max(sum(cost for cost, owner in zip(some, owners, strict=True) if owner == hand) for hand in range(3))

    for some in costs:
        best = min(busiest(some, owners) for owners in itertools.product(range(3), repeat=7))
        assert busiest(some, deal(some, 3)) <= best * 4 / 3


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}


@pytest.mark.parametrize("missing", [None, *TORCHRUN])
def test_only_torchrun_makes_a_rank_of_a_process(missing, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.delenv(name, raising=False)
        if name != missing:
            monkeypatch.setenv(name, value)
    launch = launched()
    assert launch == (Launch(5, 8, 1, 4) if missing is None else Launch())
    assert launch.leads == launch.reports_errors == launch.on_first_machine == (missing is not None)


@pytest.mark.parametrize(
    ("name", "device"), [("auto", "cpu"), ("cuda", "cuda:1"), ("cuda:3", "cuda:3"), ("cpu", "cpu")]
)
def test_each_process_gets_a_card_of_its_own(name, device, monkeypatch):
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device(name) == torch.device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if name == "cuda":  # CUDA_VISIBLE_DEVICES gives each process one of its own, or they share the only one
        assert find_device("cuda") == find_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if name == "cuda":
        with pytest.raises(InputError, match=r"than its 2 CUDA devices, got 4: torchrun --nproc-per-node 2"):
            find_device(name)


# The model of the cost


def test_what_an_operation_moves_and_holds_is_counted():
    a, b, out = torch.ones(1000), torch.ones(10, 100), torch.empty(1000)
    with Count() as count:
        torch.mul(a, b.view(-1), out=out)  # reads two, writes one
        out.add_(a)  # the same
        (out + 1).sum()  # writes a new one and reads it
    assert (count.launches, count.moved, count.held) == (4, 4 * (3000 + 3000 + 2000 + 1001), 8004)


def test_the_documents_tell_what_a_step_is_counted_to_take(monkeypatch):
    monkeypatch.setenv("CONVSIM_INIT_COMPILED", "0")
    step = scale_model.counted_step()
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    found = re.findall(r"writes (\d+) bytes|computes (\d+) operations|holds (\d+) bytes", text)
    numbers = [int("".join(groups)) for groups in found]
    # The number of shorter steps that are tried may differ by the processor.
    assert numbers == pytest.approx([step.moved, step.flop, step.held], rel=0.1)


def test_the_network_on_paper_has_a_billion_weights():
    assert sum(torch.Size(shape).numel() for shape in network()) == pytest.approx(1e9, rel=0.02)
