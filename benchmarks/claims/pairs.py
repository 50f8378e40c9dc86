"""Two kernels and one signal, as in section 4 of arXiv 2411.03226: what does minimizing do to their feature maps?

Kernels of 9 taps, a signal of 64 samples, full convolution; 300 steps of gradient descent on the squared cosine of the
kernels (rate 0.1) or on their Convolutional Similarity (rate 0.01). All draws are minimized at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import convsim_init as ci

TAPS, SAMPLES, STEPS = 9, 64, 300
DRAWS: dict[str, Callable[..., Tensor]] = {
    "uniform on [0, 1]": torch.rand,
    "uniform on [-1, 1]": lambda *shape, **options: 2 * torch.rand(*shape, **options) - 1,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda maps: maps,
    "ReLU": F.relu,
    "LeakyReLU": F.leaky_relu,
    "ELU": F.elu,
}
COLUMNS = [
    "draws",
    "minimized",
    "norms",
    "activation",
    "before",
    "after",
    "change 5 %",
    "50 %",
    "95 %",
    "rises",
    "norm",
]


def squared_cosine(kernels: Tensor) -> Tensor:
    """Summed over draws ``[B, 2, T]``: each has a gradient of its own."""
    return F.cosine_similarity(kernels[:, 0], kernels[:, 1], dim=-1).square().sum()


def similarity(kernels: Tensor) -> Tensor:
    """Convolutional Similarity, summed over draws ``[B, 2, T]``: each is a group of two filters."""
    return ci.convolutional_similarity(kernels.flatten(0, 1)[:, None], groups=len(kernels))


OBJECTIVES = {"kernels' squared cosine": (squared_cosine, 0.1), "Convolutional Similarity": (similarity, 0.01)}


def descend(kernels: Tensor, loss: Callable[[Tensor], Tensor], rate: float, *, preserve: bool) -> Tensor:
    """Gradient descent from kernels ``[B, 2, T]``; to preserve norms they are restored after each step."""
    norms = kernels.norm(dim=-1, keepdim=True)
    kernels = kernels.clone()
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(loss(kernels.requires_grad_()), kernels)
        kernels = kernels.detach() - rate * gradient
        if preserve:
            kernels *= norms / kernels.norm(dim=-1, keepdim=True)
    return kernels


def map_cosines(kernels: Tensor, signals: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Absolute cosine ``[B]`` of the two feature maps of each draw, after an activation."""
    size = SAMPLES + TAPS - 1
    spectrum = torch.fft.rfft(kernels, size) * torch.fft.rfft(signals, size)[:, None]
    maps = activation(torch.fft.irfft(spectrum, size))  # [B, 2, size]
    return F.cosine_similarity(maps[:, 0], maps[:, 1], dim=-1).abs()


def rows(draws: int, seed: int = 0) -> Iterator[list[str]]:
    """A row for every kind of draw, objective, treatment of norms and activation."""
    for name, draw in DRAWS.items():
        generator = torch.Generator().manual_seed(seed)
        kernels = draw(draws, 2, TAPS, generator=generator, dtype=torch.float64)
        signals = draw(draws, SAMPLES, generator=generator, dtype=torch.float64)
        for objective, (loss, rate) in OBJECTIVES.items():
            for preserve in (False, True):
                minimized = descend(kernels, loss, rate, preserve=preserve)
                norm = (minimized.norm(dim=-1) / kernels.norm(dim=-1)).mean()
                for activated, activation in ACTIVATIONS.items():
                    before = map_cosines(kernels, signals, activation)
                    after = map_cosines(minimized, signals, activation)
                    change = after - before
                    quantiles = change.quantile(change.new_tensor([0.05, 0.5, 0.95]))
                    yield [
                        *(name, objective, "preserved" if preserve else "free", activated),
                        *(f"{before.mean():.3f}", f"{after.mean():.3f}", *(f"{q:+.3f}" for q in quantiles)),
                        *(f"{(change > 0).double().mean():.1%}", f"{norm:.3f}"),
                    ]
