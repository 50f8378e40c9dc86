"""The loop that lowers Convolutional Similarity: conjugate gradients on the product of spheres; and Adam.

A filter bank is ``[G, M, C, *kernel_size]``: G groups of M filters with C input channels each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from convsim_init.functional.bank import all_finite, count_pairs, filter_norms, nonzero, per_filter
from convsim_init.functional.similarity import bank_similarity
from convsim_init.optim.conjugate_gradient import ConjugateGradient
from convsim_init.parallel.threads import Team
from convsim_init.settings import Settings

BACKTRACKS = 5  # step lengths tried along one direction, each a quarter of the one before
IDLE_STEPS = 2  # so many steps in a row that gain too little end a descent
PLATEAU_SHARE, PLATEAU_LOSSES = 0.95, 20  # a plateau ends at this share of the first loss, or after so many losses
NOTHING_LEFT = 1e-20  # a descent ends at this share of the first loss


class Stop(Enum):
    """Why a descent ended."""

    STEPS = "took all its steps"
    CONVERGED = "steps gained too little"
    NON_FINITE = "the loss or the weights became infinite or not a number"


@dataclass(frozen=True)
class Descent:
    """How a descent went.

    Attributes:
        bank: The weights with the lowest loss seen, of the shape and dtype given; those given if ``NON_FINITE``.
        losses: The loss at the start and after each step: of conjugate gradients with norms preserved the mean over
            pairs of the similarity of the unit filters, else the raw similarity.
        stop: Why it ended.
    """

    bank: Tensor
    losses: list[float]
    stop: Stop

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.losses) - 1


def descend(
    bank: Tensor,
    settings: Settings,
    *,
    mask: Tensor | None = None,
    team: Team | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Descent:
    """Lower the Convolutional Similarity of a filter bank ``[G, M, C, *kernel_size]``, float32 or float64, in a copy.

    Where a mask of its shape is zero, it is zero and stays so. The team works on the blocks of a large layer, on the
    CPU. ``on_step`` is called before each step; what it raises ends the descent.
    """
    if settings.optimizer == "adam":
        descent = _adam(bank, settings, mask, on_step)
    else:
        descent = _conjugate_gradient(bank, settings, mask, team or Team(1), on_step)
    if all(map(math.isfinite, descent.losses)) and all_finite(descent.bank):
        return descent
    return Descent(bank, descent.losses, Stop.NON_FINITE)


class StoppingRule:
    """The losses so far, and when to stop."""

    def __init__(self, settings: Settings) -> None:
        self.losses: list[float] = []  # at the start and after each step
        self._settings = settings
        self._idle = 0

    def update(self, loss: float) -> Stop | None:
        """Note the loss that was reached; None if the descent should go on."""
        self.losses.append(loss)
        if not math.isfinite(loss):
            return Stop.NON_FINITE
        start = self.losses[0]
        gain = self.losses[-2] - loss if len(self.losses) > 1 else math.inf
        # Wide layers start on a plateau: some steps gain nearly nothing, and the steps after them much.
        on_plateau = loss > PLATEAU_SHARE * start and len(self.losses) <= PLATEAU_LOSSES
        idle = gain < self._settings.tolerance * start and not on_plateau
        self._idle = self._idle + 1 if idle else 0
        # Not `<`: where the loss is 0 from the start, there is nothing to lower.
        if self._idle == IDLE_STEPS or loss <= NOTHING_LEFT * start:
            return Stop.CONVERGED
        return Stop.STEPS if len(self.losses) > self._settings.steps else None


@torch.no_grad()
def _conjugate_gradient(
    bank: Tensor, settings: Settings, mask: Tensor | None, team: Team, on_step: Callable[[], None]
) -> Descent:
    """Conjugate gradients. Each step lowers the loss, so the last weights are the best."""
    norms = filter_norms(bank)  # [G, M]
    preserve = settings.norm == "preserve"
    # Free norms may differ from filter to filter: one unit for all keeps their ratios.
    scale = norms if preserve else norms.square().mean().sqrt().expand_as(norms)  # [G, M]
    if preserve:
        unit = 1 / int(count_pairs(norms > 0, settings.pairs).clamp(min=1))
    else:
        size = float(scale.max())
        unit = (size * size) * (size * size)  # not size**4, which would raise where this is infinite

    filters = ConjugateGradient(bank, nonzero(scale), settings, team, mask)
    rule = StoppingRule(settings)
    loss, restart = filters.retract(0.0), False
    while (stop := rule.update(loss)) is None:
        on_step()
        loss, restart = _take_step(filters, rule.losses[-1], restart)
        # Not `>=`, which is false of NaN. The loss is not noted, for no step was taken.
        if not loss < rule.losses[-1]:
            stop = Stop.CONVERGED
            break

    moved = filters.into_bank()
    if mask is not None:  # up to rounding it is zero there already
        moved *= mask
    if preserve:  # also undoes the rounding of many steps
        scale = scale / nonzero(filter_norms(moved))
    return Descent(moved.mul_(per_filter(scale, moved)), [unit * loss for loss in rule.losses], stop)


def _take_step(filters: ConjugateGradient, reached: float, restart: bool) -> tuple[float, bool]:
    """Move to the lowest loss along the next direction, by backtracking where the line search went too far.

    Returns:
        The loss there, or ``reached`` if no step lowers it; and whether the next direction has to restart.
    """
    # Where the conjugate direction fails, steepest descent from the same place. Even where that was what failed:
    # `retract` has taken the gradient anew, with the shift of this place, so that less of it is rounding.
    for steepest in (restart, True):
        step = filters.next_direction(restart=steepest)
        if not step:
            break
        for tries in range(BACKTRACKS):
            loss = filters.retract(step)
            if loss < reached:
                # A second try may write over g_prev in the blocks: <g, g_prev> and beta are lost.
                return loss, tries > 0
            step /= 4
        # Not only for the weights: `next_direction` takes the gradient that was evaluated last.
        filters.retract(0.0)
    return reached, True


class OwnAdam(torch.optim.Adam):
    """The Adam of a descent, which `initializing`, that waits for the optimizer of a training, passes over."""


def _adam(bank: Tensor, settings: Settings, mask: Tensor | None, on_step: Callable[[], None]) -> Descent:
    """What a plain loop with `torch.optim.Adam` does; where norms are preserved, each step ends by restoring them."""
    norms = filter_norms(bank)
    rule = StoppingRule(settings)
    # A tensor that is made in the caller's inference mode could not get a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        weight = bank.clone().requires_grad_()
        adam = OwnAdam([weight], lr=settings.learning_rate)
        loss = bank_similarity(weight, settings.pairs, settings.compared_channels)
        # Adam's loss may rise again, which that of conjugate gradients never does.
        best, lowest = bank, loss.item()
        while (stop := rule.update(loss.item())) is None:
            on_step()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if mask is not None and weight.grad is not None:
                # Adam's moments of what is always zero are zero: these taps do not move.
                weight.grad *= mask
            adam.step()
            if settings.norm == "preserve":
                with torch.no_grad():
                    weight *= per_filter(norms / nonzero(filter_norms(weight)), weight)
            loss = bank_similarity(weight, settings.pairs, settings.compared_channels)
            if loss.item() < lowest:
                best, lowest = weight.detach().clone(), loss.item()
    return Descent(best, rule.losses, stop)
