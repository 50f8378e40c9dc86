"""The team of threads: results in order, errors of whoever makes them, no waiting for those who are not needed."""

import subprocess
import sys
import threading
import time
from contextvars import ContextVar

import pytest
import torch

from convsim_init.parallel.threads import Team


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("items", [[], [3], list(range(20))], ids=len)
def test_results_are_in_the_order_of_the_items(threads, items):
    with Team(threads) as team:
        assert team.map(lambda item: (time.sleep(0.001 * (item % 3)), item)[1], items) == items


@pytest.mark.parametrize("error", [ValueError, IndexError, KeyboardInterrupt])
@pytest.mark.parametrize("by_the_caller", [True, False])
def test_an_error_is_raised_and_no_work_begun_after_it(error, by_the_caller):
    begun, caller = [], threading.get_ident()

    def work(item):
        begun.append(item)
        time.sleep(0.01)
        if (threading.get_ident() == caller) == by_the_caller:
            raise error

    with pytest.raises(error), Team(2) as team:
        team.map(work, range(100))
    assert len(begun) < 100


def test_the_caller_does_all_where_the_others_are_busy():
    with Team(2) as team:
        asked = team.as_completed(lambda items: team.map(lambda item: -item, items), [[1, 2, 3], [4, 5, 6]])
        assert sorted(asked) == [[-4, -5, -6], [-1, -2, -3]]


def test_workers_have_the_callers_context_device_and_streams(monkeypatch):
    """What a layer's own code relies on, and what copies from a GPU wait for."""
    here, number = threading.local(), ContextVar("number", default=0)

    def set_stream(name):
        here.streams = [*getattr(here, "streams", []), name]

    patched = {"current_device": lambda: 1, "current_stream": lambda gpu: f"of {gpu}", "set_stream": set_stream}
    for name, function in patched.items():
        monkeypatch.setattr(torch.cuda, name, function)
    number.set(7)
    with torch.device("meta"):
        team = Team(2, map(torch.device, ["cuda:1", "cpu", "cuda:2", "cuda:1"]))
    with team:
        work = team.as_completed(lambda _: (here.streams, torch.empty(0).device.type, number.get()), range(3))
        assert list(work) == [(["of cuda:2", "of cuda:1"], "meta", 7)] * 3


def test_torchs_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    with Team(2):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_teams_that_overlap_give_it_back_too():
    """In a process of its own: the number that new threads hear is the process's."""
    code = """if True:
        import threading, torch
        from convsim_init.parallel.threads import Team
        torch.set_num_threads(3)
        entered, leave = threading.Event(), threading.Event()
        def first():
            with Team(2):
                entered.set()
                leave.wait(60)
        def second():
            with Team.for_device(torch.device("cpu")) as team:
                print(team._threads, torch.get_num_threads())
                leave.set()
                one.join()
            print(torch.get_num_threads())
        one, two = threading.Thread(target=first), threading.Thread(target=second)
        one.start(), entered.wait(60), two.start(), two.join()
        later = threading.Thread(target=lambda: print(torch.get_num_threads()))
        later.start(), later.join()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "1", "3", "3"]


def test_calls_that_overlap_in_several_threads_leave_torchs_number_as_it_was():
    code = """if True:
        import threading, torch, convsim_init as ci
        torch.set_num_threads(3)
        model = torch.nn.Sequential(*(torch.nn.Conv2d(8, 8, 3) for _ in range(4)))
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ci.initialize_(model)
        results = []
        def run():
            for _ in range(5):
                own = torch.nn.Sequential(*(torch.nn.Conv2d(8, 8, 3) for _ in range(4)))
                own.load_state_dict(state)
                ci.initialize_(own)
                results.append(all(map(torch.equal, own.state_dict().values(), model.state_dict().values())))
            results.append(torch.get_num_threads() == 3)
        threads = [threading.Thread(target=run) for _ in range(4)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        print(len(results), all(results), torch.get_num_threads())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["24", "True", "3"]
