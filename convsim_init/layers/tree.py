"""The modules, parameters and buffers inside a module, read from the attributes in which `torch.nn` keeps them.

The methods of PyTorch for this call each other on the modules inside, whose classes may use their names otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, nn


def named_modules(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """A module and all inside it, each before its children, with dotted names; each once, if duplicates are removed."""
    # By ids, because modules of a class with its own `__eq__` have no hash, or are equal to each other.
    seen, pending = set[int](), [("", module)]
    while pending:
        name, part = pending.pop()
        if id(part) in seen and remove_duplicate:
            continue
        seen.add(id(part))
        yield name, part
        # Reversed, so that the first child is on top of the stack.
        pending += [(f"{name}.{key}".lstrip("."), child) for key, child in reversed([*named_children(part)])]


def modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all inside it, each once."""
    return (part for _, part in named_modules(module))


def named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module, with their names."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


def named_parameters(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module and of all inside it, with dotted names; each once, if duplicates are removed."""
    return _tensors(module, "_parameters", remove_duplicate)


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module and of all inside it, each once."""
    return (parameter for _, parameter in named_parameters(module))


def named_buffers(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a module and of all inside it, with dotted names; each once, if duplicates are removed."""
    return _tensors(module, "_buffers", remove_duplicate)


def buffers(module: nn.Module) -> Iterator[Tensor]:
    """The buffers of a module and of all inside it, each once."""
    return (buffer for _, buffer in named_buffers(module))


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether a module has that attribute; errors of its own ``__getattr__`` count as no."""
    with suppress(Exception):
        # The default cannot be None, which is a value that an attribute may have.
        return getattr(module, name, module) is not module
    return False


def _tensors(module: nn.Module, kind: str, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
    seen = set[int]()
    for name, part in named_modules(module, remove_duplicate=remove_duplicate):
        for key, tensor in getattr(part, kind).items():
            if isinstance(tensor, Tensor) and not (id(tensor) in seen and remove_duplicate):
                seen.add(id(tensor))
                yield f"{name}.{key}".lstrip("."), tensor
