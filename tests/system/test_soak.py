"""Many initializations in one process: nothing piles up, and threads do not disturb each other."""

import os
import threading

import pytest
import torch

import convsim_init as ci
from benchmarks.coverage.soak import SETTINGS, as_in_turn, drawn, run_many, usage


@pytest.mark.posix
def test_files_and_threads_do_not_pile_up(tmp_path):
    run_many(3, tmp_path)
    before = usage()
    run_many(40, tmp_path)
    after = usage()
    assert after["open files"] == before["open files"]
    assert after["threads"] <= before["threads"]
    assert os.listdir(tmp_path) == ["init.safetensors"]


def test_threads_at_once_do_as_in_turn():
    assert as_in_turn(threads=4, models=8)


def test_the_callers_number_of_threads_survives_runs_at_once():
    former = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        models = [drawn(seed) for seed in range(6)]
        options = {"settings": SETTINGS}
        runs = [threading.Thread(target=ci.initialize_, args=(model,), kwargs=options) for model in models]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(former)
