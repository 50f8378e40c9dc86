"""Layers side by side: one thread a layer on the CPU, so that small layers keep every core busy too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cancelled(BaseException):
    """Raised in a worker whose result nobody waits for any more."""


def run(work: Callable[[Item, Callable[[], None]], Result], items: Sequence[Item], *, threads: int) -> Iterator[Result]:
    """Call ``work(item, checkpoint)`` for every item and yield the results as they come.

    With several threads torch computes each item on one, so that results don't depend on how many there are; the
    caller's number of threads is put back. When the caller leaves, by an interrupt for instance, ``checkpoint()``
    raises in the workers, which should call it often.
    """
    left = threading.Event()

    def checkpoint() -> None:
        if left.is_set():
            raise Cancelled

    inference = torch.is_inference_mode_enabled()

    def one(item: Item) -> Result:
        with torch.inference_mode(inference):
            return work(item, checkpoint)

    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="convsim-init")
    try:
        for done in as_completed([pool.submit(one, item) for item in items]):
            yield done.result()
    finally:
        left.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(intra_op)
