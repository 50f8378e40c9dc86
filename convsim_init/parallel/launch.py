"""Which of the processes that torchrun started this one is. Imports no torch."""

from __future__ import annotations

import os
from typing import NamedTuple  # not dataclasses: importing those takes longer than all before a signal is handled


class Launch(NamedTuple):
    """A process among those that torchrun started, by default the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of its machine
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows the result."""
        return self.rank == 0

    @property
    def on_first_machine(self) -> bool:
        """Whether this process is on the machine of the leading one, and finds the same files there."""
        # Ranks count on from machine to machine, local ranks from 0 on each.
        return self.rank == self.local_rank

    @property
    def reports_errors(self) -> bool:
        """Whether this process shows errors for all of its machine."""
        return self.local_rank == 0


def launched() -> Launch:
    """This process's place, from the environment that torchrun has set.

    ``RANK`` and the like alone mean nothing: many a cluster sets them for processes of other work.
    """
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    if "TORCHELASTIC_RUN_ID" not in os.environ or not all(map(str.isdecimal, numbers)):
        return Launch()
    return Launch(*map(int, numbers))
