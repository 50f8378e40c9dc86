"""The network of ``reference.safetensors``, which release 0.1.0 wrote: every path through a descent, in few weights."""

from torch import nn


def build() -> nn.Module:
    """Convolutions of several ranks, kernel sizes, groups and directions."""
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 16, 7, bias=False),
            "body": nn.Conv2d(16, 40, 3),
            "norm": nn.BatchNorm2d(40),
            "point": nn.Conv2d(40, 24, 1),
            "grouped": nn.Conv2d(24, 24, 3, groups=4),
            "even": nn.Conv2d(8, 12, (2, 4)),
            "sound": nn.Conv1d(6, 10, 5),
            "volume": nn.Conv3d(4, 6, 3),
            "up": nn.ConvTranspose2d(12, 8, 3),
            "depthwise": nn.Conv2d(16, 16, 3, groups=16),
        }
    )
