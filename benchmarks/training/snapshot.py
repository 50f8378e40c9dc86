"""What a run needs to go on, in a file: one that was interrupted loses what came after its last test, and no more."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convsim_init.files.writing import replacing


class Snapshot:
    """The file of a run that is not over. That of another run is passed over, and replaced.

    Args:
        path: Path of the file, which need not be there.
        run: What sets the run apart from others, as text.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._run, self._started = path, run, time.perf_counter()
        state: dict[str, Any] = torch.load(path, weights_only=True) if path.exists() else {}
        self._state = state if state.get("run") == run else {}
        self._before = self._state.get("seconds", 0.0)

    @property
    def seconds(self) -> float:
        """What the run has taken, what came before an interruption included."""
        return self._before + time.perf_counter() - self._started

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, accuracies: list[float]
    ) -> None:
        """Write the file, whole or not at all."""
        state = {"run": self._run, "seconds": self.seconds, "accuracies": accuracies}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"generator": generator.get_state(), "global": torch.get_rng_state()}
        with replacing(self._path, overwrite=True) as temporary:
            torch.save(state, temporary)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> list[float]:
        """Put back what was saved: the accuracies of the tests so far, none where the run has not begun."""
        state, self._state = self._state, {}
        if not state:
            return []
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["global"])
        return list(state["accuracies"])

    def remove(self) -> None:
        """Remove the file, once the run is recorded."""
        self._path.unlink(missing_ok=True)
