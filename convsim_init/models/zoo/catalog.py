"""The built-in models by name. torch is imported only when one is built, so that listing them is quick."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING

from convsim_init.errors import InputError

if TYPE_CHECKING:
    import torch

ARGUMENTS = ("num_classes", "in_chans")  # all that a built-in model takes


class UnknownModelError(InputError):
    """No model goes by the name that was given; the message carries the closest names.

    Examples:
        >>> issubclass(ci.UnknownModelError, ci.InputError)
        True
    """


@dataclass(frozen=True)
class BuiltIn:
    """A built-in model."""

    name: str
    module: str  # of `convsim_init.models.zoo`
    factory: str  # class in that module, called with the arguments and the two defaults
    summary: str
    arguments: Mapping[str, object] = field(default_factory=dict)  # what distinguishes this model within its family
    num_classes: int = 1000
    in_chans: int = 3

    def check_arguments(self, arguments: Mapping[str, object]) -> None:
        """Refuse arguments that no built-in model takes."""
        others = [argument for argument in arguments if argument not in ARGUMENTS]
        if others:
            raise InputError(
                f"{self.name}: a built-in model takes only {' and '.join(ARGUMENTS)}, got {', '.join(others)}; leave "
                f"that out"
            )

    def build(self, arguments: Mapping[str, object]) -> torch.nn.Module:
        """Build the model, with the catalog's defaults for arguments that are not given."""
        family = getattr(import_module(f"convsim_init.models.zoo.{self.module}"), self.factory)
        defaults = {"num_classes": self.num_classes, "in_chans": self.in_chans}
        model: torch.nn.Module = family(**self.arguments, **defaults | dict(arguments))
        return model


def _resnet(name: str, title: str, depths: tuple[int, ...], **arguments: object) -> BuiltIn:
    summary = f"{title} for ImageNet; keys as in torchvision and timm"
    return BuiltIn(name, "resnet", "ResNet", summary, {"depths": depths, **arguments})


def _vgg(depth: int, convolutions: tuple[int, ...], *, batch_norm: bool) -> BuiltIn:
    name = f"vgg{depth}_bn" if batch_norm else f"vgg{depth}"
    title = f"VGG-{depth} with batch norm" if batch_norm else f"VGG-{depth}"
    arguments = {"convolutions": convolutions, "batch_norm": batch_norm}
    return BuiltIn(name, "vgg", "VGG", f"{title} for ImageNet; keys as in torchvision", arguments)


_VGG_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}

_ENTRIES = (
    _resnet("resnet18", "ResNet-18", (2, 2, 2, 2)),
    _resnet("resnet34", "ResNet-34", (3, 4, 6, 3)),
    _resnet("resnet50", "ResNet-50", (3, 4, 6, 3), bottleneck=True),
    _resnet("resnet101", "ResNet-101", (3, 4, 23, 3), bottleneck=True),
    _resnet("resnet152", "ResNet-152", (3, 8, 36, 3), bottleneck=True),
    _resnet("wide_resnet50_2", "Wide ResNet-50-2", (3, 4, 6, 3), bottleneck=True, group_width=128),
    _resnet("wide_resnet101_2", "Wide ResNet-101-2", (3, 4, 23, 3), bottleneck=True, group_width=128),
    _resnet("resnext50_32x4d", "ResNeXt-50 32x4d", (3, 4, 6, 3), bottleneck=True, groups=32, group_width=4),
    _resnet("resnext101_32x8d", "ResNeXt-101 32x8d", (3, 4, 23, 3), bottleneck=True, groups=32, group_width=8),
    _resnet("resnext101_64x4d", "ResNeXt-101 64x4d", (3, 4, 23, 3), bottleneck=True, groups=64, group_width=4),
    *(_vgg(d, counts, batch_norm=bn) for d, counts in _VGG_CONVOLUTIONS.items() for bn in (False, True)),
    BuiltIn(
        name="cifar_resnet18",
        module="resnet",
        factory="ResNet",
        summary="ResNet-18 for 32x32 images: 3x3 stem, no max-pool; keys as torchvision's resnet18",
        arguments={"depths": (2, 2, 2, 2), "cifar": True},
        num_classes=10,
    ),
    BuiltIn(
        name="cifar_vgg19",
        module="vgg",
        factory="CifarVGG",
        summary="VGG-19 with batch norm for 32x32 images, one linear classifier; keys as kuangliu/pytorch-cifar",
        arguments={"convolutions": _VGG_CONVOLUTIONS[19]},
        num_classes=10,
    ),
    BuiltIn(
        name="cifar_wide_resnet28_10",
        module="wide_resnet",
        factory="WideResNet",
        summary="WRN-28-10 for 32x32 images, pre-activation, no dropout; keys as xternalz/WideResNet-pytorch",
        arguments={"depth": 28, "widen": 10},
        num_classes=10,
    ),
)

MODELS: dict[str, BuiltIn] = {entry.name: entry for entry in _ENTRIES}


def names(pattern: str | None = None) -> list[str]:
    """Built-in names in catalog order: all, or those that match a shell pattern such as ``"resnet*"``."""
    return [name for name in MODELS if pattern is None or fnmatchcase(name, pattern)]


def closest(name: str, known: Collection[str] = MODELS) -> list[str]:
    """Up to three known names: first those that begin with `name`, then those spelled like it."""
    typed = name.lower()
    completions = [candidate for candidate in known if typed and candidate.startswith(typed)]
    return list(dict.fromkeys(completions + get_close_matches(typed, known)))[:3]
