"""The convolutions of a state dict, inferred from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from convsim_init.functional.dtypes import converts
from convsim_init.layers.layer import Layer
from convsim_init.layers.names import split_weight_key
from convsim_init.layers.weights import KERNEL_RANKS, ComputedWeight, StoredWeight, Weight
from convsim_init.report.text import shown

COMPUTED = {  # endings of the keys of tensors that weights are computed from, and the factors in other entries
    ".parametrizations.weight.original1": "parametrizations.weight.original0",  # weight_norm, new and old
    ".parametrizations.weight.original": "",
    ".weight_v": "weight_g",
    ".weight_orig": "weight_mask",  # pruning; spectral_norm has no mask
}
ENDINGS = (*COMPUTED, ".weight")  # the first that a module has is in use, and others are left over
PARAMETRIZED = "parametrized: its weight is computed from what the state dict holds; use the model itself"
MASKED = "whether its forward pass uses it like that the model itself tells (--like in the shell)"
BY_SHAPE = "taken from its shape for a convolution without groups, not transposed"
BY_BIAS = "taken from the length of its bias for a transposed convolution"
BY_NORM = "taken from the length of the norm layer behind it for a transposed convolution"
DEPTHWISE = "looks depthwise, by its shape alone"
DOUBTFUL = (
    "doubtful whether it is a convolution's weight in PyTorch's layout, so it is left alone: the model itself (--like "
    "in the shell) settles it"
)
ROTATIONS = (4, 8)  # number of rotations by right angles, without and with mirror images
USUAL_EXTENT = 7  # of a kernel: longer ones need a bias or a norm layer as evidence
FEW = 32  # entries, too few for their mean to be evidence
OTHER_NAMES = ("bilinear", "expert", "codebook")


def infer_layers(state: Mapping[str, object]) -> Iterator[Layer]:
    """The convolutions whose weights are tensors of rank 3 to 5 with keys that end in one of `ENDINGS`.

    A convolution counts as transposed if its bias, or without one the norm layer behind it, is not as long as dimension
    0 of its weight; and as depthwise if dimension 1 has length 1. Other groups cannot be seen. Weights that pruning,
    masks and weight_norm compute can be read from the state dict but not set in it; a ``weight`` beside the tensors
    that it is computed from is stale.
    """
    # Lazy and nested tensors would raise an error if asked for their shape.
    state = {k: v for k, v in state.items() if not (isinstance(v, Tensor) and (is_lazy(v) or v.is_nested))}
    split = {key: parts for key in state if (parts := split_weight_key(key)) and parts[1] in ENDINGS}
    weights: dict[str, Tensor] = {}
    beside = defaultdict[str, list[str]](list)  # other keys of each module
    for key, value in state.items():
        if key not in split:
            beside[key.rpartition(".")[0]].append(key)
        elif isinstance(value, Tensor) and value.dim() in KERNEL_RANKS:
            weights[key] = value
    foreign, masks = _is_channels_last([value.shape for value in weights.values()]), _named_masks(state, weights)
    stacked, behind = _stacked(state), _norms_behind(state)
    for key, value in weights.items():
        name, ending = split[key]
        kind, prefix = f"Conv{value.dim() - 2}d", f"{name}." if name else ""
        used = [f"{prefix}{other[1:]}" for other in ENDINGS[: ENDINGS.index(ending)]]
        if key in masks.values() or not weights.keys().isdisjoint(used):
            continue
        factor = state.get(f"{prefix}{COMPUTED.get(ending, '')}")
        near = [*beside[name], *filter(None, [masks.get(key)])]
        # The mask of pruning is the factor already, which should not be multiplied by twice.
        mask = next((other for other in near if state[other] is not factor and _masks(state[other], value)), "")
        weight: Weight = StoredWeight(value, trained=False)
        if mask or ending in COMPUTED:
            compute = _computation(value, ending, factor, [state[mask]] if mask else [])
            weight = ComputedWeight(value, compute, MASKED if mask else PARAMETRIZED)
            weight.note = f"times {shown(mask)}, taken for its mask by its zeros and ones" if mask else None
        bias = state.get(f"{prefix}bias")
        if foreign or value.shape[0] in stacked or _is_doubtful(name, value, bias):
            yield Layer(name, kind, ComputedWeight(value, None, DOUBTFUL))
            continue
        groups, filters, inputs = _transposed_groups(value, bias), *value.shape[:2]
        # A length other than dimension 1 does not count: outputs may be concatenated before the norm layer.
        by_norm = bias is None and behind.get(name) == inputs != filters and value.shape[2:].numel() > 1
        if groups or by_norm:
            kind = kind.replace("Conv", "ConvTranspose")
            note = BY_BIAS if groups else BY_NORM
            yield Layer(name, kind, weight, groups=groups or 1, transposed=True, note=note)
        elif value.shape[0] > 1 and value.shape[1] == 1:
            yield Layer(name, kind, weight, groups=value.shape[0], note=DEPTHWISE)
        else:
            yield Layer(name, kind, weight, note=BY_SHAPE)


def _is_doubtful(name: str, weight: Tensor, bias: object) -> bool:
    """Whether a tensor may well be no convolution's weight, or one in another library's layout.

    Sparse and channels-last layouts put the kernel before the channels, ``[M, k, k, k, C]`` or ``[k, k, k, C, M]``.
    Bilinear layers and stacked experts have matrices in place of kernels, group-equivariant convolutions have rotations
    in place of the depth, and the factors of a norm over images are all about 1.
    """
    inputs, extents = weight.shape[1], weight.shape[2:]
    has_bias = isinstance(bias, Tensor) and bias.dim() == 1 and len(bias) in weight.shape[:2]
    if isinstance(bias, Tensor) and not (has_bias or _transposed_groups(weight, bias)):
        return True  # the bias of a layer norm over images, or of stacked linear layers
    if any(word in name.lower() for word in OTHER_NAMES):
        return True
    if _looks_channels_last(weight.shape):
        return True  # [M, k, k, C]
    if len(extents) == 3 and extents[0] in ROTATIONS and extents[1] == extents[2] in (3, 5, 7):
        return True  # [M, C, rotations, k, k] of a group-equivariant convolution
    if weight.dim() == 3 and not has_bias and _is_far_from_zero(weight):
        return True
    if len(extents) == 3 and not has_bias:
        depth, height, width = extents
        if USUAL_EXTENT < depth > height > 1 or depth == height > width == 2:
            return True  # [C, k, k] of stacked models, or [k, k, 2] of real and imaginary parts
    if max(extents) <= USUAL_EXTENT:
        small = not has_bias and len(set(extents)) == len(extents) == 2
        return small and weight.shape[0] == inputs in (3, 5, 7)  # [k, k, C, M]
    if max(weight.shape[:2]) <= USUAL_EXTENT and not has_bias:
        return True  # [k, k, C, C], or a few tokens [N, 1, C]
    if min(weight.shape[:2]) == min(extents) < max(extents):
        return True  # [k, k, C, M]
    square = len(extents) == 1 and inputs == extents[0]  # the shape of a bilinear layer with equal inputs
    return square or not (has_bias or inputs == 1 or (len(extents) > 1 and extents[-1] == extents[-2]))


def _stacked(state: Mapping[str, object]) -> set[int]:
    """Numbers of models that `torch.func.stack_module_state` seems to have stacked along dimension 0.

    In a stack biases and the statistics of norm layers have rank 2, and their shape is where that of the weight begins.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    found = set[int]()
    for key, shape in shapes.items():
        name, _, part = key.rpartition(".")
        weight = shapes.get(f"{name}.weight".lstrip("."), ())
        if part in ("bias", "running_mean") and len(shape) == 2 and weight[:2] == shape:
            found.add(shape[0])
    return found


def _norms_behind(state: Mapping[str, object]) -> dict[str, int]:
    """Length of the norm layer that follows a module in the same container, by the module's name, if one follows."""
    found, following = dict[str, int](), dict[str, str]()
    for name in reversed(dict.fromkeys(key.rpartition(".")[0] for key in state)):
        above = name.rpartition(".")[0]
        after = f"{following[above]}." if above in following else "."
        weight = state.get(f"{after}weight") if f"{after}bias" in state else None
        length = state.get(f"{after}running_mean", weight)
        if isinstance(length, Tensor) and length.dim() == 1:
            found[name] = len(length)
        following[above] = name
    return found


def _is_channels_last(shapes: Sequence[torch.Size]) -> bool:
    """Whether some of the weights can only have a channels-last layout, and none certainly has PyTorch's."""
    if _is_chain([shape for shape in shapes if len(shape) == 3]):
        return True
    foreign = [_looks_channels_last(shape) for shape in shapes]
    # In channels-last layout dimension 1 is an extent. If it is long, or unlike all others, it is the channels.
    native = (len(shape) > 3 and (shape[1] > USUAL_EXTENT or shape[1] not in (1, *shape[2:])) for shape in shapes)
    return any(foreign) and not any(a and not b for a, b in zip(native, foreign, strict=True))


def _is_chain(shapes: Sequence[torch.Size]) -> bool:
    """Whether 1-D weights look like ``[M, k, C]``: dimension 1 is short, and C the number of filters of one before.

    In PyTorch's layout kernels would then be as long as another layer has filters, which no layer would take as inputs.
    """
    short = all(shape[1] <= USUAL_EXTENT < shape[2] for shape in shapes)
    following = [(shape, shapes[:index]) for index, shape in enumerate(shapes) if index]
    chained = [shape[1] > 2 and shape[2] in [other[0] for other in before] for shape, before in following]
    return short and len(set(shapes)) > 1 and all(chained)  # equal shapes may belong to parallel layers


def _looks_channels_last(shape: torch.Size) -> bool:
    return len(shape) > 3 and shape[1] == shape[2] != shape[-1] and len(set(shape[2:-1])) == 1


def _is_far_from_zero(weight: Tensor) -> bool:
    """Whether the mean of the entries, if they can be read, is above their standard deviation."""
    if not (_is_plain(weight) and weight.is_floating_point()) or weight.numel() < FEW:
        return False
    deviation, mean = torch.std_mean(weight.detach().double())
    return bool(mean > deviation)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the entries of a tensor can be read."""
    known = type(tensor) in (Tensor, Parameter) and not tensor.is_meta and tensor.layout is torch.strided
    return known and converts(tensor.dtype)


def _named_masks(state: Mapping[str, object], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Keys of masks in other modules by those of their weights: ``masks.conv1`` or ``conv1_mask`` for ``conv1``."""
    owners = {_words(key): key for key in weights if "mask" not in key}
    found = {owners.get(_words(key), ""): key for key in state if "mask" in key}
    return {key: mask for key, mask in found.items() if key and _masks(state[mask], weights[key])}


def _words(key: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[._]+", key) if word not in ("mask", "masks", "weight"))


def _masks(value: object, weight: Tensor) -> bool:
    """Whether a value looks like a mask of a weight: it can be broadcast to that, and holds zeros and ones alone."""
    if not isinstance(value, Tensor) or not _is_plain(value) or not 1 < value.dim() <= weight.dim():
        return False
    if not all(length in (1, size) for length, size in zip(value.shape[::-1], weight.shape[::-1], strict=False)):
        return False
    # Ones alone mask nothing, and may as well be factors with their initial values.
    ones = value == 1
    return bool(ones.any() and not ones.all() and (ones | (value == 0)).all())


def _computation(source: Tensor, ending: str, factor: object, masks: list[Any]) -> Callable[[], Tensor] | None:
    """A function that computes a weight from entries of a state dict; None if it is unknown how."""
    if ending == ".weight":
        return partial(reduce, torch.mul, [source, *masks])
    # The weights of spectral_norm and of custom parametrizations have no factor.
    if not isinstance(factor, Tensor):
        return None
    if ending == ".weight_orig":
        return partial(reduce, torch.mul, [source, factor, *masks]) if factor.shape == source.shape else None
    along = [length in (1, size) for length, size in zip(factor.shape, source.shape, strict=False)]
    fits = factor.dim() == 0 or (factor.dim() == source.dim() and all(along) and factor.shape != source.shape)
    return partial(_normed, source, factor, *masks) if fits else None


def _normed(direction: Tensor, length: Tensor, *masks: Tensor) -> Tensor:
    """The result of weight_norm: the direction with its slices scaled to norms of that length, times the masks."""
    axes = [axis for axis in range(direction.dim()) if length.dim() == 0 or length.shape[axis] == 1]
    factors: list[Tensor] = [direction, length / torch.linalg.vector_norm(direction, dim=axes, keepdim=True), *masks]
    return reduce(torch.mul, factors)


def _transposed_groups(weight: Tensor, bias: object) -> int:
    """Groups of a transposed convolution, if the length of the bias shows that it is one; else 0."""
    if not isinstance(bias, Tensor) or bias.dim() != 1 or len(bias) == weight.shape[0] or 0 in weight.shape:
        return 0
    groups, rest = divmod(len(bias), weight.shape[1])
    return groups if groups and not rest and weight.shape[0] % groups == 0 else 0
