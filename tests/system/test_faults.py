"""Faults from outside: kills, signals, disks and folders that fail, and runs that meet at one file."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from folders import OLD, names
from matplotlib.figure import Figure

from convsim_init import Report, Settings, save_checkpoint
from convsim_init.errors import InputError, RunError
from convsim_init.files import writing
from convsim_init.files.sources import check_source
from convsim_init.files.writing import check_target, new_folder, replacing, write_text
from convsim_init.plotting.figure import save_figure
from convsim_init.report.html import page
from convsim_init.report.record import record_text

ROOT = Path(__file__).parents[2]
WEIGHTS = {"w": torch.ones(1000)}
FORMATS = ["init.safetensors", "init.pt"]
formats = pytest.mark.parametrize("name", FORMATS)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


# Kills, and what they leave


@pytest.mark.posix
def test_kills_leave_a_whole_file_and_no_litter_that_stays(tmp_path):
    process = [sys.executable, ROOT / "tests/fuzz/kills.py", "--kills", "30", "--folder", tmp_path]
    done = subprocess.run(process, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == 30
    assert counts["in the middle of a write"] > 5  # else nothing was tried
    assert counts["damaged files"] == counts["folders with litter"] == 0


@pytest.mark.posix
def test_faults_of_the_system_damage_nothing():
    process = [sys.executable, ROOT / "tests/fuzz/faults.py", "--faults", "60"]
    done = subprocess.run(process, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["faults"] == 60
    assert counts["refused"] > 10


@pytest.mark.posix
def test_signals_at_random_moments_end_the_command_at_once_without_a_traceback():
    process = [sys.executable, ROOT / "tests/fuzz/signals.py", "--signals", "4", "--within", "2"]
    done = subprocess.run(process, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["commands"] == 4


def scratch_of(folder: Path, host: str = writing.HOST, age: float = 0) -> Path:
    left = folder / f".{host}-{'0' * 16}.convsim-init.tmp"
    left.mkdir()
    (left / "new").write_bytes(b"half of")
    (left / ".tmpOfALibrary").write_bytes(b"half of")
    for path in (left / "new", left / ".tmpOfALibrary", left):
        os.utime(path, (time.time() - age,) * 2)
    return left


@pytest.mark.parametrize(
    ("host", "age", "goes"),
    [
        pytest.param(writing.HOST, 0, True, id="ours", marks=pytest.mark.posix),  # elsewhere without locks, as below
        pytest.param("0" * 8, 3600, False, id="another-machine"),
        pytest.param("0" * 8, 2 * writing.ABANDONED, True, id="another-machine-long-ago"),
    ],
)
def test_the_next_run_removes_what_the_dead_left(host, age, goes, tmp_path):
    left = scratch_of(tmp_path, host, age)
    save_checkpoint(WEIGHTS, tmp_path / "init.pt")
    assert left.exists() is not goes


@pytest.mark.parametrize(("age", "goes"), [(3600, False), (2 * writing.ABANDONED, True)], ids=["young", "old"])
def test_without_locks_age_decides(age, goes, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "fcntl", None)
    left = scratch_of(tmp_path, age=age)
    save_checkpoint(WEIGHTS, tmp_path / "init.pt")
    assert left.exists() is not goes


@pytest.mark.posix
def test_what_the_living_write_stays(tmp_path):
    with replacing(tmp_path / "a.pt") as unfinished:
        unfinished.write_bytes(b"slow")
        os.utime(unfinished.parent, (0, 0))
        os.utime(unfinished, (0, 0))
        save_checkpoint(WEIGHTS, tmp_path / "b.pt")
        assert unfinished.read_bytes() == b"slow"
    assert names(tmp_path) == ["a.pt", "b.pt"]


@pytest.mark.posix
def test_names_that_only_resemble_ours_and_links_stay(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(OLD)
    (tmp_path / ".mine.convsim-init.tmp").mkdir()
    (tmp_path / f".{writing.HOST}-{'1' * 16}.convsim-init.tmp").symlink_to(precious)
    save_checkpoint(WEIGHTS, tmp_path / "init.pt")
    assert (precious / "file").read_bytes() == OLD
    assert (tmp_path / ".mine.convsim-init.tmp").exists()


RACE = """
import os, sys, torch
from convsim_init import save_checkpoint
torch.set_num_threads(1)
children = []
for value in (1.0, 2.0):
    child = os.fork()
    if child == 0:
        for _ in range(30):
            for path in sys.argv[1:]:
                save_checkpoint({"w": torch.full((30000,), value)}, path, overwrite=True)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.posix
def test_two_runs_may_write_the_same_files(tmp_path):
    paths = [tmp_path / name for name in FORMATS]
    done = subprocess.run([sys.executable, "-c", RACE, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == sorted(FORMATS)
    for path in paths:
        raced, wholes = path.read_bytes(), []
        for value in (1.0, 2.0):
            save_checkpoint({"w": torch.full((30000,), value)}, path, overwrite=True)
            wholes.append(path.read_bytes())
        assert raced in wholes


# Signals

BUSY = """
import hashlib, sys
from convsim_init import initialize
from convsim_init.files.writing import replacing
from pathlib import Path

def busy(*_, **__):
    with replacing(Path(sys.argv[1])) as unfinished:
        unfinished.write_bytes(b"half of")
        print("busy", file=sys.__stdout__, flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C code, deaf to signals

initialize.initialize_layers = busy
from convsim_init.cli.main import main
main(["cifar_resnet18", "--out", sys.argv[1], "--force"])
"""
SIGNALS = [
    pytest.param(signal.SIGTERM, 143, "Error: terminated; no partial file is left\n", id="term"),
    pytest.param(signal.SIGINT, 130, "Error: interrupted; no partial file is left\n", id="int"),
]


@pytest.mark.parametrize(("number", "status", "line"), SIGNALS)
@pytest.mark.posix
def test_a_signal_ends_even_what_is_deaf_to_it(number, status, line, tmp_path):
    path = tmp_path / "init.pt"
    path.write_bytes(OLD)
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(number)
        assert process.communicate(timeout=30) == ("", line)
    finally:
        process.kill()
    assert process.returncode == status
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == OLD


ENDLESS = """
import sys
from convsim_init.cli.main import main
from convsim_init.optim import descent
begin = descent._adam
def adam(*arguments):
    print("begun", file=sys.__stdout__, flush=True)
    return begin(*arguments)
descent._adam = adam
main(["cifar_resnet18", "--preset", "paper", "--steps", "1000000", "--out", sys.argv[1]])
"""


@pytest.mark.posix
def test_sigterm_ends_the_descent(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, tmp_path / "init.pt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[1] == "Error: terminated; no partial file is left\n"
    finally:
        process.kill()
    assert process.returncode == 143
    assert names(tmp_path) == []


def test_sigterm_is_the_callers_again_after_a_run(command):
    command("list")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


# Disks and folders


def mounted(options: str, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python script where a file system of its own is mounted on the folder, or skip the test."""
    if shutil.which("unshare") is None or os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting needs the superuser and unshare")
    if subprocess.run(["unshare", "-m", "mount", *options.split(), folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    line = f'mount {options} "$0" && exec "$1" -c "$2" "$0"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", line, folder, sys.executable, script], capture_output=True, text=True
    )


FULL = """
import os, sys, torch
from pathlib import Path
from convsim_init import save_checkpoint
from convsim_init.errors import InputError, RunError
folder = Path(sys.argv[1])
for name in ("init.safetensors", "init.pt"):
    save_checkpoint({"w": torch.ones(10)}, folder / name)
    old = (folder / name).read_bytes()
    try:
        save_checkpoint({"w": torch.ones(10**6)}, folder / name, overwrite=True)
    except RunError as error:
        print(error)
    assert (folder / name).read_bytes() == old
print(sorted(os.listdir(folder)))
"""


def test_a_full_disk_keeps_the_old_file_and_no_litter(tmp_path):
    done = mounted("-t tmpfs -o size=1m none", FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    *errors, left = done.stdout.splitlines()
    assert len(errors) == len(FORMATS)
    for name, error in zip(FORMATS, errors, strict=True):
        assert error.startswith(f"could not write '{tmp_path / name}': ")
        assert "No space left on device" in error
        assert error.endswith("; nothing changed there")
    assert left == "['init.pt', 'init.safetensors']"


READ_ONLY = """
import sys
from convsim_init.files.writing import check_target
try:
    check_target(sys.argv[1] + "/init.pt")
except ValueError as error:
    print(error)
"""


def test_a_read_only_disk_is_refused_before_any_work(tmp_path):
    done = mounted("-t tmpfs -o ro none", READ_ONLY, tmp_path)
    assert done.stdout == f"expected a folder that can be written to, got '{tmp_path}': choose another\n", done.stderr


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def become_a_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


@pytest.mark.parametrize(
    ("happens", "cause", "left"),
    [
        pytest.param(remove_folder, "No such file or directory", None, id="folder-removed", marks=pytest.mark.posix),
        pytest.param(
            become_a_folder, "Is a directory", ["init.pt"], id="a-folder-in-its-place", marks=pytest.mark.posix
        ),
    ],
)
def test_what_changes_during_the_run_is_told(happens, cause, left, tmp_path):
    path = tmp_path / "folder" / "init.pt"
    path.parent.mkdir()
    path.write_bytes(OLD)

    def run() -> None:
        with replacing(check_target(path, overwrite=True), overwrite=True) as unfinished:
            unfinished.write_bytes(b"new")
            happens(path)

    with pytest.raises(RunError) as caught:
        run()
    assert str(caught.value) == f"could not write {str(path)!r}: {cause}; nothing changed there"
    assert left is None or names(path.parent) == left


@pytest.mark.posix
def test_a_link_made_during_the_run_is_replaced_and_not_followed(tmp_path):
    path, other = tmp_path / "init.pt", tmp_path / "other"
    other.write_bytes(OLD)
    with replacing(check_target(path), overwrite=True) as unfinished:
        unfinished.write_bytes(b"new")
        path.symlink_to(other)
    assert (other.read_bytes(), path.read_bytes(), path.is_symlink()) == (OLD, b"new", False)


def fail_with(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


APPEARING = [
    pytest.param(lambda path: path.write_bytes(OLD), id="file"),
    pytest.param(link("gone"), id="link", marks=pytest.mark.posix),
]


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("appears", APPEARING)
def test_what_appears_during_the_run_is_kept(appears, hard_links, tmp_path, monkeypatch):
    path = tmp_path / "init.pt"
    if not hard_links:
        monkeypatch.setattr(os, "link", fail_with(errno.EPERM))

    def run() -> None:
        with replacing(check_target(path)) as unfinished:
            unfinished.write_bytes(b"new")
            appears(path)

    with pytest.raises(InputError, match="exists already: choose another name or pass overwrite=True"):
        run()
    assert path.is_symlink() or path.read_bytes() == OLD
    assert names(tmp_path) == [path.name]


def test_without_hard_links_a_new_file_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    save_checkpoint(WEIGHTS, tmp_path / "init.pt")
    assert names(tmp_path) == ["init.pt"]


FIRST = """
import os, sys
from pathlib import Path
from convsim_init.files.writing import ExistsError, replacing
children = []
for number in range(8):
    child = os.fork()
    if child == 0:
        for turn in range(50):
            try:
                with replacing(Path(sys.argv[1], f"{turn}.pt")) as unfinished:
                    unfinished.write_bytes(bytes([number]) * 10000)
            except ExistsError:
                continue
            with Path(sys.argv[1], f"{turn}.winners").open("ab") as winners:
                winners.write(bytes([number]))
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.posix
def test_of_many_that_write_a_new_file_at_once_the_first_one_keeps_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", FIRST, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(names(tmp_path)) == 100
    for turn in range(50):
        (winner,) = (tmp_path / f"{turn}.winners").read_bytes()
        assert (tmp_path / f"{turn}.pt").read_bytes() == bytes([winner]) * 10000


REPORT = Report(Settings(), [], model="net")
OTHER_KINDS = {
    "run.json": partial(write_text, text=record_text(REPORT), suffixes=[".json"]),
    "run.html": partial(write_text, text=page(REPORT, {}), suffixes=[".html"]),
    "change.png": partial(save_figure, Figure()),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_reports_and_pictures_appear_whole_or_not_at_all_and_replace_a_file_on_demand(name, tmp_path, monkeypatch):
    write, path = OTHER_KINDS[name], tmp_path / name
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail_with(errno.ENOSPC))
        with pytest.raises(RunError, match="No space left"):
            write(path=path)
        assert names(tmp_path) == []
        path.write_bytes(OLD)
        with pytest.raises(RunError, match="No space left"):
            write(path=path, overwrite=True)
    for place, refusal in ((path, "exists already"), (path.with_suffix(path.suffix[:-1]), "ending in")):
        with pytest.raises(InputError, match=refusal):
            write(path=place)
    assert (names(tmp_path), path.read_bytes()) == ([name], OLD)
    assert write(path=path, overwrite=True) == path
    assert OLD not in path.read_bytes()


# What a file system cannot do


@formats
@pytest.mark.parametrize(
    ("owner", "call", "code", "problem"),
    [
        pytest.param(Path, "chmod", errno.EPERM, "its mode could not be set: Operation not permitted", id="chmod"),
        pytest.param(os, "fsync", errno.EINVAL, "it could not be synced: Invalid argument", id="fsync-invalid"),
        pytest.param(
            os,
            "fsync",
            errno.ENOTSUP,
            f"it could not be synced: {os.strerror(errno.ENOTSUP)}",
            id="fsync-unsupported",
        ),
    ],
)
def test_what_a_file_system_cannot_do_is_a_warning(owner, call, code, problem, name, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, call, fail_with(code))
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(repr(str(tmp_path / name)))} is written, but {problem}$"):
        save_checkpoint(WEIGHTS, tmp_path / name)
    assert names(tmp_path) == [name]


@pytest.mark.filterwarnings("error")
def test_where_no_folder_can_be_opened_files_alone_are_synced(tmp_path, monkeypatch):
    """As on Windows, which also syncs no file that was opened to be read."""
    open_file, opened = os.open, []

    def open_there(path: Path, flags: int, *mode: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        opened.append(flags & os.O_RDWR)
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_there)
    with new_folder(tmp_path / "net") as folder:
        (folder / "config.json").write_text("{}")
    assert (names(tmp_path), opened) == (["net"], [os.O_RDWR])


@pytest.mark.posix
def test_after_the_rename_nobody_says_that_nothing_changed(tmp_path, monkeypatch):
    path, sync = tmp_path / "init.pt", os.fsync
    path.write_bytes(OLD)

    def sync_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            fail_with(errno.EIO)()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_alone)
    monkeypatch.setattr(os, "unlink", fail_with(errno.EIO))
    with pytest.warns(RuntimeWarning, match="is written, but its folder could not be synced: Input/output error"):
        save_checkpoint(WEIGHTS, path, overwrite=True)
    assert torch.load(path)["w"].equal(WEIGHTS["w"])


def test_a_lock_that_cannot_be_closed_is_no_trouble(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_lock", lambda folder, wait: 10**6)  # no descriptor
    save_checkpoint(WEIGHTS, tmp_path / "init.pt")
    assert names(tmp_path) == ["init.pt"]


@formats
def test_no_more_open_files_is_told(name, tmp_path):
    resource = pytest.importorskip("resource", reason="needs limits of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    (tmp_path / name).write_bytes(OLD)
    save_checkpoint(WEIGHTS, tmp_path / name, overwrite=True)  # what is imported on first use
    whole = (tmp_path / name).read_bytes()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(RunError, match="Too many open files; nothing changed there"):
            save_checkpoint({"w": torch.zeros(3)}, tmp_path / name, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / name).read_bytes() == whole
    assert names(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "prepare", "message"),
    [
        pytest.param("a.pt", Path.mkdir, "expected a file to write, got the folder 'a.pt'", id="folder"),
        pytest.param("/dev/stdout", None, "expected a file name ending in .safetensors, .pt, .pth, got", id="stdout"),
        *(
            pytest.param("a.pt", prepare, message, id=name, marks=pytest.mark.posix)
            for name, prepare, message in [
                ("device", link("/dev/null"), "expected an ordinary file to write, got 'a.pt'"),
                ("loop", link("a.pt"), "expected an ordinary file to write, got 'a.pt'"),
                ("dangling", link("gone/a.pt"), "expected an existing folder to write to, got"),
                ("fifo", lambda path: os.mkfifo(path), "expected an ordinary file to write, got 'a.pt'"),
            ]
        ),
        pytest.param("gone/a.pt", None, "expected an existing folder to write to, got", id="no-folder"),
        pytest.param(
            "gone/../a.pt",
            None,
            f"expected an existing folder to write to, got {str(Path('gone', '..'))!r}: create",
            id="through-no-folder",
            marks=pytest.mark.posix,
        ),
        pytest.param(
            "old/a.pt",
            lambda path: path.parent.write_bytes(OLD),
            "expected an existing folder to write to, got",
            id="below-a-file",
        ),
        *(
            pytest.param(name, None, message, id=id, marks=pytest.mark.posix)
            for name, message, id in [
                ("x" * 253 + ".pt", "cannot write 'xxx", "name-of-256-bytes"),
                ("é" * 127 + ".pt", "cannot write 'ééé", "name-of-257-bytes"),
                ("./" * 2100 + "a" * 300 + ".pt", "cannot write", "path-too-long"),
                ("a" * 260 + "/a.pt", "cannot write", "folder-too-long"),
            ]
        ),
        pytest.param("s3://a/b.pt", None, "expected a path on this machine, got the address", id="address"),
        pytest.param("", None, "expected a file name ending in", id="empty"),
        pytest.param(".", None, "expected a file name ending in", id="dot"),
        pytest.param("a.pt/", Path.mkdir, "'a.pt' exists already: remove it first", id="slash"),
        pytest.param("a.PT", None, "expected a file name ending in", id="capitals"),
    ],
)
def test_targets_that_cannot_be_are_refused_in_one_line_before_any_work(name, prepare, message, command, tmp_path):
    if prepare:
        prepare(tmp_path / name)
    before = names(tmp_path)
    for arguments in (["cifar_resnet18", "--out", name, "--force", "--exclude", "nothing"], ["inspect", name]):
        status, out, err = command(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert arguments[0] == "inspect" or err.startswith(f"Error: {message}")
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("x" * 252 + ".pt", id="long"),
        pytest.param("é" * 120 + "x.safetensors", id="long-in-bytes"),
        pytest.param("a\nb.pt", id="newline", marks=pytest.mark.posix),
        pytest.param("-.pt", id="hyphen"),
        pytest.param("a'b.pt", id="quote"),
    ],
)
def test_odd_names_that_can_be_are_written(name, tmp_path):
    save_checkpoint(WEIGHTS, tmp_path / name)
    assert names(tmp_path) == [name]
    assert stat.S_ISREG((tmp_path / name).lstat().st_mode)


UNNAMEABLE = [
    pytest.param("a\nb/c.pt", id="newline"),
    pytest.param("a\0b.pt", id="null"),
    pytest.param("a\ud800.pt", id="surrogate", marks=pytest.mark.posix),
]


@pytest.mark.parametrize("name", UNNAMEABLE)
@pytest.mark.parametrize("check", [check_target, check_source])
def test_what_no_system_can_name_is_refused_in_one_line(check, name):
    with pytest.raises(InputError) as caught:
        check(name)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_a_folder_that_only_shells_know_is_told_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="only shells read ~ as the home folder"):
        writing.check_target("~/a.pt")
