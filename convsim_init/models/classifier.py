"""The classifier of a model: found by building the model for another number of classes, not guessed from names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convsim_init.errors import InputError
from convsim_init.models.build import build_model

if TYPE_CHECKING:
    import torch

OTHERS = (11, 12)  # numbers of classes, of which a model has one at most by default


def classifier_keys(model: torch.nn.Module, spec: str, /, **arguments: Any) -> list[str]:
    """Keys of a model's state dict whose shapes depend on the number of classes.

    `build_model` made the model of the spec and these arguments, with any seed.

    Raises:
        InputError: If the model cannot be built for another number of classes, or none of its shapes depends on it.
    """
    own = {key: value.shape for key, value in model.state_dict().items() if hasattr(value, "shape")}
    classes = arguments.get("num_classes")
    for other in OTHERS if classes is None else (classes + 1,):
        state = build_model(spec, **arguments | {"num_classes": other}).state_dict()
        keys = [key for key, shape in own.items() if key in state and state[key].shape != shape]
        # Another number of classes may make another network: its shapes say nothing of this one's.
        if keys and own.keys() <= state.keys():
            return keys
    raise InputError(f"expected a model with outputs for a number of classes, got {spec!r}, whose shapes do not change")


def pointwise_convolutions(model: object) -> set[str]:
    """Names of a model's convolutions of one tap; none of a model whose last weight is not one's, or of a state dict.

    Where they are classifiers, one of them comes last.
    """
    from torch import nn

    from convsim_init.layers import tree

    if not isinstance(model, nn.Module):
        return set()
    weighted = [(name, module) for name, module in tree.named_modules(model) if "weight" in module._parameters]
    found = [
        name
        for name, module in weighted
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and max(module.kernel_size) == 1
    ]
    return set(found) if found and found[-1] == weighted[-1][0] else set()
