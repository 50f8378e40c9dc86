"""A team of threads for work on the CPU, with one intra-op thread each.

Torch's own threads divide each small operation, and mostly wait for each other. A team divides
whole layers, or the blocks of one layer, so that every core stays busy, and results do not depend
on the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Reentrant, because _one_intra_op_thread holds it and calls _callers_threads.
_intra_op = threading.RLock()  # guards the two below
_teams = 0  # how many teams are at work, perhaps in several threads of the caller
_callers = 1  # torch's number of intra-op threads before the first of these teams


class Cancelled(BaseException):
    """Raised in a worker whose result nobody waits for any more."""


class Team:
    """Threads that work for as long as the context lasts.

    Within it torch has one intra-op thread; the caller's number is put back at the end. Workers
    compute in the caller's context, in its inference mode, on its default device and its streams of
    GPUs, without gradients. In a team of one the caller does the work.
    """

    def __init__(self, threads: int) -> None:
        # In every thread of the team, because OpenMP keeps a number for each thread, and MKL uses it.
        start = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(threads, "convsim-init", start) if threads > 1 else None
        self._threads = threads
        self._left = threading.Event()
        # Of each thread its own. On another stream a copy from a GPU would not wait for what the caller began there.
        self._inference = torch.is_inference_mode_enabled()
        self._default = torch.empty(0).device
        self._streams = _callers_streams()

    @classmethod
    def for_devices(cls, *devices: torch.device) -> Team:
        """A team of as many threads as torch uses on the CPU; of one for accelerators."""
        return cls(_callers_threads() if all(device.type == "cpu" for device in devices) else 1)

    def __enter__(self) -> Team:
        # Undone from the last to the first: workers see that the caller has left, the pool waits for
        # them, and only then torch gets its threads back.
        self._exits = ExitStack()
        self._exits.enter_context(_one_intra_op_thread())
        if self._pool:
            self._exits.callback(self._pool.shutdown, cancel_futures=True)
        self._exits.callback(self._left.set)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def checkpoint(self) -> None:
        """Raise `Cancelled` once the caller has left; for long work to call often."""
        if self._left.is_set():
            raise Cancelled

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of ``work`` for every item, in the order of the items; the caller works too."""
        if self._pool is None or len(items) <= 1:
            return [work(item) for item in items]
        stops = [None] * self._threads  # one for each thread that takes items
        waiting = deque([*range(len(items)), *stops])

        def take(_: None) -> dict[int, Result]:
            try:
                return {number: work(items[number]) for number in iter(waiting.popleft, None)}
            except BaseException:
                waiting.extendleft(stops)  # nothing more is begun, by anyone
                raise

        # With the caller as many threads as stops; no more than items, because waking a thread takes long.
        helpers = [self._submit(take, stop) for stop in stops[1 : len(items)]]
        results = take(None)
        for helper in helpers:
            # A helper that has not begun by now has nothing left to do: the caller has reached a stop.
            if not helper.cancel():
                results |= helper.result()
        return [results[number] for number in range(len(items))]

    def as_completed(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Results of ``work`` for every item, as they come."""
        if self._pool is None:
            yield from map(work, items)
        else:
            yield from (future.result() for future in as_completed([self._submit(work, item) for item in items]))

    def _submit(self, work: Callable[[Item], Result], item: Item) -> Future[Result]:
        assert self._pool is not None

        def alone() -> Result:
            with torch.inference_mode(self._inference), torch.no_grad(), ExitStack() as modes:
                for stream in self._streams:
                    modes.enter_context(torch.cuda.stream(stream))
                if self._default.type != "cpu":
                    modes.enter_context(self._default)
                return work(item)

        return self._pool.submit(copy_context().run, alone)


def _callers_streams() -> list[torch.cuda.Stream]:
    """The stream of each GPU that this thread computes on, that of its current GPU last."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    current = torch.cuda.current_device()
    others = [index for index in range(torch.cuda.device_count()) if index != current]
    return [torch.cuda.current_stream(index) for index in (*others, current)]


def _callers_threads() -> int:
    """Torch's number of intra-op threads when no team is at work.

    To a thread that asks for the first time torch gives the number that was set last, by whichever
    thread: while a team is at work, its 1.
    """
    with _intra_op:
        here = torch.get_num_threads()
        return _callers if _teams and here == 1 else here


@contextmanager
def _one_intra_op_thread() -> Iterator[None]:
    global _teams, _callers
    with _intra_op:
        callers = _callers = _callers_threads()
        _teams += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _intra_op:
            _teams -= 1
            torch.set_num_threads(callers)
