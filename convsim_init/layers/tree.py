"""What a module is made of, told from where `torch.nn` keeps it.

The methods of PyTorch that would tell call each other on the modules inside, whose classes may have something else by
such a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, nn


def named_modules(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """A module and all inside it, each before its children, with dotted names; once each, unless told otherwise."""
    # By ids, as modules of a class with an `__eq__` of its own have no hash, or equal each other.
    seen, pending = set[int](), [("", module)]
    while pending:
        name, one = pending.pop()
        if id(one) in seen and remove_duplicate:
            continue
        seen.add(id(one))
        yield name, one
        # Children go on the stack from the last, as what is put on it last comes off first.
        pending += [(f"{name}.{key}".lstrip("."), child) for key, child in reversed([*named_children(one)])]


def modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all inside it, once each."""
    return (one for _, one in named_modules(module))


def named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a module holds itself, with their names."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


def named_parameters(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module and of all inside it, with dotted names; once each, unless told otherwise."""
    return _tensors(module, "_parameters", remove_duplicate)


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module and of all inside it, once each."""
    return (one for _, one in named_parameters(module))


def named_buffers(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a module and of all inside it, with dotted names; once each, unless told otherwise."""
    return _tensors(module, "_buffers", remove_duplicate)


def buffers(module: nn.Module) -> Iterator[Tensor]:
    """The buffers of a module and of all inside it, once each."""
    return (one for _, one in named_buffers(module))


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether a module has it, whatever its own ``__getattr__`` raises where it has not."""
    with suppress(Exception):
        # The default is not None, as an attribute that is None is there.
        return getattr(module, name, module) is not module
    return False


def _tensors(module: nn.Module, kind: str, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
    seen = set[int]()
    for name, one in named_modules(module, remove_duplicate=remove_duplicate):
        for key, tensor in getattr(one, kind).items():
            if tensor is not None and not (id(tensor) in seen and remove_duplicate):
                seen.add(id(tensor))
                yield f"{name}.{key}".lstrip("."), tensor
