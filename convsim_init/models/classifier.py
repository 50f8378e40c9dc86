"""The classifier of a model: found by building the model for another number of classes, not guessed from names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convsim_init.errors import InputError
from convsim_init.models.build import build_model

if TYPE_CHECKING:
    import torch

TRIED_CLASSES = (11, 12)  # numbers of classes; at least one of them is not a model's default


def classifier_keys(model: torch.nn.Module, spec: str, /, **arguments: Any) -> list[str]:
    """Keys of a model's state dict whose shapes depend on the number of classes.

    The model must be the one that `build_model` makes of this spec and these arguments, with any seed.

    Raises:
        InputError: If the model cannot be built for another number of classes, or none of its shapes depends on it.
    """
    own = {key: value.shape for key, value in model.state_dict().items() if hasattr(value, "shape")}
    classes = arguments.get("num_classes")
    for other in TRIED_CLASSES if classes is None else (classes + 1,):
        state = build_model(spec, **arguments | {"num_classes": other}).state_dict()
        keys = [key for key, shape in own.items() if key in state and state[key].shape != shape]
        # Another number of classes may give a different network, whose shapes say nothing about this one.
        if keys and own.keys() <= state.keys():
            return keys
    raise InputError(f"expected a model with outputs for a number of classes, got {spec!r}, whose shapes do not change")


def pointwise_convolutions(model: object) -> set[str]:
    """Names of a model's convolutions of one tap, if one of them is the last module with a weight, as a classifier is.

    Empty otherwise, and for a state dict.
    """
    from torch import nn

    from convsim_init.layers import tree
    from convsim_init.layers.forward.calls import per_axis

    if not isinstance(model, nn.Module):
        return set()
    weighted = [(name, module) for name, module in tree.named_modules(model) if "weight" in module._parameters]
    names = [
        name
        for name, module in weighted
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and max(per_axis(module, "kernel_size")) == 1
    ]
    return set(names) if names and names[-1] == weighted[-1][0] else set()
