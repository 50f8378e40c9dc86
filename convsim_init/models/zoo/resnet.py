"""ResNet, Wide ResNet and ResNeXt, with torchvision's keys, initialization and order of random draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, arXiv:1512.03385).

    Maps `[N, in_channels, H, W]` to `[N, channels, H / stride, W / stride]`.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out)
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, the stride on the 3x3 as in torchvision ("ResNet v1.5").

    Maps `[N, in_channels, H, W]` to `[N, 4 * channels, H / stride, W / stride]`. The 3x3 has `groups` groups of
    `group_width * channels / 64` channels: more groups give ResNeXt (arXiv:1611.05431), wider ones Wide ResNet
    (arXiv:1605.07146).
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, group_width: int) -> None:
        super().__init__()
        width = groups * (group_width * channels // 64)
        out_channels = channels * self.expansion
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out)
        return activated


def _stage(
    block: Callable[[int, int, int], BasicBlock | Bottleneck],
    in_channels: int,
    channels: int,
    depth: int,
    *,
    stride: int,
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    out_channels = channels * first.expansion
    return nn.Sequential(first, *(block(out_channels, channels, 1) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """A residual network of four stages.

    The ImageNet networks are torchvision's to the bit: convolutions are drawn once by PyTorch's default and then
    again from He's normal distribution over the fan-out, batch norm is 1 and 0, and `fc` keeps PyTorch's default.

    The CIFAR network is that of kuangliu/pytorch-cifar (`models/resnet.py`, with basic blocks): a 3x3 stem of
    stride 1, no max-pool, and PyTorch's default initialization throughout. Only its keys are torchvision's.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int,
        in_chans: int,
        bottleneck: bool = False,
        groups: int = 1,
        group_width: int = 64,
        cifar: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_chans, 64, 3) if cifar else _conv(in_chans, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        block = partial(Bottleneck, groups=groups, group_width=group_width) if bottleneck else BasicBlock
        expansion = Bottleneck.expansion if bottleneck else BasicBlock.expansion
        self.layer1 = _stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = _stage(block, 64 * expansion, 128, depths[1], stride=2)
        self.layer3 = _stage(block, 128 * expansion, 256, depths[2], stride=2)
        self.layer4 = _stage(block, 256 * expansion, 512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * expansion, num_classes)
        if not cifar:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """The logits `[N, num_classes]` of images `[N, in_chans, H, W]`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [N, C, H, W]
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
