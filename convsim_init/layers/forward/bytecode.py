"""What the bytecode of a single function names, told alike for every version of Python (3.10 to 3.13 were tried)."""

from __future__ import annotations

import dis
import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

LOOP = "<loop>"  # stands for the variable of a loop
ASKED = {"dtype", "device", "shape", "size", "ndim", "dim", "is_cuda", "data_ptr", "requires_grad"}


def texts(code: CodeType) -> set[str]:
    """The names of attributes and functions in code, and strings that may be names."""
    return {*code.co_names, *(one for one in code.co_consts if isinstance(one, str) and one.isidentifier())}


def _steps(code: CodeType) -> Iterator[tuple[str, Any]]:
    """The instructions of code and what they name; those of two loads or stores, since Python 3.13, as two."""
    for step in dis.get_instructions(code):
        kinds = re.findall(r"(?:LOAD|STORE)_FAST(?:_BORROW|_CHECK|_AND_CLEAR)?", step.opname)
        if len(kinds) == 2 and isinstance(step.argval, tuple):
            yield from zip(kinds, step.argval, strict=True)
        elif step.opname != "CACHE":
            yield step.opname, step.argval


@lru_cache(maxsize=10_000)
def unpacked(code: CodeType, position: int) -> int:
    """How many values are unpacked at a position or right after it, as 2 of ``height, width = x.shape``; 1 if none."""
    for step in dis.get_instructions(code):
        if step.offset >= position and step.opname != "CACHE":
            if step.opname == "UNPACK_SEQUENCE":
                return int(step.argval)
            if step.opname == "UNPACK_EX":
                return int(step.argval & 255) + int(step.argval >> 8)
            if step.offset > position:
                break
    return 1


def changed_in_place(code: CodeType) -> set[str]:
    """Of what code calls a method that ends in an underscore, or sets items or ``data``: attributes and loop variables.

    Loop variables, whatever they are called, are `LOOP`.
    """
    found, chain, loops, looping = set[str](), list[str](), set[object](), False
    for kind, name in _steps(code):
        if kind.startswith("STORE_FAST") and looping:
            loops.add(name)
        looping = kind == "FOR_ITER" or (looping and kind.startswith(("UNPACK", "STORE_FAST")))
        if kind.startswith("LOAD_FAST"):
            chain = [LOOP] if name in loops else []
        elif kind in ("LOAD_ATTR", "LOAD_METHOD"):
            if name.endswith("_") and not name.startswith("_") and name != "requires_grad_":
                found.update(chain)
            chain.append(name)
        elif kind.startswith(("CALL", "PRECALL")):
            chain = []
        elif kind == "STORE_ATTR" and name in ("data", "weight"):
            found.update([*chain, name])
        elif kind in ("STORE_SUBSCR", "STORE_SLICE") and chain[-1:] == ["weight"]:
            found.add("weight")
        elif kind in ("LOAD_GLOBAL", "LOAD_DEREF"):
            chain = []
    return found


def names_convolution(code: CodeType, own: Collection[object], calls: Collection[str]) -> bool:
    """Whether code names a function that convolves.

    Args:
        code: The code.
        own: What it calls its module, whose attributes of such names are modules, perhaps.
        calls: The names of such functions.
    """
    root: object = None  # of the attributes that are loaded: a variable, or a name of the module
    asked = made = False
    for kind, name in _steps(code):
        local = kind.startswith(("LOAD_FAST", "LOAD_DEREF"))
        if not (local or kind in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")):
            continue
        if local or kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            root = name if local else None
        if name in calls and not local and (root not in own or name == "_conv_forward"):
            return True
        made |= asked and root is None  # such as getattr(F, f"conv{rank}d")
        asked = name == "getattr"
    return made and any(isinstance(one, str) and one.startswith("conv") for one in code.co_consts)


def weights_read(code: CodeType) -> set[str | None]:
    """Of what code reads the attribute ``weight``: names, of an item its index; None of anything else.

    Its dtype, device and shape do not count.
    """
    found, steps = set[str | None](), list(_steps(code))
    for index, (opcode, attribute) in enumerate(steps[1:-1], 1):
        if attribute == "weight" and opcode.startswith("LOAD") and steps[index + 1][1] not in ASKED:
            subscript = steps[index - 1][0].startswith("BINARY_")
            of = steps[index - 2][1] if subscript and index > 1 else steps[index - 1][1]
            found.add(None if of is None else str(of))
    return found


def asked_of_bases(code: CodeType, bases: Iterable[type]) -> set[str]:
    """The names that code looks up by ``super()``, or on a class that it names."""
    owners = {"super", *(base.__name__ for base in bases)}
    found, asking = set[str](), False
    for kind, name in _steps(code):
        if kind == "LOAD_SUPER_ATTR" or (asking and kind in ("LOAD_ATTR", "LOAD_METHOD")):
            found.add(str(name))
            asking = False
        elif kind in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME"):
            asking = asking or name in owners
    return found
