"""Copies of weights that are no longer equal to them after layers were treated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from convsim_init.functional.dtypes import converts
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.layer import Layer
from convsim_init.layers.memory import memories
from convsim_init.layers.names import bare_name, unwrap
from convsim_init.layers.obstacle import KEPT
from convsim_init.layers.remarks import named_tensors
from convsim_init.layers.weights import KERNEL_RANKS
from convsim_init.report.text import layer_name, shown, some


@holding_weights_lock()
@torch.no_grad()
def watch_copies(model: nn.Module | Mapping[str, object], layers: Sequence[Layer]) -> Callable[[], list[str]]:
    """A function for remarks, after layers were treated, on copies of their weights that are no longer equal to them.

    Copies may be frozen or loaded layers, such as momentum encoders, layers treated with other settings, parameters,
    buffers, and tensors in attributes, such as averages of weights; in a state dict any entry.
    """
    treated: list[tuple[str, Tensor]] = []
    copies: list[tuple[str, Tensor]] = []
    for layer in layers:
        source = layer.weight.sources[0]
        if layer.obstacle is None:
            treated.append((layer_name(layer.name), source))
            copies.append((layer_name(layer.name), source))
        elif layer.is_left_for(*KEPT) and len(memories(layer.weight.sources)) == len(layer.weight.sources):
            copies.append((layer_name(layer.name), source))
    known = {id(tensor) for layer in layers for tensor in layer.weight.storage().values()}
    for name, tensor in named_tensors(unwrap(model)) if isinstance(model, nn.Module) else model.items():
        if not isinstance(tensor, Tensor) or id(tensor) in known:
            continue
        # In this order, because a lazy tensor raises an error if asked for its rank.
        if memories([tensor]) and tensor.dim() in KERNEL_RANKS:
            copies.append((shown(bare_name(name)), tensor))
            known.add(id(tensor))
    copies = [(name, copy) for name, copy in copies if copy.is_floating_point() and converts(copy.dtype)]
    originals = defaultdict[tuple[object, ...], list[tuple[str, Tensor]]](list)
    for dtype, (name, source) in product({copy.dtype for _, copy in copies}, treated):
        originals[_start(source, dtype)].append((name, source))
    twins = []
    for name, copy in copies:
        # The original of a tensor is the first treated layer that is equal to it. It may be that tensor itself.
        for original, source in originals[_start(copy, copy.dtype)]:
            if source is copy or _same(copy, source):
                twins += [(name, copy, original, source)] if source is not copy else []
                break
    return lambda: copies_remark([(name, of) for name, copy, of, source in twins if not _same(copy, source)])


def _start(tensor: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    """What a tensor has in common with its copies of that dtype, and with few others: its first numbers, and more."""
    first = tensor[(slice(2),) * tensor.dim()].to(dtype)
    return tensor.device, tensor.shape, dtype, *first.flatten().tolist()


def copies_remark(parted: Sequence[tuple[str, str]]) -> list[str]:
    """A remark on copies that are no longer equal, from the names of the copies and their originals."""
    if not parted:
        return []
    names = some(f"{copy} (of {original})" for copy, original in parted)
    return [f"copies that are no longer equal to what they were copied from: {names}: copy them again"]


def _same(copy: Tensor, original: Tensor) -> bool:
    return torch.equal(copy, original.to(copy.dtype))
