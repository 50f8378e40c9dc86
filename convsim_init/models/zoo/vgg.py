"""VGG for ImageNet as torchvision has it, and the VGG common for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_STAGE_CHANNELS = (64, 128, 256, 512, 512)


def _features(convolutions: Sequence[int], in_chans: int, *, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    in_channels = in_chans
    for channels, count in zip(_STAGE_CHANNELS, convolutions, strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(in_channels, channels, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU(inplace=True))
            in_channels = channels
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """VGG (Simonyan and Zisserman 2014, arXiv:1409.1556), torchvision's to the bit, by its convolutions in each stage.

    Every layer is drawn once by PyTorch's default; then convolutions from He's normal distribution over the fan-out
    and linear layers from N(0, 0.01²), with biases 0 and batch norm 1 and 0.
    """

    def __init__(self, convolutions: Sequence[int], *, batch_norm: bool, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.features = _features(convolutions, in_chans, batch_norm=batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The logits `[N, num_classes]` of images `[N, in_chans, H, W]`."""
        x = self.avgpool(self.features(x))  # [N, 512, 7, 7]
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


class CifarVGG(nn.Module):
    """VGG with batch norm and one linear classifier, as in kuangliu/pytorch-cifar (`models/vgg.py`).

    PyTorch's default initialization throughout, as there. The last feature maps are averaged over their pixels; those
    of a 32x32 image have one.
    """

    def __init__(self, convolutions: Sequence[int], *, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.features = _features(convolutions, in_chans, batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits `[N, num_classes]` of images `[N, in_chans, H, W]`, with H and W at least 32."""
        x = self.avgpool(self.features(x))  # [N, 512, 1, 1]
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits
