"""The convolutions of a state dict, told by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.parameter import is_lazy

KERNEL_RANKS = (1, 2, 3)
COMPUTED = (".weight_v", ".weight_orig", ".parametrizations.weight.original", ".parametrizations.weight.original1")
BY_SHAPE = "taken from its shape for a convolution without groups, not transposed"
BY_BIAS = "taken from the length of its bias for a transposed convolution"
DEPTHWISE = "looks depthwise, by its shape alone"


@dataclass(frozen=True)
class Entry:
    """One convolution of a state dict.

    Attributes:
        name: Of the layer: the key without its last part.
        kind: Class it is taken for.
        weight: Under its key.
        groups: Groups it is taken to have.
        transposed: Whether it is taken for a transposed convolution.
        note: What all this was told from.
        obstacle: Why it cannot be used, whatever the tensor holds.
    """

    name: str
    kind: str
    weight: Tensor
    groups: int = 1
    transposed: bool = False
    note: str = BY_SHAPE
    obstacle: str | None = None


def find_entries(state: Mapping[str, object]) -> Iterator[Entry]:
    """The tensors of rank 3 to 5 whose keys end in ``weight``, or in what parametrizations call the source of one.

    A transposed convolution gives itself away where its bias is not as long as dimension 0 of its weight; one group per
    filter shows in a dimension 1 of length 1. Other groups cannot be seen.
    """
    for key, value in state.items():
        name, computed = _owner(str(key))
        if name is None or not isinstance(value, Tensor) or is_lazy(value) or value.dim() - 2 not in KERNEL_RANKS:
            continue
        kind, bias = f"Conv{value.dim() - 2}d", state.get(f"{str(key).removesuffix('weight')}bias")
        if computed:
            obstacle = "parametrized: its weight is computed from what the state dict holds; use the model itself"
            yield Entry(name, kind, value, obstacle=obstacle)
        elif groups := _transposed_groups(value, bias):
            yield Entry(name, kind.replace("Conv", "ConvTranspose"), value, groups, True, BY_BIAS)
        elif value.shape[0] > 1 and value.shape[1] == 1:
            yield Entry(name, kind, value, value.shape[0], note=DEPTHWISE)
        else:
            yield Entry(name, kind, value)


def _transposed_groups(weight: Tensor, bias: object) -> int:
    """Groups of the transposed convolution that a bias shows; 0 where it shows none."""
    if not isinstance(bias, Tensor) or bias.dim() != 1 or len(bias) == weight.shape[0] or 0 in weight.shape:
        return 0
    groups, rest = divmod(len(bias), weight.shape[1])
    return groups if groups and not rest and weight.shape[0] % groups == 0 else 0


def _owner(key: str) -> tuple[str | None, bool]:
    """The layer that a weight stands for under that key, and whether that layer computes its weight from it."""
    dotted = f".{key}"
    for ending in COMPUTED:
        if dotted.endswith(ending):
            return dotted.removesuffix(ending)[1:], True
    return (dotted.removesuffix(".weight")[1:], False) if dotted.endswith(".weight") else (None, False)
