"""Convolutions whose forward pass, or a hook before it, uses another weight than their parameter.

Weight standardization (arXiv 1903.10520) and its scaled form (arXiv 2101.08692) do: what the network uses are filters
of zero mean and fixed norm, ``used = slope * (weight - mean(weight))``. Other classes scale their filters, or multiply
them by a mask. No class is known here by its name: a trial pass shows which weight is given to the convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convsim_init.layers.trial import weight_given_to_convolution
from convsim_init.layers.weights import Weight, backup_tensors, describe_mismatch, to_float64

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
METHODS = ("forward", "_conv_forward")


def has_forward_of_its_own(module: _ConvNd) -> bool:
    """Whether its class, or the module itself, may use another weight than PyTorch's convolutions do."""
    base = next((kind for kind in PLAIN if isinstance(module, kind)), None)
    return base is None or any(
        name in vars(module) or getattr(type(module), name, None) is not getattr(base, name, None) for name in METHODS
    )


class ForwardWeight(Weight):
    """The weight that a forward pass uses: the stored one, masked, or with its filters centred or scaled.

    Where it is none of these, the stored weight is set to the one wanted, and how far the weight
    that is then used is from it is reported.

    Args:
        module: The convolution.
        stored: The weight that its attribute holds.
    """

    def __init__(self, module: _ConvNd, stored: Weight) -> None:
        super().__init__(*stored.sources)
        self._module, self._stored = module, stored
        self._mask = stored.mask
        self._centred, self._known = False, True

    @property
    def shape(self) -> list[int]:
        """Shape of the stored weight."""
        return self._stored.shape

    @property
    def mask(self) -> Tensor | None:
        """Where the weight that is used may differ from zero, once `obstacle` has looked; None for everywhere."""
        return self._mask

    def obstacle(self, *, read_only: bool) -> str | None:
        """Why the stored weight cannot be had, or the one that is used cannot be seen."""
        obstacle = self._stored.obstacle(read_only=read_only)
        if obstacle is not None:
            return obstacle
        kind = type(self._module).__name__
        try:
            used, stored = self.read(), self._stored.read()
            mask = self._find_mask(stored)
            depends = not torch.equal(used, weight_given_to_convolution(self._module, self.shape, stored, noise=True))
        except Exception as error:  # whatever the class's own code raises
            text = " ".join(str(error).split())
            return f"which weight {kind} uses is not known: a trial pass ended with {type(error).__name__}: {text}"
        if depends and not used.isnan().any():
            return f"the weight that {kind} uses depends on its input"
        if not used.any() and stored.any():
            return f"all weights are zero that {kind} makes of its parameter: its gain is zero"
        if mask is not None and torch.equal(used, stored * mask):
            self._mask = mask
            return None
        for self._centred in (False, True):
            if describe_mismatch("class", self._slopes(used, stored) * self._variable(stored), used) is None:
                return None
        self._centred = self._known = False
        return None

    def compute(self) -> Tensor:
        """The weight that a forward pass gives to the convolution."""
        return weight_given_to_convolution(self._module, self.shape, self._stored.read())

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Choose the stored weight so that its class computes this one, centred if the class centres filters."""
        used, stored = self.read(), self._stored.read()
        if self._mask is not None:  # what the mask hides stays as it is
            self._stored.write(torch.where(self._mask, weight.to(stored), stored))
            return describe_mismatch("class", weight * self._mask, self.read())
        if not self._known or torch.equal(used, stored):
            self._stored.write(weight)
            return describe_mismatch("class", weight, self.read())
        slopes = self._slopes(used, stored)  # [M, 1, ...]
        target = self._variable(weight)
        target *= _ratios(_norms(weight), _norms(target))
        changed = to_float64(stored) - self._variable(stored) + target / torch.where(slopes == 0, 1, slopes)
        self._stored.write(torch.where(slopes == 0, stored, changed).to(weight))
        return describe_mismatch("class", target, self.read())

    def backup(self) -> Callable[[], None]:
        """What gives back the tensors that the stored weight is stored in."""
        restore, undo = backup_tensors(self.sources), self._stored.backup()

        def undo_both() -> None:
            restore()
            undo()

        return undo_both

    def storage(self) -> list[Tensor]:
        """The tensors that the stored weight is stored in."""
        return self._stored.storage()

    def _find_mask(self, stored: Tensor) -> Tensor | None:
        """Where zeros are imposed on any weight, by what becomes of one without zeros; None if nowhere."""
        if self._stored.mask is not None or type(self._stored) is not Weight:
            return self._stored.mask
        probe = 1 + torch.rand(stored.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        probe = probe.to(stored)
        used = weight_given_to_convolution(self._module, self.shape, stored, probe=probe)
        mask = used != 0
        return mask if not mask.all() and torch.equal(used, probe * mask) else None

    def _variable(self, weight: Tensor) -> Tensor:
        """What of a weight ``[M, ...]`` its class makes use of, in the widest dtype."""
        weight = to_float64(weight)
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True) if self._centred else weight.clone()

    def _slopes(self, used: Tensor, stored: Tensor) -> Tensor:
        """For each filter the factor from the stored weight to the one that is used, ``[M, 1, ...]``."""
        variable = self._variable(stored)
        axes = tuple(range(1, used.dim()))
        return _ratios((to_float64(used) * variable).sum(axes, keepdim=True), variable.square().sum(axes, keepdim=True))


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(to_float64(weight), dim=tuple(range(1, weight.dim())), keepdim=True)
    return norms


def _ratios(above: Tensor, below: Tensor) -> Tensor:
    return above / torch.where(below == 0, 1, below)
