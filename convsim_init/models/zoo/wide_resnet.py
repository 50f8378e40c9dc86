"""The pre-activation Wide ResNet for CIFAR (Zagoruyko and Komodakis 2016, arXiv:1605.07146)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class WideBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice, and a shortcut.

    Maps `[N, in_channels, H, W]` to `[N, channels, H / stride, W / stride]`. Where the number of channels changes, the
    shortcut is a 1x1 convolution of the activated input; elsewhere it is the input itself.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`."""
        activated = self.relu1(self.bn1(x))
        shortcut: Tensor = x if self.convShortcut is None else self.convShortcut(activated)
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return out + shortcut


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = WideBlock(in_channels, channels, stride)
    layer = nn.Sequential(first, *(WideBlock(channels, channels, 1) for _ in range(blocks - 1)))
    # The keys of the original have this name above the blocks of a stage.
    return nn.Sequential(OrderedDict(layer=layer))


class WideResNet(nn.Module):
    """WRN-`depth`-`widen` without dropout: `depth` = 6n + 4 for n blocks in each stage, `widen` times as wide.

    Initialized as in szagoruyko/wide-residual-networks (`models/utils.lua`): convolutions from He's normal distribution
    over the fan-out, batch norm 1 and 0, the bias of `fc` 0 and its weight left at the framework's default. The keys
    and the order of random draws are those of xternalz/WideResNet-pytorch (`wideresnet.py`): the original has no
    modules in PyTorch.
    """

    def __init__(self, depth: int, widen: int, *, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        blocks = (depth - 4) // 6
        self.block1 = _stage(16, 16 * widen, blocks, stride=1)
        self.block2 = _stage(16 * widen, 32 * widen, blocks, stride=2)
        self.block3 = _stage(32 * widen, 64 * widen, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The logits `[N, num_classes]` of images `[N, in_chans, H, W]`."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))  # [N, 64 * widen, H / 4, W / 4]
        x = self.avgpool(self.relu(self.bn1(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits
