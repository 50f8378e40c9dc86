"""`convsim_` in a network's own initialization, like the functions of torch.nn.init.

python examples/apply.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import convsim_init as ci


class Network(nn.Module):
    """A small network that draws its weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, padding=2)
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.head = nn.Linear(32, 10)
        self.apply(self.init_weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.up(F.relu(self.grouped(F.relu(self.stem(images))))))
        return self.head(features.mean(dim=(2, 3)))

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
            before = similarity(module)
            ci.convsim_(module.weight, groups=module.groups, transposed=module.transposed)  # after the draw
            print(f"{module}: {before:.1e} -> {similarity(module):.1e}")


def similarity(conv: nn.Conv2d | nn.ConvTranspose2d) -> float:
    """Mean similarity of two filters of the layer, blind to their scale."""
    options = {"groups": conv.groups, "transposed": conv.transposed}
    with torch.no_grad():
        return ci.convolutional_similarity(conv.weight, normalized=True, **options).item()


if __name__ == "__main__":
    Network()
