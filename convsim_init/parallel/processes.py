"""Processes at one piece of work, called ranks: how they meet, hand each other results and errors, and part.

All that is said to `torch.distributed` is said here.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from convsim_init.errors import InputError, RunError
from convsim_init.parallel.launch import Launch

Value = TypeVar("Value")

MEETING = timedelta(minutes=5)
ANSWER = timedelta(hours=1)  # of a rank that works; one that has died is noticed at once
STORE = "convsim-init"


class KnownToAll:
    """An error that the other ranks need not be told of."""


class LostError(KnownToAll, RunError):
    """A rank has died or cannot be reached."""


class OtherInputError(KnownToAll, InputError):
    """An `InputError` of another rank."""


class OtherRunError(KnownToAll, RunError):
    """Any other error of another rank."""


@dataclass(frozen=True)
class _Trouble:
    """What a rank hands in instead of a result."""

    message: str
    of_input: bool

    @classmethod
    def of(cls, error: Exception) -> _Trouble:
        foreseen = isinstance(error, (InputError, RunError))
        return cls(str(error) if foreseen else f"{type(error).__name__}: {error}", isinstance(error, InputError))

    def error(self, rank: int) -> InputError | RunError:
        kind = OtherInputError if self.of_input else OtherRunError
        return kind(f"rank {rank}: {self.message}")


class Ranks:
    """The ranks of a process group, this one among them.

    Every method but the constructor must be called by all of them, in the same order.

    Args:
        group: Of `torch.distributed`; None for this process alone, which then talks to nobody.

    Attributes:
        group: The same.
        rank: The number of this one, from 0.
        size: How many there are.

    Raises:
        InputError: If this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise InputError("group: expected a process group that this process is in: call it only where it is")

    def exchange(self, value: Value) -> list[Value]:
        """What every rank hands in, in their order; anything that can be pickled.

        Raises:
            OtherInputError, OtherRunError: If a rank handed in an error instead.
            LostError: If one has died.
        """
        values = [value] if self.group is None else self._gather(value)
        for rank, one in enumerate(values):
            if isinstance(one, _Trouble):
                raise one.error(rank)
        return values

    def tell(self, error: Exception) -> None:
        """Hand in an error where the others hand in results; theirs, if they have any, are of no more interest."""
        with suppress(LostError):
            self._gather(_Trouble.of(error))

    def collect(self, value: Value) -> list[Value]:
        """What every rank hands in, for the first alone; an empty list for the others.

        Raises:
            OtherInputError, OtherRunError: If a rank handed in an error instead.
            LostError: If one has died.
        """
        if self.group is None:
            return [value]
        data = pickle.dumps(value)
        self.exchange(None)  # the last moment to tell of an error: what follows only brings data
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        with _reaching(self.size):
            dist.gather_object(data, values or None, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return [pickle.loads(data) for data in values]

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor], owner: int, *, device: torch.device | str | None = None) -> None:
        """Give tensors of all ranks the values that the owner's have.

        Args:
            tensors: Of the same shapes and dtypes in every rank.
            owner: Whose values count.
            device: From which they travel, if the group connects such devices. Default: where each tensor is.

        Raises:
            LostError: If a rank has died.
        """
        if self.group is None:
            return
        source = dist.get_global_rank(self.group, owner)
        for tensor in tensors:
            carried = tensor.detach().to(self._carrier(torch.device(device or tensor.device))).contiguous()
            with _reaching(self.size):  # as bytes: not every backend knows every dtype
                dist.broadcast(carried.view(-1).view(torch.uint8), source, group=self.group)
            if self.rank != owner:
                tensor.copy_(carried)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with _reaching(self.size):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _carrier(self, wanted: torch.device) -> torch.device:
        """That device, or else one that the group does connect."""
        connected = dist.get_backend_config(self.group)  # such as "cpu:gloo,cuda:nccl"
        if wanted.type in ("cpu", "cuda") and f"{wanted.type}:" in connected:
            return wanted
        return torch.device("cpu" if "cpu:" in connected else "cuda")


@contextmanager
def meet(launch: Launch) -> Iterator[Ranks]:
    """All ranks that torchrun started, for as long as the context lasts; they leave it together.

    An error that leaves the context in one rank leaves it in all of them.

    Args:
        launch: What torchrun said.

    Raises:
        RunError: If not all of them come.
    """
    ranks = _join(launch)
    try:
        yield ranks
        ranks.exchange(None)  # the others wait until the first has written its files, and hear if it could not
    except Exception as error:
        if not isinstance(error, KnownToAll):
            ranks.tell(error)
        raise
    finally:
        dist.destroy_process_group()


def _join(launch: Launch) -> Ranks:
    if not dist.is_available():
        raise RunError(
            "expected PyTorch with torch.distributed under torchrun, got one without it: use a single process"
        )
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=MEETING))  # type: ignore[attr-defined]
        # A script that torchrun runs may call the command again and again: what earlier calls left there is not for us.
        call = store.add(f"{STORE}/calls/{launch.rank}", 1)
        store = dist.PrefixStore(f"{STORE}/{call}", store)  # type: ignore[attr-defined]
        store.set(str(launch.rank), "here")
        store.wait([str(rank) for rank in range(launch.size)], MEETING)
    except RuntimeError as error:
        raise RunError(
            f"expected all {launch.size} processes that torchrun started to run this command, and some did not come "
            f"within {MEETING.seconds} s; to run it in one of them alone: env -u TORCHELASTIC_RUN_ID convsim-init ..."
        ) from error
    with _reaching(launch.size):
        # Weights travel by the CPU, whatever computes: NCCL refuses ranks that share a GPU.
        dist.init_process_group("cpu:gloo", store=store, rank=launch.rank, world_size=launch.size, timeout=ANSWER)
    return Ranks(dist.group.WORLD)


@contextmanager
def _reaching(size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostError(
            f"expected all {size} processes to work to the end, and one has died or cannot be reached (--debug shows "
            f"more); no partial file is left"
        ) from error
