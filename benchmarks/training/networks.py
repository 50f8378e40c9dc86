"""The networks of the training benchmark, small enough for a core; a width scales every layer's filters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convsim_init as ci

Norm = Callable[[int], nn.Module]


def plain(
    in_chans: int, classes: int, width: float, filters: tuple[int, ...] = (16, 32, 32, 64), per_stage: int = 2
) -> nn.Module:
    """3x3 layers without normalization; the last of every few has stride 2."""
    channels = [in_chans, *_scaled(filters, width)]
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(pairwise(channels)):
        layers += [nn.Conv2d(a, b, 3, 1 + (index % per_stage == per_stage - 1), padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], classes))


def vgg(in_chans: int, classes: int, width: float) -> nn.Module:
    """Five 3x3 layers with batch norm, and pooling between them."""
    channels = [in_chans, *_scaled((16, 32, 32, 64, 64), width)]
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(pairwise(channels)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if index in (0, 2) else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


class ResNet(nn.Module):
    """A stem of 5x5 with stride 2, then three basic blocks; 1x1 layers where the width changes.

    Args:
        in_chans: Channels of the images.
        classes: Outputs.
        width: Factor on every layer's filters.
        norm: Made of a number of channels, it follows every convolution.
        last: Follows the last convolution of a block, in its place.
    """

    def __init__(
        self, in_chans: int, classes: int, width: float, norm: Norm = nn.BatchNorm2d, last: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        a, b, c = _scaled((16, 32, 64), width)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, a, 5, 2, padding=2, bias=False), norm(a), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(*shape, norm, last) for shape in ((a, a, 1), (a, b, 2), (b, c, 2))))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


class Block(nn.Module):
    """Two 3x3 layers beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm, last: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False), norm(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, padding=1, bias=False), last(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet20(in_chans: int, classes: int, width: float) -> nn.Module:
    """ResNet-20 for CIFAR (He et al., arXiv 1512.03385), with 1x1 layers where the width changes."""
    a, b, c = _scaled((16, 32, 64), width)
    blocks = [
        Block(before, after, 1 if before == after else 2, nn.BatchNorm2d, nn.BatchNorm2d)
        for before, after in pairwise((a, a, a, a, b, b, b, c, c, c))
    ]
    stem = [nn.Conv2d(in_chans, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


class Shift(nn.Module):
    """A learned number added to every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        return x + self.bias[:, None, None]


class SkipInit(Shift):
    """A learned factor, of zero at first, on a whole branch (De and Smith, arXiv 2002.10444); and a shift."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        return self.factor * super().forward(x)


def convmixer(in_chans: int, classes: int, width: float) -> nn.Module:
    """Patches of 2x2, then four blocks of a 7x7 depthwise layer beside a shortcut and a 1x1 layer, with batch norm."""
    (channels,) = _scaled((32,), width)

    def activated(conv: nn.Conv2d) -> nn.Sequential:
        return nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(channels))

    layers: list[nn.Module] = [activated(nn.Conv2d(in_chans, channels, 2, 2))]
    for _ in range(4):
        layers.append(Residual(activated(nn.Conv2d(channels, channels, 7, padding=3, groups=channels))))
        layers.append(activated(nn.Conv2d(channels, channels, 1)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def convnext(in_chans: int, classes: int, width: float) -> nn.Module:
    """Patches of 2x2, then four of ConvNeXt's blocks with layer norm, of one width."""
    (channels,) = _scaled((32,), width)
    blocks = [
        Residual(
            nn.Sequential(
                nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
                LayerNorm(channels),
                nn.Conv2d(channels, 4 * channels, 1),
                nn.GELU(),
                nn.Conv2d(4 * channels, channels, 1),
            ),
            LayerScale(channels),
        )
        for _ in range(4)
    ]
    stem = [nn.Conv2d(in_chans, channels, 2, 2), LayerNorm(channels)]
    head = [nn.AdaptiveAvgPool2d(1), LayerNorm(channels), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*stem, *blocks, *head)


class Residual(nn.Sequential):
    """Layers beside a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        out: Tensor = x + super().forward(x)
        return out


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LayerScale(nn.Module):
    """A learned factor on every channel, small at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        return self.factor[:, None, None] * x


def cifar_resnet18(in_chans: int, classes: int, width: float) -> nn.Module:
    """The CIFAR ResNet-18, of one width only; slow without a GPU."""
    if width != 1:
        raise ci.InputError(f"expected width 1 for cifar_resnet18, got {width:g}")
    return ci.build_model("cifar_resnet18", in_chans=in_chans, num_classes=classes)


NETWORKS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "plain": plain,
    "plain10": partial(plain, filters=(16,) * 4 + (32,) * 4 + (64,) * 2, per_stage=4),
    "resnet": ResNet,
    "resnet20": resnet20,
    "skipinit": partial(ResNet, norm=Shift, last=SkipInit),
    "vgg": vgg,
    "convmixer": convmixer,
    "convnext": convnext,
    "cifar_resnet18": cifar_resnet18,
}


def _scaled(filters: tuple[int, ...], width: float) -> list[int]:
    return [max(2, round(width * number)) for number in filters]
