"""The subcommand ``run``: a script as Python runs it, whose networks are treated before it trains them."""

import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from convsim_init.settings import Settings

SCRIPT = """
import pickle, signal, sys
import torch
from torch import nn
import beside

class Network(nn.Sequential):
    pass

if __name__ == "__main__":
    what, status = sys.argv[1:]
    model = Network(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    if what != "untrained":
        torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.zeros(1, 3, 8, 8))
    print(sys.argv[1:], beside.NAME, len(pickle.dumps(model)) > 0, type(model).__module__)
    if what == "signal":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
        signal.raise_signal(signal.SIGTERM)
    if what == "raise":
        raise RuntimeError("not today")
    if what == "refuse":
        import convsim_init
        raise convsim_init.InputError("not this")
    if what != "end":
        sys.exit(int(status))
"""


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("NAME = 'beside'")
    for name in ("train", "beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # torch.distributed leaves one of its own, which other tests of this process may have used.
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    before = sys.argv, sys.path[:], sys.modules["__main__"], sys.excepthook, signal.getsignal(signal.SIGINT)
    yield lambda *arguments: command("run", *arguments)
    now = sys.argv, sys.path, sys.modules["__main__"], sys.excepthook, signal.getsignal(signal.SIGINT)
    assert now == before


@pytest.mark.parametrize(
    ("what", "status", "code"),
    [("exit", "0", 0), ("exit", "7", 7), ("end", "0", 0), ("raise", "0", 1), ("refuse", "0", 1), ("signal", "0", 9)],
)
def test_a_script_runs_as_it_would_alone(what, status, code, run, tmp_path):
    got, out, err = run("--steps", "2", "code/train.py", what, status)
    assert got == code
    assert out == f"['{what}', '{status}'] beside True __main__\n"
    line, *rest = err.splitlines()
    assert line.startswith("convsim-init: Network, 2 convolutions: 2 initialized, ")
    assert ("RuntimeError: not today" in rest) == (what == "raise")
    script = str(tmp_path / "code" / "train.py")
    assert [text.split('"')[1] for text in rest if "File" in text] == [script] * (what in ("raise", "refuse"))
    assert ("convsim_init.errors.InputError: not this" in rest) == (what == "refuse")


def test_a_script_that_raises_has_its_own_hook_called(run, tmp_path):
    (tmp_path / "code" / "hooked.py").write_text(
        "import sys\nsys.excepthook = lambda kind, error, where: print(kind.__name__, error, where.tb_lineno)\n1 / 0\n"
    )
    assert run("-q", "code/hooked.py") == (1, "ZeroDivisionError division by zero 3\n", "")


@pytest.mark.parametrize("hook", ["lambda *_: nothing", "None"])
def test_an_error_is_shown_where_the_hook_for_errors_fails_too(hook, run, tmp_path):
    (tmp_path / "code" / "hooked.py").write_text(f"import sys\nsys.excepthook = {hook}\n1 / 0\n")
    status, _, err = run("-q", "code/hooked.py")
    assert status == 1
    assert "ZeroDivisionError: division by zero\n" in err
    assert ("NameError: name 'nothing'" if "nothing" in hook else "TypeError: 'NoneType'") in err.splitlines()[-1]


@pytest.mark.parametrize("by_command", [True, False], ids=["the command's", "the script's"])
def test_debug_counts_before_the_script_alone(by_command, run):
    script = ["code/train.py", "exit", "0" if by_command else "--debug"]
    status, _, err = run(*(["--debug"] if by_command else []), "--exclude", "nope", *script)
    assert status == 2
    assert ("Traceback" in err) == by_command
    assert err.splitlines()[-1].startswith("Error: exclude: no convolution matches 'nope'")


def test_an_error_that_is_no_exception_shows_the_code_of_the_script_alone(run, tmp_path):
    (tmp_path / "code" / "ended.py").write_text("raise GeneratorExit\n")
    status, _, err = run("-q", "code/ended.py")
    assert (status, err.count("File")) == (1, 1)


def test_a_compiled_script_runs_too(run, tmp_path):
    compiled = py_compile.compile("code/train.py", "code/train.pyc", doraise=True)
    (tmp_path / "code" / "train.py").unlink()
    status, out, _ = run(compiled, "exit", "3")
    assert (status, out) == (3, "['exit', '3'] beside True __main__\n")


@pytest.mark.parametrize("packed", [True, False])
def test_an_archive_or_a_folder_runs_as_it_would_alone(packed, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code" / "__main__.py").write_text(
        "import os, sys\nos.chdir(os.sep)\nimport beside\nprint(sys.argv, beside.NAME, __name__)\n"
    )
    script = shutil.make_archive("app", "zip", tmp_path / "code") if packed else "code"
    assert run("-q", script, "1")[:2] == (0, f"{[script, '1']} beside __main__\n")


def test_a_module_runs_too(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "code")
    status, out, err = run("--exclude", "2", "-m", "train", "exit", "3")
    assert (status, out) == (3, "['exit', '3'] beside True __main__\n")
    assert "2 convolutions: 1 initialized, 1 skipped" in err


def test_settings_and_device_are_those_that_were_chosen(run, monkeypatch):
    given = []
    monkeypatch.setattr("convsim_init.context.initializing", lambda **options: given.append(options) or nullcontext([]))
    chosen = ["--preset", "paper", "--pairs", "all", "--channels", "all", "--norm", "preserve", "--steps", "3"]
    for options in (chosen, ["--device", "cpu"]):
        assert run("-q", *options, "code/train.py", "untrained", "0")[0] == 0
    assert given[0]["settings"] == replace(Settings.paper(3), pairs="all", channels="all", norm="preserve")
    assert given[1]["settings"] == Settings()
    assert [options["device"] for options in given] == [None, torch.device("cpu")]


def test_a_device_that_cannot_be_is_refused_before_the_script_runs(run):
    message = "Error: expected the device to be auto, cpu, cuda, cuda:N or mps, got 'gpu'\n"
    assert run("--device", "gpu", "code/train.py", "exit", "0") == (2, "", message)


def test_a_copy_that_is_left_alone_is_told_of(run, tmp_path):
    (tmp_path / "agent.py").write_text(
        "import torch\nfrom torch import nn\nonline, target = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)\n"
        "target.load_state_dict(online.state_dict())\ntorch.optim.SGD(online.parameters(), lr=0.1)\n"
    )
    _, _, err = run("--steps", "2", str(tmp_path / "agent.py"))
    assert "\nconvsim-init: copies that are no longer equal to what they were copied from: (the model itself)" in err


def test_why_layers_are_left_alone_is_told(run, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 3))\n"
        "torch.optim.SGD(net.parameters(), lr=0.1)\n"
    )
    _, _, err = run("--steps", "2", "--exclude", "0", str(tmp_path / "net.py"))
    line, *reasons = err.splitlines()
    assert line.startswith("convsim-init: Sequential, 3 convolutions: 3 skipped, ")
    assert reasons == [
        "convsim-init: 1 skipped: excluded",
        "convsim-init: 1 skipped: one filter per group shares its channels with no other",
        "convsim-init: 1 skipped: only one filter",
    ]


def test_layers_that_were_treated_before_are_told_in_a_line(run, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "net = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(6)))\n"
        "part = nn.Sequential(*net)\ntorch.optim.SGD(part.parameters(), lr=0.1)\n"
    )
    _, _, err = run("--steps", "2", str(tmp_path / "net.py"))
    names = ", ".join(f"{index} of Sequential" for index in range(4))
    assert err.splitlines()[2:] == [f"convsim-init: 6 skipped: treated before, as {names} and 2 more"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no safe path")
def test_a_safe_path_stays_as_it_is(tmp_path):
    library = tmp_path / "library"
    library.mkdir()
    (library / "beside.py").write_text("")
    (tmp_path / "script.py").write_text("import beside, sys\nprint(sys.path[0])\n")
    path = os.pathsep.join([str(library), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "convsim_init", "run", "-q", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == f"{library}\n"


def test_options_behind_the_script_are_its_own(run):
    status, out, err = run("-q", "code/train.py", "--steps", "0")
    assert (status, out, err) == (0, "['--steps', '0'] beside True __main__\n", "")


def test_a_script_that_makes_no_optimizer_is_told(run):
    status, _, err = run("code/train.py", "untrained", "0")
    assert (status, err) == (
        0,
        "convsim-init: no network was treated: no convolution of PyTorch was given an optimizer of torch.optim\n",
    )


@pytest.mark.posix
def test_lines_for_a_closed_stderr_are_not_printed_elsewhere(tmp_path):
    (tmp_path / "train.py").write_text("print('trained')")
    line = f"'{sys.executable}' -m convsim_init run train.py 2>&-"
    assert subprocess.run(line, shell=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path).stdout == "trained\n"


def test_lines_go_to_what_a_script_has_for_stderr(tmp_path):
    methods = "'write': lambda _, text: print(len(text)), 'flush': lambda _: None"
    (tmp_path / "train.py").write_text(f"import sys\nsys.stderr = type('Lines', (), {{{methods}}})()\n")
    line = [sys.executable, "-m", "convsim_init", "run", "train.py"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "101\n1\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "expected a Python file to run, got 'missing.py', which is none: check the path"),
        (
            ["code/tarin.py"],
            "expected a Python file to run, got 'code/tarin.py', which is none: did you mean train.py?",
        ),
        (["code/nb.ipynb"], "expected a Python file to run, got 'code/nb.ipynb', a notebook: save it as one, for"),
        (
            ["--exclude", "stem", "code/train.py", "exit", "0"],
            "exclude: no convolution matches 'stem'; the convolutions are '0', '2'",
        ),
        ([], "Missing argument 'SCRIPT'"),
        (["--stepps", "code/train.py", "--steps", "1"], "No such option '--stepps'. Did you mean "),
        (["-m", "nothere"], "expected a script or module to run, got 'nothere': No module named nothere: check"),
        (["-m", "xml"], "expected a script or module to run, got 'xml': No module named xml.__main__; "),
        (["-m", "nothere.train"], "expected a script or module to run, got 'nothere.train': Error while finding"),
        (["-m", ".train"], "expected a script or module to run, got '.train': Relative module names"),
    ],
)
def test_what_cannot_be_run_is_an_error_of_one_line(arguments, message, run, tmp_path):
    (tmp_path / "code" / "nb.ipynb").write_text("{}")
    status, _, err = run(*arguments)
    assert status == 2
    assert err.splitlines()[-1].startswith(f"Error: {message}")
    assert "--exclude" in arguments or len(err.splitlines()) == 1


def test_a_script_that_finds_no_module_of_its_own_to_run_shows_its_traceback(run, tmp_path):
    script = tmp_path / "code" / "launch.py"
    script.write_text("import runpy\n\nrunpy.run_module('nothere')\n")
    status, _, err = run("code/launch.py")
    assert status == 1
    assert "No module named nothere\n" in err
    assert "Error: expected" not in err


def test_an_import_that_fails_in_a_module_shows_where(run, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import nothere\n")
    status, _, err = run("-q", "-m", "package.train")
    assert status == 1
    assert f'package{os.sep}__init__.py", line 1, in <module>\n' in err
    assert err.endswith("ModuleNotFoundError: No module named 'nothere'\n")


ENDING = """
import atexit, os, pickle, sys, threading

class Config:
    pass

def save(where):
    import beside
    print(where, len(pickle.dumps(Config())) > 0, os.path.basename(sys.argv[0]), sys.argv[1:], beside.NAME)

def save_late():
    threading.main_thread().join()
    save("thread")

if __name__ == "__main__":
    os.chdir(os.sep)
    print(open(os.path.join(os.path.dirname(__file__), "beside.py")).read(), hasattr(__builtins__, "print"))
    atexit.register(save, "exit")
    threading.Thread(target=save_late).start()
    sys.exit(5)
"""


@pytest.mark.parametrize("script", [["package/ending.py"], ["-m", "package.ending"]])
def test_what_ends_after_the_script_finds_what_it_would_alone(script, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "ending.py").write_text(ENDING)
    for folder in (tmp_path / "package", tmp_path):
        (folder / "beside.py").write_text("NAME = 'beside'")
    command = [sys.executable, "-m", "convsim_init", "run", "-q", *script, "last"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (
        5,
        ["NAME = 'beside' True", *(f"{where} True ending.py ['last'] beside" for where in ("thread", "exit"))],
        "",
    )


def test_a_script_that_is_no_python_shows_its_line_alone(run, tmp_path):
    (tmp_path / "code" / "train.py").write_text("x = = 3\n")
    status, _, err = run("-q", "code/train.py")
    assert status == 1
    assert err.splitlines()[0] == f'  File "{tmp_path / "code" / "train.py"}", line 1'


@pytest.mark.posix
def test_a_signal_ends_the_script_as_it_would_alone(tmp_path):
    (tmp_path / "sleeping.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "convsim_init", "run", "sleeping.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait(60) == -signal.SIGTERM


DATA_PARALLEL = """
import os, torch, torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # before the weights of the first process are sent
parallel = nn.parallel.DistributedDataParallel(model)
for _ in range(2):
    parallel(torch.randn(2, 3, 9, 9)).square().sum().backward()
    optimizer.step()
weights = [torch.empty_like(model[2].weight) for _ in range(2)]
dist.all_gather(weights, model[2].weight.detach())
if dist.get_rank() == 0:
    print("distance", float((weights[0] - weights[1]).abs().max()), flush=True)
dist.destroy_process_group()
# While Python ends, a thread of gloo may still let go of the last backward pass, and PyTorch then aborts.
os._exit(0)
"""


@pytest.mark.posix
def test_processes_that_draw_differently_stay_equal(tmp_path):
    (tmp_path / "parallel.py").write_text(DATA_PARALLEL)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "convsim_init", "run", "parallel.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "distance 0.0\n"), done.stderr
    assert done.stderr.count("2 convolutions: 2 initialized") == 1


STARTS_ANOTHER = """
import os, subprocess, sys, torch, torch.distributed as dist

if "RANK" not in os.environ:  # as Lightning does
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv[1], "RANK": "0", "WORLD_SIZE": "2"}
    subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"RANK": "1"})
dist.init_process_group("gloo")
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
torch.optim.SGD(model.parameters(), lr=0.1)
dist.barrier()
os._exit(0)
"""


@pytest.mark.posix
def test_processes_that_the_script_starts_itself_are_told_of(tmp_path):
    (tmp_path / "starting.py").write_text(STARTS_ANOTHER)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "convsim_init", "run", "starting.py", port]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "TORCHELASTIC_RUN_ID")}
    environment = kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[2] for line in done.stderr.splitlines() if "of several processes" in line] == [
        " this is one of several processes that torchrun did not start: those that the script starts are not treated, "
        "and may keep other weights than this one: let torchrun start all"
    ]
