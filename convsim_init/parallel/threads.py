"""A team of threads for work on the CPU, with one intra-op thread each.

Torch's own threads divide each small operation, and mostly wait for each other. A team divides whole layers, or the
blocks of one layer, so that every core stays busy, and results do not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cancelled(BaseException):
    """Raised in a worker whose result nobody waits for any more."""


class _IntraOp:
    """Torch's number of intra-op threads while teams work, maybe at once in several threads of the process.

    A thread that asks torch for the first time hears the number that was set last, by whichever thread: while a team
    works, its 1.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._teams, self._before = 0, 1

    def callers(self) -> int:
        """The number that the caller has when no team works."""
        with self._lock:
            return self._callers()

    def lower(self) -> int:
        """Set it to 1 and return what it was."""
        with self._lock:
            callers = self._before = self._callers()
            self._teams += 1
            torch.set_num_threads(1)
            return callers

    def give_back(self, callers: int) -> None:
        """Set it to what it was."""
        with self._lock:
            self._teams -= 1
            torch.set_num_threads(callers)

    def _callers(self) -> int:
        here = torch.get_num_threads()
        return self._before if self._teams and here == 1 else here


_intra_op = _IntraOp()


class Team:
    """Threads that work for as long as the context lasts.

    Within it torch has one intra-op thread; the caller's number is put back at the end. Workers compute in the
    caller's inference mode, without gradients.

    Args:
        threads: How many; with one, the caller does the work.
    """

    def __init__(self, threads: int) -> None:
        # MKL asks OpenMP, whose number of threads is each thread's own.
        start = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(threads, "convsim-init", start) if threads > 1 else None
        self._threads = threads
        self._left = threading.Event()
        self._inference = torch.is_inference_mode_enabled()

    @classmethod
    def for_devices(cls, *devices: torch.device) -> Team:
        """As many threads as torch would use on the CPU; an accelerator needs but one to be kept busy."""
        return cls(_intra_op.callers() if all(device.type == "cpu" for device in devices) else 1)

    def __enter__(self) -> Team:
        self._callers = _intra_op.lower()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        _intra_op.give_back(self._callers)

    def checkpoint(self) -> None:
        """To be called often by long work: raises once the caller has left, by an interrupt for instance."""
        if self._left.is_set():
            raise Cancelled

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of ``work`` for every item, in the order of the items; the caller works too, in its own mode."""
        if self._pool is None or len(items) == 1:
            return [work(item) for item in items]
        waiting, results = deque(enumerate(items)), dict[int, Result]()

        def take(_: int) -> None:
            while True:
                try:
                    number, item = waiting.popleft()
                except IndexError:  # none is left
                    return
                results[number] = work(item)

        helpers = self._submit(take, range(1, min(self._threads, len(items))))  # few: to wake one takes long
        try:
            take(0)
        finally:
            waiting.clear()
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()
        return [results[number] for number in range(len(items))]

    def as_completed(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Results of ``work`` for every item, as they come."""
        if self._pool is None:
            yield from map(work, items)
        else:
            yield from (future.result() for future in as_completed(self._submit(work, items)))

    def _submit(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Future[Result]]:
        assert self._pool is not None

        def alone(item: Item) -> Result:
            with torch.inference_mode(self._inference), torch.no_grad():
                return work(item)

        return [self._pool.submit(alone, item) for item in items]
