"""Reading pickles without unpickling them.

The operations of a pickle are followed one by one. Nothing that it names is imported, called or given attributes: what
it wants made stays data. Neither nesting nor numbers in it cost more than its own length does.

``torch.load(weights_only=True)`` runs no code either. But in PyTorch 2.13 a key nested 200,000 deep ends the process,
a file of 500 bytes takes a gigabyte by a call of ``bytearray``, and one from before PyTorch 1.6, which ``mmap=True``
does not read, may claim a tensor of a gigabyte that is not there. It refuses what trainers save beside the weights,
such as ``argparse.Namespace`` and paths, and pickles of protocol 4. The pickle of `torch.distributed.checkpoint` torch
reads without any restriction.
"""

from __future__ import annotations

import mmap
import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import cast

from convsim_init.errors import InputError

ROOM = 48 * 2**20  # bytes of memory that the objects beside a file's numbers may take, and twice the file's size more
OBJECT, MEMO, CALL = 64, 64, 400  # bytes of memory that an operation takes, beside those of the pickle
TEXT = 5  # bytes of memory that a text takes for each of its own: that one, and a letter of four
LINE = 2**20  # bytes of a line, at most
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


@dataclass(eq=False, frozen=True, slots=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True, repr=False)  # a generated repr would follow any nesting
class Made:
    """An object that a pickle wants made: what it would call, and the state to set then."""

    maker: Name
    state: object = None


class Items(list[object]):
    """The items of a set. No set is made, because each item would have to be hashed."""


EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": Items, "EMPTY_TUPLE": tuple}
PLAIN = (dict, OrderedDict, list, tuple, str, bytes, int, float, bool, type(None))


def is_plain(value: object) -> bool:
    """Whether a value that was read is of plain types throughout: no tensor, no name, and nothing left unmade."""
    known, pending = set[int](), [value]
    # The list grows in the loop: a recursion would end at Python's limit.
    for item in pending:
        if type(item) not in PLAIN:
            return False
        if id(item) not in known and isinstance(item, (dict, list, tuple)):
            known.add(id(item))
            pending += [*item, *item.values()] if isinstance(item, dict) else item
    return True


def type_name(value: object) -> str:
    """The type of a value that was read, for an error."""
    if isinstance(value, Made):
        return str(value.maker)
    return str(value) if isinstance(value, Name) else type(value).__name__


def check_room(path: str, file_size: int, taken: int) -> None:
    """Refuse a file whose names, shapes and other small objects take many more bytes in memory than it has."""
    if taken > ROOM + 2 * file_size:
        raise InputError(
            f"expected a file of tensors, got {path!r}, which holds so many other objects or names that memory could "
            f"run out: save the model's state_dict() alone"
        )


class PickleReader:
    """Follows the pickles in a file; subclasses decide what becomes of names, calls and references.

    Args:
        path: Path of the file, for errors.
        content: The file, at the position of a pickle.
        size: Size in bytes of what the pickle describes. Default: that of the file.
    """

    def __init__(self, path: str, content: mmap.mmap, size: int | None = None) -> None:
        self.path, self.content, self.tell = path, content, content.tell
        self._size, self._taken = len(content) if size is None else size, 0

    def name(self, name: Name) -> object:
        """What stands for a class or function that the pickle names."""
        return name

    def call(self, maker: Name, arguments: tuple[object, ...]) -> object:
        """What stands for the result of a call."""
        if str(maker) == "torch.Size":
            return arguments[0]
        if str(maker) == "collections.defaultdict":
            return {}  # without its function for missing keys
        if str(maker) != "collections.OrderedDict":
            return Made(maker)
        made: OrderedDict[object, object] = OrderedDict()
        for pairs in arguments:  # Python 2 wrote the items here
            set_items(made, [(key, value) for key, value in cast("list[list[object]]", pairs)])
        return made

    def refer(self, reference: object) -> object:
        """What stands for something outside the pickle."""
        raise UnpicklingError(f"a reference to {type(reference)}")

    def read(self, count: int) -> bytes:
        """The next bytes; `pickletools` calls it."""
        # The pickle may claim any length; there are no more bytes than in the file.
        self.take(TEXT * min(count, len(self.content)))
        return self.content.read(count)

    def readline(self) -> bytes:
        """The next line; `pickletools` calls it."""
        start = self.tell()
        # Where no line ends, nothing is read, and pickletools raises.
        return self.read(max(self.content.find(b"\n", start, start + LINE) + 1 - start, 0))

    def take(self, count: int) -> None:
        """Count bytes of memory, and refuse what takes too many."""
        self._taken += count
        check_room(self.path, self._size, self._taken)

    def load(self) -> object:
        """What the pickle at the file's position holds, of plain types, `Name` and `Made`.

        Raises:
            InputError: If it would take more memory than the file is worth.
            Exception: Any kind, if it is no pickle.
        """
        stack: list[object] = []
        marks: list[int] = []
        memo: dict[int, object] = {}

        def since_mark() -> list[object]:
            start = marks.pop()
            values = stack[start:]
            del stack[start:]
            return values

        for operation, argument, _ in pickletools.genops(self):  # type: ignore[arg-type]
            self.take(OBJECT)
            match operation.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "MEMOIZE" | "PUT" | "BINPUT" | "LONG_BINPUT" as name:
                    self.take(MEMO)
                    memo[len(memo) if name == "MEMOIZE" else cast("int", argument)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[cast("int", argument)])
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append(CONSTANTS[operation.name])
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_TUPLE":
                    stack.append(EMPTY[operation.name]())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(operation.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "FROZENSET":
                    since_mark()
                    stack.append(Made(Name("builtins", "frozenset")))
                case "APPEND":
                    _extend(stack, [stack.pop()])
                case "APPENDS" | "ADDITEMS":
                    _extend(stack, since_mark())
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    set_items(stack[-1], [(key, value)])
                case "SETITEMS":
                    values = since_mark()
                    set_items(stack[-1], list(zip(values[::2], values[1::2], strict=True)))
                case "GLOBAL":
                    stack.append(self.name(Name(*str(argument).split(" ", 1))))
                case "STACK_GLOBAL":
                    named, module = stack.pop(), stack.pop()
                    if not (isinstance(module, str) and isinstance(named, str)):
                        raise UnpicklingError("a name that is no text")
                    stack.append(self.name(Name(module, named)))
                case "REDUCE" | "NEWOBJ":
                    arguments, maker = stack.pop(), stack.pop()
                    if not (isinstance(maker, Name) and isinstance(arguments, tuple)):
                        raise UnpicklingError("a call of what is no name")
                    items = sum(len(value) for value in arguments if isinstance(value, (list, tuple)))
                    self.take(CALL + OBJECT * items)
                    stack.append(self.call(maker, arguments))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], Made):
                        stack[-1].state = state
                    elif isinstance(stack[-1], OrderedDict) and isinstance(state, dict):
                        stack[-1]._metadata = state.get("_metadata")  # type: ignore[attr-defined]  # see `module_versions`
                case "BINPERSID":
                    stack.append(self.refer(stack.pop()))
                case _ if operation.arg is not None and operation.stack_after[0].name != "any":  # numbers, texts, bytes
                    stack.append(argument)
                case _:
                    raise UnpicklingError(f"the operation {operation.name}")
        raise UnpicklingError("no end")


def set_items(target: object, pairs: list[tuple[object, object]]) -> None:
    """Put pairs into a dict. Nested keys are refused: computing their hash may overflow the stack."""
    if not isinstance(target, dict):
        raise UnpicklingError(f"items of {type(target)}")
    for key, value in pairs:
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise UnpicklingError("a nested key")
        target[key] = value


def _extend(stack: list[object], values: list[object]) -> None:
    if not isinstance(stack[-1], list):
        raise UnpicklingError(f"values of {type(stack[-1])}")
    stack[-1].extend(values)
