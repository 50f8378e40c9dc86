"""Layers of a ResNet-18: how alike are the feature maps of each start, on noise and on what really reaches the layer?

The real inputs are those of the layer in a ResNet-18 as torchvision draws it, in training mode, on photographs from the
wheels of scikit-learn and scikit-image.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convsim_init as ci
from benchmarks.training.starts import one_channel

LAYERS = ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer2.0.conv2", "layer3.0.conv1"]
INPUTS = ["white", "natural", "real"]
COLUMNS = ["layer", "shape", "start", *(f"\\|cosine\\|, {name}" for name in INPUTS), "\\|correlation\\|, real"]
CROPS, SIDE, SAMPLES, NOISE_SIDE = 32, 96, 16, 32
OCNN_STEPS = 100


def ocnn(weight: Tensor) -> Tensor:
    """The loss of Wang et al., arXiv 1911.12207, minimized by Adam over unit filters.

    It is ``|| sum_c K_ic * K_jc ||^2`` at every shift, i = j without shift zero: unlike Convolutional Similarity it
    lets channels cancel each other.
    """
    sides = [2 * size - 1 for size in weight.shape[2:]]
    filters = weight.clone().requires_grad_()
    identity = torch.eye(len(weight))
    adam = torch.optim.Adam([filters], lr=0.01)
    for _ in range(OCNN_STEPS):
        unit = F.normalize(filters.flatten(1)).view_as(filters)
        spectrum = torch.fft.fft2(unit, s=sides).flatten(2).permute(2, 0, 1)  # [N, M, C]
        products = spectrum @ spectrum.mH - identity  # [N, M, M]
        loss = products.abs().square().mean(0).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return filters.detach()


def convsim(settings: ci.Settings | None = None) -> Callable[[Tensor], Tensor]:
    return lambda weight: ci.convsim_(weight.clone(), settings=settings)


STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "Kaiming": lambda weight: weight,
    "`nn.init.orthogonal_`": lambda weight: nn.init.orthogonal_(torch.empty_like(weight)),
    "OCNN's loss, 100 steps": ocnn,
    "one random channel": one_channel,
    "paper, 100 steps": convsim(ci.Settings.paper()),
    "**convsim**": convsim(),
    "convsim, `channels=all`": convsim(ci.Settings(channels="all")),
}


def rows(seeds: int) -> Iterator[list[str]]:
    """A row for every layer and start; means over seeds."""
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    for seed in range(seeds):
        model = ci.build_model("resnet18", seed=seed)
        seen = inputs_of(model, photographs(seed))
        torch.manual_seed(seed)
        for name in LAYERS:
            conv = model.get_submodule(name)
            real = seen[name]
            weight = nn.init.kaiming_normal_(torch.empty_like(conv.weight), mode="fan_out", nonlinearity="relu")
            noises = [noise(conv.in_channels, natural=natural) for natural in (False, True)]
            for start, draw in STARTS.items():
                filters = draw(weight)
                values = [map_cosine(F.conv2d(each, filters)) for each in (*noises, real)]
                values.append(map_cosine(F.conv2d(real, filters), centred=True))
                shape = "×".join(map(str, filters.shape))
                found.setdefault((name, shape, start), []).append(values)
    for labels, runs in found.items():
        yield [*labels, *(f"{statistics.fmean(values):.4f}" for values in zip(*runs, strict=True))]


@torch.no_grad()
def map_cosine(maps: Tensor, *, centred: bool = False) -> float:
    """Mean absolute cosine of every two of the feature maps ``[N, M, H, W]``, over images and positions together."""
    flat = maps.transpose(0, 1).flatten(1)  # [M, N H W]
    flat = F.normalize(flat - flat.mean(1, keepdim=True) if centred else flat)
    products = (flat @ flat.T).abs()
    count = len(flat)
    return float(products.sum() - products.diagonal().sum()) / (count * (count - 1))


def noise(channels: int, *, natural: bool) -> Tensor:
    """Independent channels of noise ``[N, C, H, W]`` of flat power spectrum, or of 1/|f|^2 with zero mean."""
    drawn = torch.randn(SAMPLES, channels, NOISE_SIDE, NOISE_SIDE)
    if not natural:
        return drawn
    axis = torch.fft.fftfreq(NOISE_SIDE)
    squares = axis[:, None].square() + axis.square()
    amplitude = torch.where(squares > 0, squares.clamp(min=1e-9).rsqrt(), 0)
    return torch.fft.ifft2(torch.fft.fft2(drawn) * amplitude).real


def photographs(seed: int) -> Tensor:
    """Crops ``[N, 3, H, W]`` of colour photographs, of zero mean and unit variance for each colour."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    images = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    rng = np.random.default_rng(seed)
    crops = []
    for index in range(CROPS):
        image = images[index % len(images)]
        top, left = (rng.integers(side - SIDE + 1) for side in image.shape[:2])
        crops.append(image[top : top + SIDE, left : left + SIDE])
    batch = torch.from_numpy(np.stack(crops)).float().permute(0, 3, 1, 2)
    mean, deviation = batch.mean((0, 2, 3), keepdim=True), batch.std((0, 2, 3), keepdim=True)
    return (batch - mean) / deviation


@torch.no_grad()
def inputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What reaches the layers when a model in training mode sees images."""
    seen: dict[str, Tensor] = {}
    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: seen.update({name: arguments[0].clone()})
        )
    model.train()(images)
    return seen
