"""What the code of modules around convolutions says of their weights: whether it reads or changes them, and which."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress

from torch import nn
from torch.nn.modules.conv import _ConvNd

from convsim_init.layers import tree
from convsim_init.layers.code.changes import ARGUMENT
from convsim_init.layers.code.held import held_by
from convsim_init.layers.code.reading import forward_code, hook_code


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether a module has it, whatever its own ``__getattr__`` raises where it has not."""
    with suppress(Exception):
        return getattr(module, name, module) is not module
    return False


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a convolution of torch.ao whose weight is packed: of integers, and no parameter."""
    return has_attribute(module, "kernel_size") and has_attribute(module, "_packed_params")


def reads_weight(owner: nn.Module, name: str) -> bool:
    """Whether the forward pass of a module makes something of the weight of a convolution inside it, of that name.

    What is read of a variable may be of any, if a convolution is called.
    """
    code = forward_code(owner)
    others = dict(tree.named_children(owner)).keys() - {name}
    if has_attribute(owner, "weight"):
        others |= code.selves
    return any(read == name or (code.convolves and read not in others) for read in code.weights_read)


def alters_weight(owner: nn.Module, name: str) -> bool:
    """Whether the forward pass of a module may change the weight of a convolution inside it, of that name."""
    return forward_code(owner).alters({name.partition(".")[0]}, dict(tree.named_children(owner)).keys())


def hooks_alter(owner: nn.Module) -> bool:
    """Whether a hook before the forward pass of a module may change weights."""
    return any(hook_code(hook).altered for hook in owner._forward_pre_hooks.values())


def reads_further_inside(module: nn.Module) -> bool:
    """Whether a forward pass seems to read or change weights of convolutions that are no children of the module."""
    code = forward_code(module)
    if not (code.walks or code.altered or code.weights_read):
        return False
    inside = {
        name
        for name, one in tree.named_modules(module)
        if isinstance(one, _ConvNd) and name and not _is_direct(module, name)
    }
    children = dict(tree.named_children(module)).keys()
    beyond = not code.weights_read <= children | code.selves | {"self"}
    if (beyond or code.altered) and any(kept_outside(module, set(map(id, tree.modules(module))))):
        return True
    last = {name.rpartition(".")[2] for name in inside}
    alters = code.alters({name.partition(".")[0] for name in inside}, children)
    loops = code.convolves and beyond  # over a sequence of them, perhaps
    return bool(inside) and (code.walks or alters or loops or not last.isdisjoint(code.weights_read))


def kept_outside(module: nn.Module, known: Collection[int]) -> Iterator[str]:
    """Attributes that a forward pass names and that hold convolutions other than the known ones, given by their ids."""
    for name, values in held_by(module).items():
        kept = (part for one in values if isinstance(one, nn.Module) for part in tree.modules(one))
        others = any(isinstance(one, _ConvNd) and id(one) not in known for one in kept)
        if others and name in forward_code(module).names:
            yield name


def hooks_elsewhere(module: nn.Module) -> bool:
    """Whether a hook of a module may change weights where no trial pass of the module shows it.

    Those are weights of others and, as after its forward pass, such that a later one uses.
    """
    before, after = (
        [what for hook in hooks.values() for what in hook_code(hook).altered]
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    )
    inside = bool(after) and any(isinstance(one, _ConvNd) for one in tree.modules(module))
    return inside or any(ARGUMENT not in what for what in (*before, *after))


def _is_direct(module: nn.Module, name: str) -> bool:
    """Whether a part of a module lies in nothing but its lists."""
    above = name.rpartition(".")[0]
    return not above or (
        isinstance(module.get_submodule(above), (nn.ModuleList, nn.ModuleDict)) and _is_direct(module, above)
    )
