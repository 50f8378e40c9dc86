"""The weight that a convolution's forward pass uses, however its module stores it: read and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from convsim_init.layers.forward.trial import draw_numbers, isolated, random_states
from convsim_init.layers.memory import has_no_data, is_sharded, overlaps_itself

KERNEL_RANKS = (3, 4, 5)  # of a weight: two more than its kernels
ITERATIONS = 15  # as torch's spectral_norm makes when it is put on
LARGEST_SPREAD = 0.01  # of a weight over random numbers, relative to its norm
TREATED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RefusedError(RuntimeError):
    """The storage of a weight refuses to be assigned to."""


class Weight:
    """A weight that is used as it stands.

    Args:
        sources: Tensors that it is stored in or computed from.
        trained: Whether it is a model's parameter, which may be frozen, and no state dict's tensor.

    Attributes:
        note: What its layer's report should say of it, once `obstacle` has looked.
    """

    def __init__(self, *sources: Tensor, trained: bool = True) -> None:
        self.sources = sources
        self._trained = trained
        self.note: str | None = None

    @property
    def mask(self) -> Tensor | None:
        """Where the weight that is used may differ from zero, of its shape; None for everywhere."""
        return None

    @property
    def shape(self) -> list[int]:
        """Shape of the weight; empty while a lazy module has none."""
        return [] if is_lazy(self.sources[0]) else list(self.sources[0].shape)

    def obstacle(self, *, read_only: bool) -> str | None:
        """Why it cannot be read or, unless it is only to be read, must not be written; None if it can."""
        if any(is_lazy(source) for source in self.sources):
            return "lazy, without a weight yet: run a forward pass first"
        if any(map(has_no_data, self.sources)):
            return "on the meta device, without data: move it with to_empty and initialize it first"
        if any(map(is_sharded, self.sources)):
            return "sharded over processes: initialize the model before it is sharded"
        if any(source.layout is not torch.strided for source in self.sources):
            return "a sparse tensor: make it dense first"
        if len(self.shape) not in KERNEL_RANKS:
            return f"its weight is of rank {len(self.shape)}, without kernels"
        if not read_only and any(map(overlaps_itself, self.sources)):
            return "its entries share memory, as after expand(): clone it first"
        if not read_only and any(s.is_inference() for s in self.storage()) and not torch.is_inference_mode_enabled():
            return "made under torch.inference_mode, and cannot be changed outside of it: make it outside"
        frozen = [source for source in self.sources if not source.requires_grad]
        if self._trained and not read_only and frozen:
            part = "" if len(frozen) == len(self.sources) else " of a part of its weight"
            return f"frozen: requires_grad{part} is False"
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
            How the weight that is then used differs from the one that was set; None if it does not.

        Raises:
            RefusedError: If it cannot be set; then nothing was changed.
        """
        self.sources[0].copy_(weight)
        return None

    def backup(self) -> Callable[[], None]:
        """What undoes a `write`, to the bit."""
        return backup_tensors(self.sources)

    def storage(self) -> list[Tensor]:
        """The tensors that a `write` may change."""
        return list(self.sources)


class ParametrizedWeight(Weight):
    """A weight that `torch.nn.utils.parametrize` computes; it is assigned through the parametrization."""

    def __init__(self, module: Any) -> None:
        originals = cast(nn.ModuleDict, module.parametrizations)["weight"]
        super().__init__(*originals.parameters(recurse=False))
        self._module = module
        self._shape: list[int] = []
        self._error = ""
        if self.sources and not any(is_lazy(source) or has_no_data(source) for source in self.sources):
            try:
                self._shape = list(self.read().shape)
            except Exception as error:  # whatever the parametrization's own code raises
                self._error = " ".join(f"{type(error).__name__}: {error}".split())

    @property
    def shape(self) -> list[int]:
        """Shape of the weight; empty where it cannot be computed, as while a lazy module has none."""
        return self._shape

    def obstacle(self, *, read_only: bool) -> str | None:
        """As of a plain weight; also what its own code raised."""
        if not self.sources:
            return "parametrized without a parameter of its own"
        if self._error:
            return f"its parametrization ended with {self._error}"
        obstacle = super().obstacle(read_only=read_only)
        if obstacle is None and is_random(self.read(), self.compute(redraw=True).detach()):
            return "the weight that its parametrization computes is random, in evaluation mode too"
        return obstacle

    def compute(self, *, redraw: bool = False) -> Tensor:
        """The weight that is computed, in evaluation mode: spectral_norm's would change its buffers in training."""
        with isolated(self._module):
            if redraw:
                draw_numbers(self.sources[0].device)
            weight: Tensor = self._module.weight.clone()
        return weight

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Assign the weight and look at what is computed then."""
        before, memories = self.read(), [source.data for source in self.sources]
        try:
            with random_states(self.sources):
                self._module.weight = weight.to(before.device, before.dtype)
        except Exception as error:  # whatever the parametrization's own code raises
            raise RefusedError(f"left as it was: its parametrization cannot be assigned to: {error}") from error
        for source, memory in zip(self.sources, memories, strict=True):  # torch lets them point to new memory
            if source.data.data_ptr() != memory.data_ptr() and source.shape == memory.shape:
                memory.copy_(source.data)
                source.data = memory
        self._follow()
        return describe_mismatch("parametrization", weight, self.read())

    def _follow(self) -> None:
        """Let spectral_norm estimate the norm of the weight that is there now; a training pass iterates once alone."""
        parts = list(self._module.parametrizations["weight"])
        norms = [part for part in parts if isinstance(part, getattr(parametrizations, "_SpectralNorm", ()))]
        if norms:
            modes = [(part, part.training) for part in parts]
            try:
                for part in parts:
                    part.training = part in norms
                for _ in range(ITERATIONS):
                    self._module.weight  # noqa: B018
            finally:
                for part, training in modes:
                    part.training = training

    def backup(self) -> Callable[[], None]:
        """What gives the parametrization back its parameters and buffers, which it may have made anew."""
        parts: nn.ModuleDict = self._module.parametrizations
        state = {key: value.clone() for key, value in parts.state_dict().items()}

        def restore() -> None:
            parts.load_state_dict(state)

        return restore

    def storage(self) -> list[Tensor]:
        """The parametrization's parameters and buffers."""
        return list(self._module.parametrizations.state_dict().values())


class NormedWeight(Weight):
    """A weight that the hook of the old `torch.nn.utils.weight_norm` computes: a direction times a length."""

    def __init__(self, module: Any, hook: WeightNorm) -> None:
        super().__init__(module.weight_v, module.weight_g)
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
        return describe_mismatch("weight_norm", weight, computed)

    def backup(self) -> Callable[[], None]:
        """What gives back direction, length and what the hook left on the module."""
        return backup_tensors(self.storage())

    def storage(self) -> list[Tensor]:
        """Direction, length and what the hook left on the module."""
        return [*self.sources, self._module.weight]


class SpectralNormedWeight(Weight):
    """A weight that the hook of the old `torch.nn.utils.spectral_norm` computes: a parameter over its spectral norm."""

    def __init__(self, module: Any, hook: SpectralNorm) -> None:
        super().__init__(module.weight_orig)
        self._module, self._hook = module, hook

    def compute(self) -> Tensor:
        """The parameter over its norm, as it is estimated once the vectors of a fresh hook have converged."""
        weight: Tensor = self._module.weight_orig
        matrix = self._hook.reshape_weight_to_matrix(weight)
        with torch.no_grad():
            u = self._module.weight_u.clone()
            for _ in range(ITERATIONS):
                v = nn.functional.normalize(matrix.T @ u, dim=0, eps=self._hook.eps)
                u = nn.functional.normalize(matrix @ v, dim=0, eps=self._hook.eps)
        normed: Tensor = weight / (u @ (matrix @ v))
        return normed

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the parameter, let the hook estimate its norm, and set what the hook left on the module."""
        self.sources[0].copy_(weight)
        for _ in range(ITERATIONS):
            self._hook.compute_weight(self._module, do_power_iteration=True)
        self._module.weight.copy_(self.read())
        return describe_mismatch("spectral_norm", weight, self.read())

    def backup(self) -> Callable[[], None]:
        """What gives back the parameter, the hook's vectors and what the hook left on the module."""
        return backup_tensors(self.storage())

    def storage(self) -> list[Tensor]:
        """The parameter, the hook's vectors and what the hook left on the module."""
        return [*self.sources, self._module.weight_u, self._module.weight_v, self._module.weight]


class PrunedWeight(Weight):
    """A weight that a hook of `torch.nn.utils.prune` computes: a parameter times a mask of zeros and ones."""

    def __init__(self, module: Any, parameter: Tensor, mask: Tensor) -> None:
        super().__init__(parameter)
        self._module, self._mask = module, mask

    @property
    def mask(self) -> Tensor:
        """Where the parameter is not pruned."""
        return self._mask != 0

    def compute(self) -> Tensor:
        """What the hook computes."""
        return self.sources[0] * self._mask

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the parameter where it is not pruned, and what the hook left on the module."""
        parameter = self.sources[0]
        parameter.copy_(torch.where(self.mask, weight.to(parameter), parameter))
        self._module.weight.copy_(self.read())
        return describe_mismatch("pruning", weight, self.read())

    def backup(self) -> Callable[[], None]:
        """What gives back the parameter and what the hook left on the module."""
        return backup_tensors(self.storage())

    def storage(self) -> list[Tensor]:
        """The parameter and what the hook left on the module."""
        return [*self.sources, self._module.weight]


class ComputedWeight(Weight):
    """A weight that can be read but not set.

    Args:
        source: Tensor of its shape that it is computed from.
        compute: Function that computes it; None where it cannot be read either.
        reason: Why it cannot be set.
    """

    def __init__(self, source: Tensor, compute: Callable[[], Tensor] | None, reason: str) -> None:
        super().__init__(source)
        self._compute, self._reason = compute, reason

    def obstacle(self, *, read_only: bool) -> str | None:
        """Why it is left alone."""
        if self._compute is None or not read_only:
            return self._reason
        return super().obstacle(read_only=True)

    def compute(self) -> Tensor:
        """What the function computes."""
        assert self._compute is not None  # there is an obstacle otherwise
        return self._compute()


def stored_weight(module: Any) -> Weight:
    """The weight that a module's attribute ``weight`` stands for."""
    if parametrize.is_parametrized(module, "weight"):
        return ParametrizedWeight(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return ComputedWeight(torch.empty(()), None, "it has no weight: something else sets it in a forward pass")
    if module._parameters.get("weight") is weight:
        return Weight(weight)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight" and "weight_v" in module._parameters:
            return NormedWeight(module, hook)
        if isinstance(hook, SpectralNorm) and hook.name == "weight" and hasattr(module, "weight_v"):
            return SpectralNormedWeight(module, hook)
        if _prunes(hook):
            parameter, mask = getattr(module, "weight_orig", None), getattr(module, "weight_mask", None)
            if isinstance(parameter, Tensor) and isinstance(mask, Tensor) and bool(((mask == 0) | (mask == 1)).all()):
                return PrunedWeight(module, parameter, mask)
    compute = _hooked(module) or (lambda: module.weight)
    reason = "its weight is no parameter: a hook such as spectral_norm's or pruning computes it"
    if "weight" in module._parameters:
        reason = "its weight is no parameter: its class computes it"
    if "weight" in module._buffers:
        reason = "its weight is a buffer, which is not trained"
    return ComputedWeight(getattr(module, "weight_orig", weight), compute, reason)


def _hooked(module: Any) -> Callable[[], Tensor] | None:
    """What computes the weight as a hook of torch would before a forward pass, without changing the module."""
    for hook in module._forward_pre_hooks.values():
        if _prunes(hook):
            return partial(hook.apply_mask, module)
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return partial(hook.compute_weight, module, do_power_iteration=False)
    return None


def has_unknown_hook(module: nn.Module) -> bool:
    """Whether a hook of somebody's own, which may change the weight, runs before its forward pass."""
    known = (WeightNorm, SpectralNorm, BasePruningMethod)
    return any(not isinstance(hook, known) for hook in module._forward_pre_hooks.values())


def _prunes(hook: object) -> TypeGuard[BasePruningMethod]:
    return isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight"


def backup_tensors(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """What gives tensors back the values that they have now."""
    values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    return restore


def describe_mismatch(what: str, weight: Tensor, computed: Tensor) -> str | None:
    """How far a computed weight is from the one that was to be set; None if they agree in its dtype."""
    distance = torch.linalg.vector_norm(to_float64(computed - weight.to(computed)))
    relative = 0.0 if distance == 0 else float(distance / torch.linalg.vector_norm(to_float64(weight)))
    if relative <= max(1e-5, 4 * torch.finfo(computed.dtype).eps):
        return None
    return f"its {what} keeps a weight that differs by {relative:.1%} from the one it was given"


def is_random(weight: Tensor, again: Tensor) -> bool:
    """Whether a weight that was computed from other random numbers is another one than by rounding."""
    spread: Tensor = torch.linalg.vector_norm(to_float64(weight - again))
    return bool(spread > LARGEST_SPREAD * torch.linalg.vector_norm(to_float64(weight)))


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in the widest floating dtype of its device."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
