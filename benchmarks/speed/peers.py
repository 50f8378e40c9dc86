"""What one writes without convsim-init: three similarities by torch's own operators, lowered by autograd and Adam."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

RATE = 0.002  # of the published recipe
TARGET = 0.1

Similarity = Callable[[Tensor], Tensor]


def adjacent_similarity(weight: Tensor) -> Tensor:
    """Raw Convolutional Similarity of adjacent filters, the plain port of the published recipe (arXiv 2411.03226).

    Args:
        weight: ``[M, C, kH, kW]``, as of all these functions.

    Returns:
        The sum of the squared cross-correlations of the kernels of filters i and i + 1, every channel of every pair a
        group of one convolution.
    """
    first, second = weight[:-1].flatten(0, 1), weight[1:].flatten(0, 1)  # [pairs * C, kH, kW]
    padding = [k - 1 for k in weight.shape[2:]]
    return F.conv2d(first[None], second[:, None], padding=padding, groups=len(first)).square().sum()


def ocnn_similarity(weight: Tensor) -> Tensor:
    r"""Energy of the cross-correlations of all filters by ``conv2d(W, W)``, as OCNN has it (arXiv 1911.12207).

    Returns:
        :math:`\sum_{i<j} \lVert \sum_c K_{ic} \star K_{jc} \rVert^2`. Convolutional Similarity sums over the channels
        after squaring: with one channel the two are the same, with more this one can vanish where that does not.
    """
    between = F.conv2d(weight, weight, padding=[k - 1 for k in weight.shape[2:]])  # [M, M, 2 kH - 1, 2 kW - 1]
    energies = between.square().sum((2, 3))
    return (energies.sum() - energies.diagonal().sum()) / 2


def rfft_similarity(weight: Tensor) -> Tensor:
    """Raw Convolutional Similarity of all filters from power spectra, as one writes it with `torch.fft`."""
    lattice = [2 * k - 1 for k in weight.shape[2:]]
    power = torch.fft.rfft2(weight, s=lattice).abs().square()  # [M, C, 2 kH - 1, kW]
    columns = power.new_full((power.shape[-1],), 2)
    columns[0] = 1
    pairs = power.sum(0).square() - power.square().sum(0)
    return (pairs * columns).sum() / 2 / (lattice[0] * lattice[1])


PEERS: dict[str, Similarity] = {
    "grouped conv2d, adjacent pairs": adjacent_similarity,
    "conv2d(W, W), all pairs as in OCNN": ocnn_similarity,
    "rFFT, all pairs": rfft_similarity,
}


def adam(weight: Tensor, similarity: Similarity, *, rate: float = RATE, preserve: bool = False) -> Iterator[float]:
    """The similarity before each step of Adam, without end.

    Args:
        weight: ``[M, C, kH, kW]``; left as it is.
        similarity: What is lowered.
        rate: Of Adam.
        preserve: Whether filters are rescaled to their norms after each step.
    """
    weight = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=rate)
    norms = filter_norms(weight).detach()
    while True:
        loss = similarity(weight)
        yield loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if preserve:
            with torch.no_grad():
                weight *= norms / filter_norms(weight)


def filter_norms(weight: Tensor) -> Tensor:
    """L2 norms ``[M, 1, 1, 1]``."""
    return torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)


def time_step(weight: Tensor, similarity: Similarity) -> float:
    """Seconds of the second step; the first allocates."""
    steps = adam(weight, similarity)
    next(steps), next(steps)
    started = time.perf_counter()
    next(steps)
    return time.perf_counter() - started


def time_to_target(weight: Tensor, cap: float) -> tuple[float, bool]:
    """Adam(0.002) on `rfft_similarity` of unit filters until a tenth of its start is left.

    Their norms are restored after each step, so that the similarity stays the normalized one.

    Args:
        weight: ``[M, C, kH, kW]``.
        cap: Seconds after which it gives up.

    Returns:
        Seconds, and whether it got there.
    """
    norms = filter_norms(weight)
    # Adam's steps have the size of the rate whatever the gradient's: on filters 1 / norm as long, as much longer.
    losses = adam(weight / norms, rfft_similarity, rate=RATE / float(norms.mean()), preserve=True)
    started = time.perf_counter()
    first = next(losses)
    for loss in losses:
        seconds = time.perf_counter() - started
        if loss <= TARGET * first or seconds > cap:
            break
    return seconds, loss <= TARGET * first
