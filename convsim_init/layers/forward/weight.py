"""Convolutions whose forward pass, or a hook before it, uses another weight than their parameter.

Weight standardization (arXiv 1903.10520) and its scaled form (arXiv 2101.08692) do so: the network uses filters of zero
mean and fixed norm, ``used = slope * (weight - mean(weight))``. Other classes scale their filters, or multiply them by
a mask. No class is recognized by its name: trial passes show which weight is given to the convolution.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from convsim_init.layers.forward.isolation import draw_numbers, isolated
from convsim_init.layers.forward.multiples import is_multiple, norms_of, probes_like, ratios, slopes_of
from convsim_init.layers.forward.trial_weight import TrialWeight
from convsim_init.layers.memory import gradient_hooks
from convsim_init.layers.obstacle import Obstacle
from convsim_init.layers.weights import StoredWeight, describe_mismatch, is_random, to_float64
from convsim_init.report.text import error_text


class ForwardWeight(TrialWeight):
    """The weight that a forward pass uses, where the module's code makes it of the stored one.

    `obstacle` has to be called first. By trial passes with several weights and inputs it fits this model, with a slope
    for each filter, where the mean is that of each filter and only subtracted if the class centres filters::

        used = slopes * variable, variable = stored * mask - mean

    `write` inverts the model. If it does not fit, `write` stores the new weight, that minus ``used - stored`` or, where
    that is exact, that with its entries moved, and reports how far the weight that is then used differs from it.
    """

    _known = True  # whether the model above fits
    _mask: Tensor | None = None
    _centred = False

    @property
    def mask(self) -> Tensor | None:
        """Where the weight that is used may differ from zero; None for everywhere, and before `obstacle` is called."""
        return self._mask

    @torch.no_grad()
    def obstacle(self, *, read_only: bool) -> Obstacle | None:
        """Why the stored weight cannot be treated, or why it is unclear which weight is used; None if all is well."""
        obstacle = self._stored.obstacle(read_only=read_only) or self._find_model()
        if obstacle is not None:
            self.note = None
        return obstacle

    def _find_model(self) -> Obstacle | None:
        """Find the mask and whether filters are centred; the reason if it remains unclear which weight is used."""
        kind = type(self.module).__name__
        try:
            used, stored = self.read(), self._stored.read()
            mask = self._find_mask(stored)
            other = self._at_another_input()
            random = is_random(used, self.compute(partial(draw_numbers, stored.device)))
        except Exception as error:  # whatever the class's own code raises
            return Obstacle(f"which weight {kind} uses is not known: a trial pass ended with {error_text(error)}")
        assert self.call is not None
        if other.groups != self.call.groups:
            return Obstacle(f"the groups that {kind} convolves with depend on its input")
        if not used.isfinite().all() and stored.isfinite().all():
            what = f"the weight that {kind} makes of its finite parameter, at an input of zeros,"
            return Obstacle(f"{what} holds infinities or NaN: look for a division by zero in its code")
        # Up to rounding, which may differ with the input.
        if describe_mismatch("class", used, other.weight) and not used.isnan().any():
            return Obstacle(f"the weight that {kind} uses depends on its input")
        if random:
            return Obstacle(f"the weight that {kind} uses is random, in evaluation mode too")
        if not used.any() and stored.any():
            return Obstacle(f"all weights are zero that {kind} makes of its parameter: its gain is zero")
        self._mask = mask
        # Stored filters of zero mean fit both, and count as not centred by the class.
        for self._centred in (False, True):
            if is_multiple(used, self._variable(stored)):
                return None
        self._mask, self._centred, self._known = self._stored.mask, False, False
        return None

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the stored weight so that the class computes this one, centred if the class centres filters."""
        used, stored = self.read(), self._stored.read()
        if not self._known or torch.equal(used, stored):
            return self._write_nearest(weight, used, stored)
        variable, target = self._variable(stored), self._variable(weight)
        slopes = slopes_of(used, variable)  # [M, 1, ...]
        # The mask and the centring lower the norm of a filter, which is to be that of the given one.
        target *= ratios(norms_of(weight), norms_of(target))
        # Entries that the mask hides are no part of the variable, and keep their values to the bit.
        changed = to_float64(stored) - variable + ratios(target, slopes)
        self._stored.write(torch.where(slopes == 0, stored, changed).to(weight))
        return describe_mismatch("class", target, self.read())

    def _write_nearest(self, weight: Tensor, used: Tensor, stored: Tensor) -> str | None:
        """Store what gives this weight or, if none does, what comes nearest: it, or it minus what the class adds."""
        # A clone, because the weight that was read may share the memory that is written to.
        change, candidates, stored = to_float64(weight) - to_float64(used), [weight], stored.clone()
        if not torch.equal(used, stored):
            candidates.append((to_float64(stored) + change).to(stored))

        def distance(candidate: Tensor) -> float:
            self._stored.write(candidate)
            return float(torch.linalg.vector_norm(to_float64(self.read()) - to_float64(weight)))

        def mismatch(candidate: Tensor) -> str | None:
            self._stored.write(candidate)
            return describe_mismatch("class", weight, self.read())

        # For NaN `min` returns the first of them. Each write lets a spectral norm's vectors converge further.
        nearest = min(candidates, key=distance) if candidates[1:] else weight
        difference = mismatch(nearest)
        if difference is not None and isinstance(self._stored, StoredWeight):
            if any(mismatch(moved) is None for moved in self._moved_back(stored, change)):
                return None
            self._stored.write(nearest)
        return difference

    def _moved_back(self, stored: Tensor, change: Tensor) -> list[Tensor]:
        """The stored weight that changes the used one by this, if a class moves entries, as by a flip, and scales all.

        Such a class computes ``used = c P stored`` with a permutation P, whose inverse is its transpose. By derivatives
        ``back = c P' change``, so that the stored weight changes by ``back / c²``, where c is the ratio of the norms.
        """
        source = self.sources[0]
        try:
            # Code that computes derivatives, and hooks on gradients, may change the module, too.
            with isolated(self.module), torch.enable_grad():
                for hooks in gradient_hooks(source):
                    hooks.clear()
                used = self.compute()
                (back,) = torch.autograd.grad(used, source, change.to(used))
            return [(to_float64(stored) + to_float64(back) * (change.norm() / back.norm()).square()).to(stored)]
        except (Exception, SystemExit):  # of any kind, from a class that is not differentiable
            return []

    def storage(self) -> dict[str, Tensor]:
        """The tensors that the stored weight is stored in."""
        return self._stored.storage()

    def _find_mask(self, stored: Tensor) -> Tensor | None:
        """Where the class sets any weight to zero, as it does to one without zeros; None if nowhere."""
        if self._stored.mask is not None or not isinstance(self._stored, StoredWeight):
            return self._stored.mask
        _, probe = probes_like(stored)
        used, opposite = self._used_for(probe), self._used_for(-probe)
        mask = used != 0
        if mask.all() or not torch.equal(opposite != 0, mask):  # then the zeros depend on the weight, as by a ReLU
            return None
        return mask if is_multiple(used, to_float64(probe * mask)) else None

    def _variable(self, weight: Tensor) -> Tensor:
        """The part of a weight ``[M, ...]`` that the class uses: masked, and centred if it centres filters."""
        weight = to_float64(weight) * (1 if self._mask is None else self._mask)
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True) if self._centred else weight
