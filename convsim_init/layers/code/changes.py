"""What the code of a function changes in place: its bytecode is followed, with names in place of values."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CodeType
from typing import NamedTuple

from convsim_init.layers.code.bytecode import Step, steps

ARGUMENT = "<argument>"  # of a function, of which nothing is known
ENCLOSED = "<enclosed>"  # by the function, from one around it; with its name there
ITERATED = "<iterated>"  # by a comprehension, which is code of its own before Python 3.12
REPLACED = "<replaced>"  # by such a call, or setattr
RESULT = "<result>"  # of a call of which nothing is known
GLOBAL = "<global>"  # such as torch itself
ITEM = "<item>"  # of what a loop goes through
LIST = "<list>"  # is made here: what is done to it is not done to what it holds
HANDED_OUT = {"weight", "parameters", "named_parameters", "state_dict", "_parameters"}  # take weights out of modules
WALKS = {"modules", "named_modules", "children", "named_children", "apply"}
REPLACING = {"functional_call", "load_state_dict", "vector_to_parameters"}  # give a module other weights
SAME = {  # functions and methods that return what they are given, a part of it, or what goes through it
    *(HANDED_OUT | WALKS),
    *("list", "tuple", "dict", "iter", "next", "zip", "enumerate", "reversed", "sorted", "filter", "chain", "getattr"),
    *("items", "values", "get", "<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>"),
    *("detach", "view", "view_as", "flatten", "squeeze", "unsqueeze", "transpose", "t", "permute", "narrow", "select"),
}
ORDERING = ("COPY", "DUP_TOP", "SWAP", "ROT_TWO")
FILLING = ("LIST_APPEND", "LIST_EXTEND", "SET_ADD", "SET_UPDATE", "MAP_ADD", "DICT_UPDATE", "DICT_MERGE")
NEW = ("BINARY_", "INPLACE_", "BUILD_", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "FORMAT_", "UNARY_")
ENDS = ("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD")


class _Value(NamedTuple):
    """Something on the stack.

    Attributes:
        names: The attributes and functions that it comes from.
        last: The last of them.
    """

    names: frozenset[str] = frozenset()
    last: str = ""


_Stack = list[_Value | None]  # None is what a call finds beside a function


class _Reader:
    """Goes through the steps of code; `changed` has what it found."""

    def __init__(self, code: CodeType) -> None:
        starred = bool(code.co_flags & CO_VARARGS) + bool(code.co_flags & CO_VARKEYWORDS)
        arguments = code.co_argcount + code.co_kwonlyargcount + starred
        known = {"self", "cls"} if code.co_name != "forward" else set(code.co_varnames)
        self.variables = {name: _Value(frozenset({ENCLOSED, name})) for name in {*code.co_freevars} - known}
        for name in {*code.co_varnames[:arguments]} - known:
            self.variables[name] = _Value(frozenset({ITERATED if name == ".0" else ARGUMENT}))
        self.stack: _Stack = []
        self.changed: list[frozenset[str]] = []
        self._merging: dict[int, _Stack] = {}  # stacks where steps go on after a jump
        over = False
        for step in steps(code):
            self._arrive(step, over=over)
            there = None if step.target is None or step.target <= step.at else list(self.stack)
            self._take(step)
            if there is not None:
                self._merging.setdefault(int(step.target or 0), _resized(there, step.effect_there))
            over = step.kind.startswith(ENDS)

    def _arrive(self, step: Step, *, over: bool) -> None:
        """Go on with what the stack may be where a jump ends; what lies deep in it may have got more meanwhile."""
        other = self._merging.get(step.at)
        if over or (other is not None and len(other) == len(self.stack)):
            self.stack = list(map(_either, other or (), self.stack + [None] * len(other or ())))

    def _pop(self, count: int) -> _Stack:
        self._fill(count)
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _fill(self, count: int) -> None:
        """Put what is not known, as where an exception is handled, below what is on the stack."""
        self.stack[:0] = [_Value()] * (count - len(self.stack))

    def _take(self, step: Step) -> None:
        kind, name = step.kind, step.name
        if kind.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")):
            self.stack.append(self.variables.get(name, _Value()))
        elif kind.startswith(("STORE_FAST", "STORE_DEREF")):
            self.variables[name] = self._pop(1)[0] or _Value()
        elif kind == "LOAD_CONST":
            of_code = name.co_name if isinstance(name, CodeType) else ""
            self.stack.append(_Value(frozenset({"weight"} if name == "weight" else ()), of_code))
        elif kind in ("IMPORT_NAME", "IMPORT_FROM"):
            self._pop(1 - step.effect if kind == "IMPORT_NAME" else 0)
            self.stack.append(_Value(frozenset({GLOBAL}), str(name)))
        elif kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            self.stack += [*[None] * (step.effect - 1), _Value(frozenset({GLOBAL}), str(name))]
        elif kind in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            self._load(step)
        elif kind.startswith("CALL") and not kind.startswith("CALL_INTRINSIC"):
            called = step.number + 2 if kind in ("CALL", "CALL_METHOD") else 1 - step.effect
            self._call([one for one in self._pop(called) if one is not None])
        elif kind == "MAKE_FUNCTION":
            parts = [one for one in self._pop(1 - step.effect) if one is not None]
            self.stack.append(next((one for one in parts if one.last), _Value()))
        elif kind == "FOR_ITER":
            through = self.stack[-1] if self.stack else None
            self.stack.append(_Value((through or _Value()).names - {LIST} | {ITEM}))
        elif kind.startswith("UNPACK_"):
            self.stack += self._pop(1) * (step.effect + 1)
        elif kind in (*ORDERING, *FILLING):
            self._move(step)
        elif kind in ("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE"):
            self._store(step)
        elif kind.startswith(NEW):
            self._compute(step)
        else:
            self._pop(-step.effect)
            self.stack += [None if kind == "PUSH_NULL" else _Value()] * step.effect

    def _load(self, step: Step) -> None:
        of, name = self._pop(3 if step.kind == "LOAD_SUPER_ATTR" else 1)[-1] or _Value(), str(step.name)
        if _is_in_place(name) and not (GLOBAL in of.names and HANDED_OUT.isdisjoint(of.names)):
            self.changed.append(of.names)
        method = step.effect == (-1 if step.kind == "LOAD_SUPER_ATTR" else 1)
        self.stack += [_Value(of.names | {name}, name), *[None] * method]

    def _call(self, parts: list[_Value]) -> None:
        function, first = parts[0] if parts else _Value(), parts[1] if parts[1:] else _Value()
        name, names = function.last, _union(parts).names
        if GLOBAL in function.names and (_is_in_place(name) or name.startswith("_foreach_")):
            self.changed.append(first.names - {LIST})
        elif name in REPLACING or (name == "setattr" and "weight" in names):
            of = first.names if GLOBAL in function.names else function.names - REPLACING
            self.changed.append(of | {"weight", REPLACED})
        made = frozenset({LIST} if name in ("list", "<listcomp>") else ())
        self.stack.append(_Value((names | made) - {GLOBAL}) if name in SAME else _Value(frozenset({RESULT})))

    def _move(self, step: Step) -> None:
        """What changes the order of the stack, or puts something into a list that is being made."""
        place = 1 if step.kind == "DUP_TOP" else 2 if step.kind == "ROT_TWO" else step.number
        taken = [] if step.kind in ORDERING else self._pop(-step.effect)
        self._fill(place)
        if step.kind in ("COPY", "DUP_TOP"):
            self.stack.append(self.stack[-place])
        elif step.kind in ORDERING:
            self.stack[-1], self.stack[-place] = self.stack[-place], self.stack[-1]
        else:
            self.stack[-place] = _union([self.stack[-place], *taken])

    def _compute(self, step: Step) -> None:
        taken = self._pop(1 - step.effect)
        first = (taken[0] if taken else None) or _Value()
        if step.kind.startswith("INPLACE_") or (step.kind == "BINARY_OP" and step.sign.endswith("=")):
            self.changed += [] if LIST in first.names else [first.names]
            self.stack.append(first)
        elif step.kind.startswith("BUILD_"):
            self.stack.append(_Value(_union(taken).names | {LIST}))
        else:
            part = step.kind in ("BINARY_SUBSCR", "BINARY_SLICE") or step.sign == "[]"
            self.stack.append(_Value(first.names - {LIST}) if part else _Value())

    def _store(self, step: Step) -> None:
        taken = self._pop(-step.effect)
        of = (taken[-1] if step.kind == "STORE_ATTR" else taken[1]) or _Value()
        if step.kind == "STORE_ATTR" and step.name in ("data", "weight"):
            self.changed.append(of.names | {step.name})
        elif step.kind != "STORE_ATTR" and not of.names.isdisjoint({"weight", "data", "_parameters", ITEM}):
            self.changed.append(of.names)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_") and name != "requires_grad_"


def _either(one: _Value | None, other: _Value | None) -> _Value | None:
    if one is None or other is None or one == other:
        return one or other
    return _Value(one.names | other.names)


def _union(values: Iterable[_Value | None]) -> _Value:
    return _Value(frozenset().union(*(one.names for one in values if one is not None)))


def _resized(stack: _Stack, by: int) -> _Stack:
    return stack + [_Value()] * by if by >= 0 else stack[:by]


def changed_in_place(code: CodeType) -> set[frozenset[str]]:
    """What code changes in place, or gives to what does, each by the names that it comes from.

    An attribute ``weight`` that is set or replaced is among it. Names are attributes and functions; `ARGUMENT` and the
    like stand for what has none.
    """
    return {one for one in _Reader(code).changed if one}
