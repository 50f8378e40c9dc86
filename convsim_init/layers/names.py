"""Modules, names of layers and keys of state dicts without what wrappers add to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain

from torch import nn

from convsim_init.errors import InputError
from convsim_init.layers import tree

PARALLEL_PREFIX = "module."
WRAPPER_PARTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # compiled, recomputed, sharded
# All children of a wrapper of torch.compile and of one of Lightning Fabric: the wrapped module is the first.
WRAPPERS_CHILDREN = (("_orig_mod",), ("_forward_module", "_original_module"))

WEIGHT_KEY = re.compile(r"(.*)(\.(?:weight(?:_[guv]|_orig|_mask)?|parametrizations\.weight\..*))", re.DOTALL)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers of DistributedDataParallel, DataParallel, torch.compile and Lightning Fabric."""
    while True:
        # A custom __getattr__ may answer any other name, or raise any error.
        held = (getattr(model, kind, {}).items() for kind in ("_modules", "_parameters", "_buffers"))
        parts = dict(chain.from_iterable(held))
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif tuple(parts) in WRAPPERS_CHILDREN and _wraps(children := list(parts.values())):
            model = children[0]  # beside which there is nothing else that would be lost
        else:
            return model


def _wraps(children: Sequence[object]) -> bool:
    """Whether the first of some children is a module in which all of them are."""
    inside = set(map(id, tree.modules(children[0]))) if isinstance(children[0], nn.Module) else set()
    return inside.issuperset(map(id, children))


def bare_name(name: str) -> str:
    """A dotted name without the parts that torch.compile, activation checkpointing and FSDP add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def split_weight_key(key: str) -> tuple[str, str] | None:
    """The layer's name and the ending of a key, such as ``.weight``; None if it is no key of a layer's weight.

    It may also be the key of a tensor that weight_norm, spectral_norm, pruning or a parametrization computes it from.
    """
    # The dot in front makes `weight` the key of the layer without a name, and lets `my_weight` not match.
    match = WEIGHT_KEY.fullmatch(f".{key}")
    return (match[1][1:], match[2]) if match else None


def bare_entries(state: Mapping[str, object], *, parallel: bool = True) -> dict[str, object]:
    """The entries of a state dict under bare names.

    If `parallel`, a ``module.`` before every key counts as DistributedDataParallel's. It may also be a child of that
    name, which a state dict does not show.

    Raises:
        InputError: If a key is no string, or two of them have the same bare name.
    """
    strange = [key for key in state if not isinstance(key, str)]
    if strange:
        raise InputError(f"expected the state dict's keys to be strings, got {strange[0]!r}")
    entries = {bare_name(key): value for key, value in state.items()}
    # A loop, because wrappers may hold wrappers. For an empty dict `all` is true, and the loop would not end.
    while parallel and entries and all(key.startswith(PARALLEL_PREFIX) for key in entries):
        entries = {key.removeprefix(PARALLEL_PREFIX): value for key, value in entries.items()}
    if len(entries) < len(state):
        parts = " or ".join(f"'{part}'" for part in WRAPPER_PARTS if any(part in key.split(".") for key in state))
        raise InputError(
            f"expected keys that differ in more than {parts}, got {len(state)} keys for {len(entries)} tensors: "
            f"save the unwrapped model's state_dict()"
        )
    return entries
