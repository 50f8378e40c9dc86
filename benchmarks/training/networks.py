"""The networks of the training benchmark, small enough for a core; a width scales every layer's filters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

import convsim_init as ci


def plain(in_chans: int, classes: int, width: float) -> nn.Module:
    """Four 3x3 layers without normalization."""
    channels = [in_chans, *_scaled((16, 32, 32, 64), width)]
    layers: list[nn.Module] = []
    for (a, b), stride in zip(pairwise(channels), (1, 2, 1, 2), strict=True):
        layers += [nn.Conv2d(a, b, 3, stride, padding=1), nn.ReLU()]
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
    """A stem of 5x5 with stride 2, then three basic blocks, with batch norm; 1x1 layers where the width changes."""

    def __init__(self, in_chans: int, classes: int, width: float) -> None:
        super().__init__()
        a, b, c = _scaled((16, 32, 64), width)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, a, 5, 2, padding=2, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.blocks = nn.Sequential(Block(a, a, 1), Block(a, b, 2), Block(b, c, 2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


class Block(nn.Module):
    """Two 3x3 layers beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def cifar_resnet18(in_chans: int, classes: int, width: float) -> nn.Module:
    """The CIFAR ResNet-18, of one width only: for a GPU."""
    if width != 1:
        raise ci.InputError(f"expected width 1 for cifar_resnet18, got {width:g}")
    return ci.build_model("cifar_resnet18", in_chans=in_chans, num_classes=classes)


NETWORKS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "plain": plain,
    "resnet": ResNet,
    "vgg": vgg,
    "cifar_resnet18": cifar_resnet18,
}


def _scaled(filters: tuple[int, ...], width: float) -> list[int]:
    return [max(2, round(width * number)) for number in filters]
