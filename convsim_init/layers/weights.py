"""The weight that a convolution's forward pass uses, however its module holds it: read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

TREATED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RefusedError(RuntimeError):
    """What holds a weight refuses to be assigned to."""


class Weight:
    """A weight that is used as it stands.

    Attributes:
        sources: The tensors it is held in or computed from.
        trained: Whether it is the parameter of a model, which may be frozen.
    """

    trained = True

    def __init__(self, *sources: Tensor) -> None:
        self.sources = sources

    @property
    def shape(self) -> list[int]:
        """Its shape; empty while a lazy module has none."""
        return [] if is_lazy(self.sources[0]) else list(self.sources[0].shape)

    def obstacle(self, *, frozen: bool) -> str | None:
        """Why it cannot be read or, unless frozen ones will do, must not be written; None if it can."""
        if any(is_lazy(source) for source in self.sources):
            return "lazy, without a weight yet: run a forward pass first"
        if any(source.is_meta for source in self.sources):
            return "on the meta device, without data: move it with to_empty and initialize it first"
        if self.trained and not frozen and not any(source.requires_grad for source in self.sources):
            return "frozen: requires_grad is False"
        if any(source.dtype not in TREATED_DTYPES for source in self.sources):
            return f"its dtype {self.sources[0].dtype} is not treated"
        return "its weight is empty" if 0 in self.shape else None

    def compute(self) -> Tensor:
        """The weight that is used, differentiable by the sources."""
        return self.sources[0]

    def read(self) -> Tensor:
        """The weight that is used, detached; it may share memory with the sources."""
        with torch.no_grad():
            return self.compute().detach()

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the weight that is used.

        Returns:
            What differs, if another one is then used.

        Raises:
            RefusedError: If it cannot be set; then nothing was changed.
        """
        self.sources[0].copy_(weight)
        return None

    def keep(self) -> Callable[[], None]:
        """What undoes a `write` that came to another weight; here it never does."""
        return lambda: None

    def held(self) -> list[Tensor]:
        """The tensors that a `write` may change, where they lie."""
        return list(self.sources)


class EntryWeight(Weight):
    """A tensor of a state dict."""

    trained = False


class ParametrizedWeight(Weight):
    """A weight that `torch.nn.utils.parametrize` computes; it is assigned through the parametrization."""

    def __init__(self, module: _ConvNd) -> None:
        super().__init__(*module.parametrizations["weight"].parameters(recurse=False))  # type: ignore[index, union-attr]
        self._module = module

    @property
    def shape(self) -> list[int]:
        """Its shape; empty while a lazy module has none."""
        return [] if any(is_lazy(source) for source in self.sources) else list(self.read().shape)

    def compute(self) -> Tensor:
        """The weight that is computed, in evaluation mode: spectral_norm's would change its buffers in training."""
        with evaluating(self._module.parametrizations):  # type: ignore[arg-type]
            return self._module.weight

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Assign the weight and look at what is computed then."""
        before = self.read()
        try:
            self._module.weight = weight.to(before.device, before.dtype)
        except Exception as error:  # whatever the parametrization's own code raises
            raise RefusedError(f"left as it was: its parametrization cannot be assigned to: {error}") from error
        return difference("parametrization", weight, self._module.weight)

    def keep(self) -> Callable[[], None]:
        """What gives the parametrization back its parameters and buffers, which it may have made anew."""
        parametrizations: nn.ModuleDict = self._module.parametrizations  # type: ignore[assignment]
        state = {key: value.clone() for key, value in parametrizations.state_dict().items()}

        def put_back() -> None:
            parametrizations.load_state_dict(state)

        return put_back

    def held(self) -> list[Tensor]:
        """The parametrization's parameters and buffers."""
        return list(self._module.parametrizations.state_dict().values())  # type: ignore[union-attr]


class NormedWeight(Weight):
    """A weight that the hook of the old `torch.nn.utils.weight_norm` computes: a direction times a length."""

    def __init__(self, module: _ConvNd, hook: WeightNorm) -> None:
        super().__init__(module.weight_v, module.weight_g)  # type: ignore[arg-type]
        self._module, self._hook = module, hook

    def compute(self) -> Tensor:
        """What the hook computes."""
        weight: Tensor = self._hook.compute_weight(self._module)
        return weight

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the direction and its length, and what the hook left on the module."""
        direction, length = self.sources
        direction.copy_(weight)
        length.copy_(torch.norm_except_dim(direction, 2, self._hook.dim))
        computed = self.read()
        self._module.weight.copy_(computed)
        return difference("weight_norm", weight, computed)

    def keep(self) -> Callable[[], None]:
        """What gives back direction, length and what the hook left on the module."""
        return keep_tensors(self.held())

    def held(self) -> list[Tensor]:
        """Direction, length and what the hook left on the module."""
        return [*self.sources, self._module.weight]


class ComputedWeight(Weight):
    """A weight that something unknown computes."""

    def obstacle(self, *, frozen: bool) -> str | None:
        """Why it is left alone."""
        return "its weight is no parameter: a hook such as spectral_norm's or pruning computes it"


def held_weight(module: _ConvNd) -> Weight:
    """The weight that a convolution's attribute ``weight`` holds."""
    if parametrize.is_parametrized(module, "weight"):
        return ParametrizedWeight(module)
    if "weight" in module._parameters:
        return Weight(module.weight)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return NormedWeight(module, hook)
    return ComputedWeight(module.weight)


def keep_tensors(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """What gives tensors back the values that they have now."""
    values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    return put_back


def difference(what: str, weight: Tensor, computed: Tensor) -> str | None:
    """Words for how far a computed weight is from the one that was wanted; None if they agree in its dtype."""
    distance = torch.linalg.vector_norm(wide(computed - weight.to(computed)))
    relative = float(distance / torch.linalg.vector_norm(wide(weight))) if distance > 0 else 0.0
    if relative <= max(1e-5, 4 * torch.finfo(computed.dtype).eps):
        return None
    return f"its {what} keeps a weight that differs by {relative:.1%} from the one it was given"


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the widest floating dtype of its device."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context in which a module and its parts are in evaluation mode."""
    training: Sequence[nn.Module] = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
