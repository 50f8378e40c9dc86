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

COMPUTED = {  # the key's ending of what a weight is computed from, and the entry that it is multiplied by
    ".parametrizations.weight.original1": "parametrizations.weight.original0",  # weight_norm, new and old
    ".parametrizations.weight.original": "",
    ".weight_v": "weight_g",
    ".weight_orig": "weight_mask",  # pruning; of spectral_norm there is no mask
}
ENDINGS = (*COMPUTED, ".weight")  # of several the first is what is used: others are left over
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
ROTATIONS = (4, 8)  # by right angles, and their mirror images
USUAL_EXTENT = 7  # of a kernel; longer ones want a bias or a norm layer as evidence
FEW = 32  # numbers, of which the mean says nothing
OTHER_NAMES = ("bilinear", "expert", "codebook")


def infer_layers(state: Mapping[str, object]) -> Iterator[Layer]:
    """The tensors of rank 3 to 5 whose keys end in ``weight``, or in what its source is called where it is computed.

    A transposed convolution gives itself away where its bias, or without one the norm layer that is next beside it, is
    not as long as dimension 0 of its weight; one group per filter shows in a dimension 1 of length 1. Other groups
    cannot be seen. What pruning, masks and weight_norm compute can be read from the state dict but not set there; a
    ``weight`` beside what it is computed from is a stale one.
    """
    # A lazy or a nested tensor has no shape, and raises an error when it is asked for it.
    state = {
        key: one for key, one in state.items() if not (isinstance(one, Tensor) and (is_lazy(one) or one.is_nested))
    }
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
        # Pruning's own mask is the factor already, and would be multiplied by twice.
        mask = next((one for one in near if state[one] is not factor and _masks(state[one], value)), "")
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
        # Only as many as dimension 1: another length may be that of what is concatenated before the norm layer.
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
    """Whether a tensor may as well be no convolution's weight, or one in another library's layout.

    Sparse and channels-last layouts put the kernel before the channels, ``[M, k, k, k, C]`` or
    ``[k, k, k, C, M]``; bilinear layers and stacked experts have matrices where a kernel would be, group convolutions
    rotations where its depth would be, and the factors of a norm over images are all about 1.
    """
    inputs, extents = weight.shape[1], weight.shape[2:]
    has_bias = isinstance(bias, Tensor) and bias.dim() == 1 and len(bias) in weight.shape[:2]
    if isinstance(bias, Tensor) and not (has_bias or _transposed_groups(weight, bias)):
        return True  # as that of a layer norm over images, or of stacked linear layers
    if any(word in name.lower() for word in OTHER_NAMES):
        return True
    if _looks_channels_last(weight.shape):
        return True  # [M, k, k, C]
    if len(extents) == 3 and extents[0] in ROTATIONS and extents[1] == extents[2] in (3, 5, 7):
        return True  # [M, C, rotations, k, k] of a group convolution
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
    if len(extents) > 1 and len(set(extents)) > 1 and min(weight.shape[:2]) == min(extents) < max(extents):
        return True  # [k, k, C, M]
    square = len(extents) == 1 and inputs == extents[0]  # as a bilinear layer of equal inputs
    return square or not (has_bias or inputs == 1 or (len(extents) > 1 and extents[-1] == extents[-2]))


def _stacked(state: Mapping[str, object]) -> set[int]:
    """How many models lie in one another's stacks, as those of `torch.func.stack_module_state`: their biases tell it.

    Those, and a norm layer's statistics, are then of rank 2, and as long as what the module has beside them.
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
    """How long the norm layer is that comes next beside a module, by the module's name, where that is one."""
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
    """Whether some of the weights in a file can only be of that layout, and none is surely of PyTorch's."""
    if _is_chain([shape for shape in shapes if len(shape) == 3]):
        return True
    foreign = [_looks_channels_last(shape) for shape in shapes]
    # In channels-last layout dimension 1 is an extent: long or unlike all others it is channels.
    own = (len(shape) > 3 and (shape[1] > USUAL_EXTENT or shape[1] not in (1, *shape[2:])) for shape in shapes)
    return any(foreign) and not any(mine and not other for mine, other in zip(own, foreign, strict=True))


def _is_chain(shapes: Sequence[torch.Size]) -> bool:
    """Whether ``[M, k, C]`` is what 1-D weights are: short in the middle, then as long as one before has filters.

    In PyTorch's layout kernels would be as long as another layer has filters, and no layer would take those.
    """
    short = all(shape[1] <= USUAL_EXTENT < shape[2] for shape in shapes)
    following = [(shape, shapes[:index]) for index, shape in enumerate(shapes) if index]
    taken = [shape[1] > 2 and shape[2] in [one[0] for one in before] for shape, before in following]
    return short and len(set(shapes)) > 1 and all(taken)  # equal ones may stand side by side


def _looks_channels_last(shape: torch.Size) -> bool:
    return len(shape) > 3 and shape[1] == shape[2] != shape[-1] and len(set(shape[2:-1])) == 1


def _is_far_from_zero(weight: Tensor) -> bool:
    """Whether the mean of the numbers, if they can be read, is above their standard deviation."""
    if not (_is_plain(weight) and weight.is_floating_point()) or weight.numel() < FEW:
        return False
    deviation, mean = torch.std_mean(weight.detach().double())
    return bool(mean > deviation)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers can be read."""
    known = type(tensor) in (Tensor, Parameter) and not tensor.is_meta and tensor.layout is torch.strided
    return known and converts(tensor.dtype)


def _named_masks(state: Mapping[str, object], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """By a weight's key that of its mask in another module, as ``masks.conv1`` and ``conv1_mask`` are of ``conv1``."""
    owners = {_words(key): key for key in weights if "mask" not in key}
    found = {owners.get(_words(key), ""): key for key in state if "mask" in key}
    return {key: mask for key, mask in found.items() if key and _masks(state[mask], weights[key])}


def _words(key: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[._]+", key) if word not in ("mask", "masks", "weight"))


def _masks(value: object, weight: Tensor) -> bool:
    """Whether it holds zeros and ones, both of them and nothing else, for a weight or for each of its kernels."""
    if not isinstance(value, Tensor) or not _is_plain(value) or not 1 < value.dim() <= weight.dim():
        return False
    if not all(own in (1, size) for own, size in zip(reversed(value.shape), reversed(weight.shape), strict=False)):
        return False
    # All ones hide nothing, and are as likely a factor that is still at its start.
    ones = value == 1
    return bool(ones.any() and not ones.all() and (ones | (value == 0)).all())


def _computation(source: Tensor, ending: str, factor: object, masks: list[Any]) -> Callable[[], Tensor] | None:
    """What computes a weight from entries of a state dict; None if it is not known here."""
    if ending == ".weight":
        return partial(reduce, torch.mul, [source, *masks])
    # What is computed by spectral_norm, or by a parametrization of somebody's own, has no factor.
    if not isinstance(factor, Tensor):
        return None
    if ending == ".weight_orig":
        return partial(reduce, torch.mul, [source, factor, *masks]) if factor.shape == source.shape else None
    along = [own in (1, size) for own, size in zip(factor.shape, source.shape, strict=False)]
    fits = factor.dim() == 0 or (factor.dim() == source.dim() and all(along) and factor.shape != source.shape)
    return partial(_normed, source, factor, *masks) if fits else None


def _normed(direction: Tensor, length: Tensor, *masks: Tensor) -> Tensor:
    """What weight_norm computes: a direction whose slices, along the dimensions of the length, have that norm."""
    axes = [axis for axis in range(direction.dim()) if length.dim() == 0 or length.shape[axis] == 1]
    factors: list[Tensor] = [direction, length / torch.linalg.vector_norm(direction, dim=axes, keepdim=True), *masks]
    return reduce(torch.mul, factors)


def _transposed_groups(weight: Tensor, bias: object) -> int:
    """Groups of the transposed convolution that a bias shows; 0 where it shows none."""
    if not isinstance(bias, Tensor) or bias.dim() != 1 or len(bias) == weight.shape[0] or 0 in weight.shape:
        return 0
    groups, rest = divmod(len(bias), weight.shape[1])
    return groups if groups and not rest and weight.shape[0] % groups == 0 else 0
