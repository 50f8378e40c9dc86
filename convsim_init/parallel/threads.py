"""A team of threads for work on the CPU, with one intra-op thread each.

Torch's own threads divide each small operation, and mostly wait for each other. A team divides
whole layers, or the blocks of one layer, so that every core stays busy, and results do not depend
on the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext
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

    Args:
        threads: How many.
        holding: Devices of the tensors that are read and written.
    """

    def __init__(self, threads: int, holding: Iterable[torch.device] = ()) -> None:
        start = partial(_start, _callers_streams(holding))
        self._pool = ThreadPoolExecutor(threads, "convsim-init", start) if threads > 1 else None
        self._threads = threads
        self._left = threading.Event()
        self._inference = torch.is_inference_mode_enabled()
        self._default = torch.empty(0).device

    @classmethod
    def for_device(cls, device: torch.device, *, holding: Iterable[torch.device] = ()) -> Team:
        """A team of as many threads as torch uses on the CPU; of one for accelerators."""
        return cls(_callers_threads() if device.type == "cpu" else 1, holding)

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
            # Every thread has these modes of its own.
            default = nullcontext() if self._default.type == "cpu" else self._default
            with torch.inference_mode(self._inference), torch.no_grad(), default:
                return work(item)

        return self._pool.submit(copy_context().run, alone)


def _callers_streams(devices: Iterable[torch.device]) -> list[torch.cuda.Stream]:
    """The streams that the caller computes on, of the GPUs among these devices; that of its current GPU is the last."""
    gpus = {device for device in devices if device.type == "cuda"}
    current = torch.device("cuda", torch.cuda.current_device()) if gpus else None
    return [torch.cuda.current_stream(gpu) for gpu in sorted(gpus, key=lambda gpu: gpu == current)]


def _start(streams: Iterable[torch.cuda.Stream]) -> None:
    """Prepare a thread of a team."""
    torch.set_num_threads(1)  # OpenMP keeps a number for each thread, and MKL uses it
    # A thread begins on the default stream of GPU 0, whose copies would not wait for what the caller began on another.
    # As a context, each would end with a switch to GPU 0, which takes hundreds of megabytes there in every process.
    for stream in streams:
        torch.cuda.set_stream(stream)


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
