"""Which of the processes that torchrun started this one is. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A process among those at work on the same command: by default the only one.

    Attributes:
        rank: Its number among all, from 0.
        size: How many there are.
        local_rank: Its number among those of its machine, from 0.
        local_size: How many of them its machine has.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes files and shows the result."""
        return self.rank == 0

    @property
    def beside_first(self) -> bool:
        """Whether it is on the machine of the one that leads, and finds the same files there."""
        return self.rank == self.local_rank

    @property
    def speaks(self) -> bool:
        """Whether it is the one of its machine that tells of errors, which all of them meet."""
        return self.local_rank == 0


def launched() -> Launch:
    """What torchrun says of this process in the environment.

    ``RANK`` and the like alone mean nothing: many a cluster sets them for processes that it starts for other work.
    """
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    if "TORCHELASTIC_RUN_ID" not in os.environ or not all(map(str.isdecimal, numbers)):
        return Launch()
    return Launch(*map(int, numbers))
