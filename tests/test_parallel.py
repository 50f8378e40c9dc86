"""The team of threads: results in order, errors of whoever makes them, no waiting for those who are not needed."""

import threading
import time

import pytest
import torch

from convsim_init.parallel import Team


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
        team.map(work, range(1000))
    assert len(begun) < 1000 or not by_the_caller


def test_the_caller_does_all_where_the_others_are_busy():
    with Team(2) as team:
        asked = team.as_completed(lambda items: team.map(lambda item: -item, items), [[1, 2, 3], [4, 5, 6]])
        assert sorted(asked) == [[-4, -5, -6], [-1, -2, -3]]


def test_torchs_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    with Team(2):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
