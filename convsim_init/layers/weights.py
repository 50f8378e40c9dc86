"""Reading and writing the weight that a convolution's forward pass uses, however its module stores it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from convsim_init.layers.forward.trial import Call
from convsim_init.layers.memory import gradient_hooks, overlaps_itself, why_without_memory, write_values
from convsim_init.layers.obstacle import Cause, Obstacle

KERNEL_RANKS = (3, 4, 5)  # ranks of weights: two more than those of kernels
MAX_SPREAD = 0.01  # of a weight over random numbers, relative to its norm
TREATED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RefusedError(RuntimeError):
    """The storage of a weight refuses to be assigned to."""


class Weight(ABC):
    """The weight of a convolution: what its forward pass uses, and the tensors that this is stored in.

    Args:
        sources: Tensors that it is stored in or computed from.
        trained: Whether the sources belong to a model, where they may be frozen, and not to a state dict.

    Attributes:
        shape: Shape of the weight; empty if it cannot be computed, as in a lazy module.
        source_ids: The ids of the sources.
        made_of: The ids of the parameters that the weight which a forward pass uses is made of.
        note: A note on it for its layer's report; `obstacle` has to be called first.
        call: The call that uses it, if a trial pass has shown one; else the module has its groups and strides.
    """

    def __init__(self, *sources: Tensor, trained: bool = True) -> None:
        self.sources = sources
        self.shape = [] if is_lazy(sources[0]) else list(sources[0].shape)
        self.source_ids = self.made_of = frozenset(map(id, sources))
        self._trained = trained
        self.note: str | None = None
        self.call: Call | None = None

    @property
    def mask(self) -> Tensor | None:
        """Where the weight that is used may differ from zero, as a mask of its shape; None for everywhere."""
        return None

    def obstacle(self, *, read_only: bool) -> Obstacle | None:
        """Why it cannot be read or, unless `read_only`, must not be written; None if it can."""
        # This comes first, because the other questions need memory: a lazy weight, for one, has no rank yet.
        for source in self.sources:
            if (reason := why_without_memory(source)) is not None:
                return Obstacle(reason)
        if len(self.shape) not in KERNEL_RANKS:
            return Obstacle(f"its weight is of rank {len(self.shape)}, without kernels")
        if not read_only and any(map(overlaps_itself, self.sources)):
            return Obstacle("its entries share memory, as after expand(): clone it first")
        inference = not torch.is_inference_mode_enabled() and any(s.is_inference() for s in self.storage().values())
        if not read_only and inference:
            return Obstacle("made under torch.inference_mode, and cannot be changed outside of it: make it outside")
        frozen = [source for source in self.sources if not source.requires_grad]
        if self._trained and not read_only and frozen:
            part = "" if len(frozen) == len(self.sources) else " of a part of its weight"
            return Obstacle(f"frozen: requires_grad{part} is False", Cause.FROZEN)
        if any(source.dtype not in TREATED_DTYPES for source in self.sources):
            return Obstacle(f"its dtype {self.sources[0].dtype} is not treated")
        return Obstacle("its weight is empty") if 0 in self.shape else None

    @abstractmethod
    def compute(self) -> Tensor:
        """The weight that is used, differentiable by the sources."""

    def read(self) -> Tensor:
        """The weight that is used, detached; it may share memory with the sources."""
        with torch.no_grad():
            return self.compute().detach()

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the weight that is used.

        Returns:
            How the weight that is used afterwards differs from the given one; None if it does not.

        Raises:
            RefusedError: If it cannot be set; then nothing was changed.
        """
        source, mask = self.sources[0], self.mask
        source.copy_(weight if mask is None else torch.where(mask, weight.to(source), source))
        return None

    def backup(self) -> Callable[[], None]:
        """A function that undoes a `write`, to the bit."""
        values = {name: tensor.detach().clone() for name, tensor in self.storage().items()}

        @torch.no_grad()
        def restore() -> None:
            # The storage is asked for again, because a parametrization may have replaced tensors.
            for name, tensor in self.storage().items():
                if name in values:
                    write_values(tensor, values[name])

        return restore

    def storage(self) -> dict[str, Tensor]:
        """The tensors that a `write` may change, by name."""
        return {str(position): source for position, source in enumerate(self.sources)}


class StoredWeight(Weight):
    """A weight that is used as it is stored."""

    @property
    def mask(self) -> Tensor | None:
        """The entries that are not zero, if a hook on the gradient keeps zeros in training; None for all entries."""
        if not any(gradient_hooks(self.sources[0])):
            return None
        mask = self.sources[0].detach() != 0
        return None if mask.all() else mask

    def compute(self) -> Tensor:
        """The stored tensor."""
        return self.sources[0]


class ComputedWeight(Weight):
    """A weight that can be read but not set.

    Args:
        source: Tensor of its shape that it is computed from.
        compute: Function that computes it; None if it cannot be read either.
        reason: Why it cannot be set.
    """

    def __init__(self, source: Tensor, compute: Callable[[], Tensor] | None, reason: str) -> None:
        super().__init__(source)
        self._compute, self._reason = compute, reason

    def obstacle(self, *, read_only: bool) -> Obstacle | None:
        """Why it cannot be read or, unless `read_only`, the reason why it cannot be set."""
        if self._compute is None or not read_only:
            return Obstacle(self._reason)
        return super().obstacle(read_only=True)

    def compute(self) -> Tensor:
        """The result of the function."""
        assert self._compute is not None  # otherwise there is an obstacle
        return self._compute()


def describe_mismatch(what: str, weight: Tensor, computed: Tensor) -> str | None:
    """How far a computed weight is from the one that was set; None if they agree within the precision of its dtype."""
    distance = torch.linalg.vector_norm(to_float64(computed - weight.to(computed)))
    # For a weight of zeros the quotient would be 0 / 0.
    relative = 0.0 if distance == 0 else float(distance / torch.linalg.vector_norm(to_float64(weight)))
    # The comparison is false for NaN, which counts as a mismatch.
    if relative <= max(1e-5, 4 * torch.finfo(computed.dtype).eps):
        return None
    amount = "less than 0.1%" if relative < 1e-3 else f"{relative:.1%}"
    return f"its {what} keeps a weight that differs by {amount} from the one it was given"


def is_random(weight: Tensor, again: Tensor) -> bool:
    """Whether a weight, computed again after other random numbers, differs by more than rounding."""
    spread: Tensor = torch.linalg.vector_norm(to_float64(weight - again))
    return bool(spread > MAX_SPREAD * torch.linalg.vector_norm(to_float64(weight)))


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in float32 on a device that has nothing wider."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
