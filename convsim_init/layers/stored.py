"""The weight that a module stores in its attribute ``weight``, behind parametrizations and hooks of PyTorch."""

from __future__ import annotations

from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from convsim_init.layers import tree
from convsim_init.layers.forward.isolation import draw_numbers, isolated, not_cached, random_states
from convsim_init.layers.forward.trial import leaves
from convsim_init.layers.memory import has_no_data
from convsim_init.layers.obstacle import Obstacle
from convsim_init.layers.weights import ComputedWeight, RefusedError, StoredWeight, Weight, describe_mismatch, is_random
from convsim_init.report.text import error_text

SPECTRAL_NORM = getattr(parametrizations, "_SpectralNorm", ())
ITERATIONS = 15  # of the power method, as in the constructor of torch's spectral_norm


class ParametrizedWeight(Weight):
    """A weight that `torch.nn.utils.parametrize` computes, and that is set through the parametrization."""

    def __init__(self, module: Any) -> None:
        originals = cast(nn.ModuleDict, module.parametrizations)["weight"]
        super().__init__(*originals.parameters(recurse=False))
        self._module = module
        self.shape, self._error = [], ""
        if not any(is_lazy(source) or has_no_data(source) for source in self.sources):
            try:
                # The gradient shows all parameters that it is made of, including those of other modules.
                with torch.enable_grad():
                    weight = self.compute()
                self.shape, self.made_of = list(weight.shape), self.made_of | leaves(weight)
            except Exception as error:  # of any kind, from the parametrization's own code
                self._error = error_text(error)

    def can_be_assigned(self) -> bool:
        """Whether it is set through the parametrization: it has an inverse, or no parameter to be set instead."""
        parts = list(self._module.parametrizations["weight"])
        single = len(self.sources) == 1 and self.shape == list(self.sources[0].shape)
        spectral = any(isinstance(part, SPECTRAL_NORM) for part in parts)  # has vectors that are to be set too
        return not single or spectral or (all(hasattr(p, "right_inverse") for p in parts) and self._has_inverse(parts))

    def _has_inverse(self, parts: list[Any]) -> bool:
        """Whether inverses change a weight: one that returns it, as masks have, says no more than none does."""
        try:
            with isolated(self._module), torch.no_grad():
                weight = self._module.weight
                return not torch.equal(reduce(lambda w, p: p.right_inverse(w), reversed(parts), weight.clone()), weight)
        except Exception:  # of any kind, from the parametrization's own code
            return True

    def obstacle(self, *, read_only: bool) -> Obstacle | None:
        """Why it cannot be read or written, such as an error of the parametrization; None if it can."""
        if self._error:
            return Obstacle(f"its parametrization ended with {self._error}")
        obstacle = super().obstacle(read_only=read_only)
        if obstacle is None and is_random(self.read(), self.compute(redraw=True).detach()):
            return Obstacle("the weight that its parametrization computes is random, in evaluation mode too")
        return obstacle

    def compute(self, *, redraw: bool = False) -> Tensor:
        """The weight in evaluation mode, in which spectral_norm keeps its buffers; `redraw` draws numbers first."""
        with isolated(self._module):
            if redraw:
                draw_numbers(self.sources[0].device)
            return cast(Tensor, self._module.weight.clone())

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Assign the weight, and compare it with the one that is computed afterwards."""
        before, memories = self.read(), [source.data for source in self.sources]
        try:
            # The inverse of `orthogonal` draws random numbers if the weight is not square.
            with random_states(self.sources):
                self._module.weight = weight.to(before.device, before.dtype)
        except Exception as error:  # of any kind, from the parametrization's own code
            reason = f"left as it was: its parametrization cannot be assigned to: {error_text(error)}"
            raise RefusedError(reason) from error
        # Assignment gives parameters new memory. The values are moved to the old memory, which others may refer to.
        for source, memory in zip(self.sources, memories, strict=True):
            if source.data.data_ptr() != memory.data_ptr() and source.shape == memory.shape:
                memory.copy_(source.data)
                source.data = memory
        parametrize._cache.pop((id(self._module), "weight"), None)  # the old weight
        with not_cached():
            self._update_norms()
        return describe_mismatch("parametrization", weight, self.read())

    def _update_norms(self) -> None:
        """Let spectral_norm estimate the norm of the new weight; a training pass would iterate only once."""
        parts = list(self._module.parametrizations["weight"])
        norms = [part for part in parts if isinstance(part, SPECTRAL_NORM)]
        if norms:
            modes = [(part, part.training) for part in parts]
            try:
                for part in parts:
                    # Other parametrizations, such as a dropout of weights, would draw random numbers in training.
                    part.training = part in norms
                for _ in range(ITERATIONS):
                    self._module.weight  # noqa: B018
            finally:
                for part, training in modes:
                    part.training = training

    def storage(self) -> dict[str, Tensor]:
        """All parameters and buffers of the parametrization, also those that its state dict leaves out."""
        parts: nn.ModuleDict = self._module.parametrizations
        return {**dict(parts.named_parameters()), **dict(parts.named_buffers())}


class HookedWeight(Weight):
    """A weight that an old hook of `torch.nn.utils` computes from its sources and sets on the module."""

    name = ""  # the function that registers the hook

    def __init__(self, module: Any, *sources: Tensor, hook: Any) -> None:
        super().__init__(*sources)
        self._module, self._hook = module, hook

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the sources of the hook and the weight that it has set on the module."""
        super().write(weight)
        self._update_others()
        self._module.weight.copy_(self.read())
        return describe_mismatch(self.name, weight, self.read())

    def _update_others(self) -> None:
        """Set the other tensors that the hook computes the weight from, once the first source is set."""

    def storage(self) -> dict[str, Tensor]:
        """The sources, the buffers of the hook and the weight that it has set on the module."""
        buffers = {name: buffer for name, buffer in tree.named_buffers(self._module) if name.startswith("weight_")}
        return super().storage() | buffers | {"weight": self._module.weight}


class NormedWeight(HookedWeight):
    """A weight of weight_norm: a direction times a length."""

    name = "weight_norm"

    def compute(self) -> Tensor:
        """What the hook computes."""
        return cast(Tensor, self._hook.compute_weight(self._module))

    def _update_others(self) -> None:
        direction, length = self.sources
        length.copy_(torch.norm_except_dim(direction, 2, self._hook.dim))


class SpectralNormedWeight(HookedWeight):
    """A parameter divided by its spectral norm."""

    name = "spectral_norm"

    def compute(self) -> Tensor:
        """The parameter divided by its norm, estimated after the vectors of a new hook have converged."""
        weight = self.sources[0]
        matrix = self._hook.reshape_weight_to_matrix(weight)
        with torch.no_grad():
            # Not by the hook's own iteration, which changes its vectors: reading should not.
            u = self._module.weight_u.clone()
            for _ in range(ITERATIONS):
                v = nn.functional.normalize(matrix.T @ u, dim=0, eps=self._hook.eps)
                u = nn.functional.normalize(matrix @ v, dim=0, eps=self._hook.eps)
        return cast(Tensor, weight / (u @ (matrix @ v)))

    def _update_others(self) -> None:
        for _ in range(ITERATIONS):
            self._hook.compute_weight(self._module, do_power_iteration=True)


class PrunedWeight(HookedWeight):
    """A parameter times a mask of zeros and ones."""

    name = "pruning"

    @property
    def mask(self) -> Tensor:
        """The entries that are not pruned."""
        return torch.ne(self._module.weight_mask, 0)

    def compute(self) -> Tensor:
        """What the hook computes."""
        return cast(Tensor, self._hook.apply_mask(self._module))


def stored_weight(module: Any) -> Weight:
    """The weight of a module; for a parametrization without an inverse the parameter that it is made of."""
    try:
        return _stored_weight(module)
    except Exception as error:  # of any kind, from attributes that the class computes
        return ComputedWeight(torch.empty(()), None, f"its weight cannot be read: {error_text(error)}")


def _stored_weight(module: Any) -> Weight:
    # Parametrizations are asked first: reading the attribute would compute the weight, and might draw random numbers.
    if parametrize.is_parametrized(module, "weight"):
        if not list(module.parametrizations["weight"].parameters(recurse=False)):
            return ComputedWeight(torch.empty(()), None, "parametrized without a parameter of its own")
        computed = ParametrizedWeight(module)
        return computed if computed.can_be_assigned() else StoredWeight(*computed.sources)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return ComputedWeight(torch.empty(()), None, "it has no weight: something else sets it in a forward pass")
    # If the class computes the attribute from the parameter of that name, they are not the same object.
    if module._parameters.get("weight") is weight:
        return StoredWeight(weight)
    compute = partial(getattr, module, "weight")
    for hook in module._forward_pre_hooks.values():
        # A hook may belong to another parameter of the module, such as its bias.
        if isinstance(hook, WeightNorm) and hook.name == "weight" and "weight_v" in module._parameters:
            return NormedWeight(module, module.weight_v, module.weight_g, hook=hook)
        if isinstance(hook, SpectralNorm) and hook.name == "weight" and "weight_orig" in module._parameters:
            return SpectralNormedWeight(module, module.weight_orig, hook=hook)
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            parameter, mask = getattr(module, "weight_orig", None), getattr(module, "weight_mask", None)
            if isinstance(parameter, Tensor) and isinstance(mask, Tensor) and bool(((mask == 0) | (mask == 1)).all()):
                return PrunedWeight(module, parameter, hook=hook)
            compute = partial(hook.apply_mask, module)  # torch does the same before a forward pass
    reason = "its weight is no parameter: a hook such as spectral_norm's or pruning computes it"
    if not module._forward_pre_hooks:
        reason = "its weight is no parameter: something else sets it, as FullyShardedDataParallel does"
    if "weight" in module._parameters or hasattr(type(module), "weight"):
        reason = "its weight is no parameter: its class computes it"
    if "weight" in module._buffers:
        reason = "its weight is a buffer, which is not trained"
    return ComputedWeight(getattr(module, "weight_orig", weight), compute, reason)


def unknown_hooks(module: nn.Module) -> list[Any]:
    """The hooks that are not PyTorch's, and may change the weight, before the forward pass."""
    known = (WeightNorm, SpectralNorm, BasePruningMethod)
    return [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, known)]
