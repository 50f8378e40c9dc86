"""What the bytecode of a single function names, told alike for every version of Python (3.10 to 3.13 were tried)."""

from __future__ import annotations

import dis
import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

ASKED = {"dtype", "device", "shape", "size", "ndim", "dim", "is_cuda", "data_ptr", "requires_grad"}


class Step(NamedTuple):
    """One thing that code does: an instruction, or half of one that loads or stores twice (since Python 3.13).

    Attributes:
        kind: Name of the instruction.
        name: What it names.
        effect: By how much the stack grows.
        number: The number that it takes, such as that of arguments.
        sign: An operator's.
        at: Where it is in the code.
        target: Where it may go on instead; None if nowhere.
        effect_there: By how much the stack grows then.
    """

    kind: str
    name: Any
    effect: int
    number: int = 0
    sign: str = ""
    at: int = -1
    target: int | None = None
    effect_there: int = 0


def texts(code: CodeType) -> set[str]:
    """The names of attributes and functions in code, and strings that may be names."""
    constants = [each for one in code.co_consts for each in (one if isinstance(one, tuple) else (one,))]
    return {*code.co_names, *(one for one in constants if isinstance(one, str) and one.isidentifier())}


@lru_cache(maxsize=64)
def steps(code: CodeType) -> tuple[Step, ...]:
    """What code does, in the order in which it is written down."""
    return tuple(_steps(code))


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


def global_names(code: CodeType) -> list[str]:
    """The names of which code takes the global value."""
    return list(dict.fromkeys(step.name for step in steps(code) if step.kind in ("LOAD_GLOBAL", "LOAD_NAME")))


def _steps(code: CodeType) -> Iterator[Step]:
    for one in dis.get_instructions(code):
        kinds = re.findall(r"(?:LOAD|STORE)_FAST(?:_BORROW|_CHECK|_AND_CLEAR)?", one.opname)
        if len(kinds) == 2 and isinstance(one.argval, tuple):
            for kind, name in zip(kinds, one.argval, strict=True):
                yield Step(kind, name, 1 if kind.startswith("LOAD") else -1)
        elif one.opname not in ("CACHE", "PRECALL"):  # what the latter takes off is counted with the call behind it
            number = one.arg if one.opcode >= dis.HAVE_ARGUMENT else None
            effect, there = (dis.stack_effect(one.opcode, number, jump=jump) for jump in (False, True))
            jumps = one.opcode in dis.hasjrel or one.opcode in dis.hasjabs
            target = one.argval if jumps else None
            yield Step(one.opname, one.argval, effect, one.arg or 0, one.argrepr, one.offset, target, there)


def names_convolution(code: CodeType, own: Collection[object], calls: Collection[str]) -> bool:
    """Whether code names a function that convolves.

    Args:
        code: The code.
        own: What it calls its module, whose attributes of such names are modules, perhaps.
        calls: The names of such functions.
    """
    root: object = None  # of the attributes that are loaded: a variable, or a name of the module
    asked = made = False
    for kind, name, *_ in steps(code):
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
    found, known = set[str | None](), steps(code)
    for index, step in enumerate(known[1:-1], 1):
        if step.name == "weight" and step.kind.startswith("LOAD") and known[index + 1].name not in ASKED:
            subscript = known[index - 1].kind.startswith("BINARY_")
            of = known[index - 2 if subscript and index > 1 else index - 1].name
            found.add(None if of is None else str(of))
    return found


def asked_of_bases(code: CodeType, bases: Iterable[type]) -> set[str]:
    """The names that code looks up by ``super()``, or on a class that it names."""
    owners = {"super", *(base.__name__ for base in bases)}
    found, asking = set[str](), False
    for kind, name, *_ in steps(code):
        if kind == "LOAD_SUPER_ATTR" or (asking and kind in ("LOAD_ATTR", "LOAD_METHOD")):
            found.add(str(name))
            asking = False
        elif kind in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME"):
            asking = asking or name in owners
    return found
