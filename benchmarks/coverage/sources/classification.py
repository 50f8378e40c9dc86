"""Every classification model of torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import nn

import convsim_init as ci
from benchmarks.coverage.sources.architecture import Architecture, Inputs, noise

SMALL = 64  # pixels; not every model takes so few


def torchvision_models() -> Iterator[Architecture]:
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        yield _architecture(f"torchvision:{name}", partial(torchvision.models.get_model, name, weights=None))


def timm_models() -> Iterator[Architecture]:
    import timm

    for name in timm.list_models():
        yield _architecture(f"timm:{name}", partial(timm.create_model, name))


def _architecture(spec: str, outline: Callable[[], nn.Module]) -> Architecture:
    return Architecture(spec, partial(ci.build_model, spec), partial(_images, spec), outline)


def _images(spec: str, model: nn.Module) -> Iterator[Inputs]:
    size = (3, 299, 299) if spec == "torchvision:inception_v3" else (3, 224, 224)
    channels, *size = getattr(model, "default_cfg", {}).get("input_size", size)
    yield (noise(1, channels, SMALL, SMALL),)
    yield (noise(1, channels, *size),)
