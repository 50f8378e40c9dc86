"""Convolutional Similarity by direct loops over its definition: the ground truth that fast code is compared with."""

import itertools

import torch
from torch import Tensor


def convolutional_similarity(
    weight: Tensor, *, pairs="all", channels="matched", groups=1, transposed=False, normalized=False
) -> Tensor:
    """The sum (or, normalized, the mean) over filter pairs of `pair_similarity`, one pair at a time."""
    filters = split_filters(weight, groups, transposed)
    similarities = []
    for (i, (group_i, a)), (j, (group_j, b)) in itertools.combinations(enumerate(filters), 2):
        if channels == "matched" and group_i != group_j:
            continue
        if pairs == "adjacent" and j != i + 1:
            continue
        similarity = pair_similarity(a, b, channels)
        if normalized:
            energies = a.square().sum() * b.square().sum()
            if energies == 0:
                continue
            similarity = similarity / energies
        similarities.append(similarity)
    if not similarities:
        return weight.sum() * 0
    return sum(similarities) / (len(similarities) if normalized else 1)


def split_filters(weight: Tensor, groups: int, transposed: bool) -> list[tuple[int, Tensor]]:
    """Every filter ``[C, *kernel_size]`` of the layer in order, with the number of its group."""
    filters = []
    for group, part in enumerate(weight.chunk(groups, dim=0)):
        along = 1 if transposed else 0
        filters += [(group, part.select(along, i)) for i in range(part.shape[along])]
    return filters


def pair_similarity(a: Tensor, b: Tensor, channels: str) -> Tensor:
    """CS of two filters: energies of the cross-correlations of their kernels, at every shift."""
    total = torch.zeros((), dtype=a.dtype)
    for c, d in itertools.product(range(a.shape[0]), repeat=2):
        if channels == "all" or c == d:
            for shift in itertools.product(*(range(1 - k, k) for k in a.shape[1:])):
                total = total + correlation_at(a[c], b[d], shift) ** 2
    return total


def correlation_at(a: Tensor, b: Tensor, shift: tuple[int, ...]) -> Tensor:
    """Inner product of ``a`` with ``b`` moved by ``shift``, over the taps where they overlap."""
    in_a = tuple(slice(max(0, s), k + min(0, s)) for s, k in zip(shift, a.shape, strict=True))
    in_b = tuple(slice(max(0, -s), k + min(0, -s)) for s, k in zip(shift, a.shape, strict=True))
    return (a[in_a] * b[in_b]).sum()
