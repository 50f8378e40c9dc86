"""The weights of networks' convolutions: which shapes, and how many of each."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

import convsim_init as ci

Shape = tuple[int, ...]
Shapes = Counter[Shape]  # of weights [M, C, kH, kW]

# Without the depthwise ones, whose filters form no pair; the other layers of its blocks are linear.
CONVNEXT_T = Shapes({(96, 3, 4, 4): 1, (192, 96, 2, 2): 1, (384, 192, 2, 2): 1, (768, 384, 2, 2): 1})
BUILT_IN = {"ResNet-18": "resnet18", "ResNet-50": "resnet50", "VGG-16": "vgg16"}
NETWORKS = (*BUILT_IN, "ConvNeXt-T")


def conv_shapes(network: str) -> Shapes:
    """Shapes of the convolutions of one of `NETWORKS`, with how many layers have each."""
    if network not in BUILT_IN:
        return CONVNEXT_T
    return shapes_of(ci.build_model(BUILT_IN[network]))


def shapes_of(model: torch.nn.Module) -> Shapes:
    """Shapes of a model's two-dimensional convolutions that are not depthwise."""
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    return Shapes(tuple(conv.weight.shape) for conv in convolutions if conv.groups == 1)


def draw(shape: Shape) -> Tensor:
    """A weight by Kaiming's draw, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.nn.init.kaiming_normal_(torch.empty(shape), generator=generator)


def state_dict(shapes: Shapes) -> dict[str, Tensor]:
    """Weights of all layers, each its own memory."""
    return {f"{index}.weight": draw(shape) for index, shape in enumerate(shapes.elements())}


def text(shape: Shape) -> str:
    """As in ``512×512×3×3``."""
    return "×".join(map(str, shape))
