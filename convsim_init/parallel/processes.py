"""Processes at one piece of work, called ranks. Only this module talks to `torch.distributed`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from convsim_init.errors import InputError, RunError
from convsim_init.parallel.launch import Launch
from convsim_init.report.text import error_line

Value = TypeVar("Value")

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # of a rank that works; one that has died is noticed at once
STORE = "convsim-init"


def of_several_processes() -> bool:
    """Whether this process is one of several in `torch.distributed`."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Ranks:
    """The ranks of a process group, this one among them; a group of None is this process alone.

    Every method but the constructor must be called by all ranks, in the same order. It raises the `InputError` or
    `RunError` that another rank has sent instead of its call, or a `RunError` if a rank has died.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._ended = False  # whether a rank was lost or has sent an error: nobody waits any more
        # torch gives a rank of -1 to a process that is not in the group.
        if self.rank < 0:
            raise InputError("group: expected a process group that this process is in: call it only where it is")

    def exchange(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order; anything that can be pickled but errors."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self._reaching():
            dist.all_gather_object(values, value, group=self.group)
        for rank, received in enumerate(values):
            if isinstance(received, (InputError, RunError)):
                self._ended = True
                raise type(received)(f"rank {rank}: {received}")
        return values

    def broadcast_error(self, error: Exception) -> None:
        """Send an error to ranks that wait in `exchange` or `gather`, unless it came from one of them."""
        if self._ended:
            return
        kind = InputError if isinstance(error, InputError) else RunError
        with suppress(InputError, RunError):  # exchange raises this error here too, or that of another rank
            self.exchange(kind(error_line(error)))

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks in the first one; an empty list in the others."""
        if self.group is None:
            return [value]
        # Before the exchange: where pickling fails, the other ranks can still be sent the error.
        data = pickle.dumps(value)
        self.exchange(None)  # brings the errors of other ranks, which the next call could not
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        with self._reaching():
            dist.gather_object(data, values or None, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return [pickle.loads(data) for data in values]

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor], owner: int, *, device: torch.device | str | None = None) -> None:
        """Give tensors, of the same shapes and dtypes in every rank, the values that the owner's have.

        They travel from the device, or else from where they are, if the group connects such devices.
        """
        if self.group is None:
            return
        for tensor in tensors:
            carried = tensor.detach().to(self._carrier(torch.device(device or tensor.device))).contiguous()
            with self._reaching():  # as bytes: not every backend knows every dtype
                source = dist.get_global_rank(self.group, owner)
                dist.broadcast(carried.view(-1).view(torch.uint8), source, group=self.group)
            if self.rank != owner:
                tensor.copy_(carried)

    def _carrier(self, wanted: torch.device) -> torch.device:
        """The wanted device if the group connects such devices, or else one that it does connect."""
        connected = dist.get_backend_config(self.group)  # such as "cpu:gloo,cuda:nccl"
        if wanted.type in ("cpu", "cuda") and f"{wanted.type}:" in connected:
            return wanted
        return torch.device("cpu" if "cpu:" in connected else "cuda")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._ended = True
            raise RunError(
                f"expected all {self.size} processes to work to the end, and one has died or cannot be reached "
                f"(--debug in the shell shows more); no partial file is left"
            ) from error


@contextmanager
def process_group(launch: Launch) -> Iterator[Ranks]:
    """All ranks that torchrun started, which leave the context together; a `RunError` if not all of them come.

    An error that leaves the context in one rank leaves it in all of them.
    """
    ranks = _join(launch)
    try:
        yield ranks
        ranks.exchange(None)  # until the first rank has written its files, or sent an error
    except Exception as error:
        ranks.broadcast_error(error)
        raise
    finally:
        dist.destroy_process_group()


def _join(launch: Launch) -> Ranks:
    if not dist.is_available():
        raise RunError(
            "expected PyTorch with torch.distributed under torchrun, got one without it: use a single process"
        )
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))  # type: ignore[attr-defined]
        # A script that torchrun runs may call the command several times; each call has keys of its own.
        call = store.add(f"{STORE}/calls/{launch.rank}", 1)
        store = dist.PrefixStore(f"{STORE}/{call}", store)  # type: ignore[attr-defined]
        store.set(str(launch.rank), "here")
        store.wait([str(rank) for rank in range(launch.size)], RENDEZVOUS_TIMEOUT)
        # Weights travel by the CPU, whatever computes: NCCL refuses ranks that share a GPU.
        dist.init_process_group(
            "cpu:gloo", store=store, rank=launch.rank, world_size=launch.size, timeout=COLLECTIVE_TIMEOUT
        )
    except RuntimeError as error:
        raise RunError(
            f"expected all {launch.size} processes that torchrun started to run this command, and some did not come "
            f"within {RENDEZVOUS_TIMEOUT.seconds} s; to run it in one of them alone: "
            "env -u TORCHELASTIC_RUN_ID convsim-init ..."
        ) from error
    return Ranks(dist.group.WORLD)
