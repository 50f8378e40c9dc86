"""What a pickle holds, told without unpickling it.

The operations of the pickle are followed one by one. Nothing that it names is imported, called or given attributes:
what it wants made stays data. Neither nesting nor numbers in it cost more than its own length does.
"""

from __future__ import annotations

import mmap
import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import cast

from convsim_init.errors import InputError

ROOM = 48 * 2**20  # bytes that what describes the tensors of a file may take, and as many as twice the file
OBJECT, MEMO, CALL = 64, 64, 400  # bytes that an operation takes, beside those of the pickle
TEXT = 5  # times its length that a text takes: its bytes, and letters of four bytes
LINE = 2**20  # bytes of a line at most
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


@dataclass(eq=False, frozen=True, slots=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True, repr=False)  # whose repr does not follow the nesting
class Made:
    """An object that a pickle wants made: by calling what, with what, and in what state."""

    maker: Name
    arguments: tuple[object, ...]
    state: object = None


class Items(list[object]):
    """The items of a set, which is not made: each would have to be hashed."""


EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": Items, "EMPTY_TUPLE": tuple}
PLAIN = (dict, OrderedDict, list, tuple, str, bytes, int, float, bool, type(None))


def is_plain(value: object) -> bool:
    """Whether what was read is what was written: of plain types throughout, without tensors and what is not made."""
    known, pending = set[int](), [value]
    # The list grows while it is gone through, where a recursion would end at Python's limit.
    for one in pending:
        if type(one) not in PLAIN:
            return False
        if id(one) not in known and isinstance(one, (dict, list, tuple)):
            known.add(id(one))
            pending += [*one, *one.values()] if isinstance(one, dict) else one
    return True


def type_name(value: object) -> str:
    """The type of what was read, as it is called in an error."""
    return str(value.maker if isinstance(value, Made) else value if isinstance(value, Name) else type(value).__name__)


def check_room(path: str, file_size: int, taken: int) -> None:
    """Refuse a file of so many bytes whose names, shapes and other small objects take many more in memory."""
    if taken > ROOM + 2 * file_size:
        raise InputError(
            f"expected a file of tensors, got {path!r}, which holds so many other objects or names that memory could "
            f"run out: save the model's state_dict() alone"
        )


class PickleReader:
    """Follows the pickles in a file; subclasses say what becomes of names, calls and references.

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
            return {}  # what it makes by default is made no more
        if str(maker) != "collections.OrderedDict":
            return Made(maker, arguments)
        made: OrderedDict[object, object] = OrderedDict()
        for pairs in arguments:  # as Python 2 wrote them
            set_items(made, [(key, value) for key, value in cast("list[list[object]]", pairs)])
        return made

    def refer(self, reference: object) -> object:
        """What stands for something outside the pickle."""
        raise UnpicklingError(f"a reference to {type(reference)}")

    def read(self, count: int) -> bytes:
        """The next bytes; `pickletools` calls it."""
        # The pickle may claim any length; no more bytes than the file has are read.
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
                    stack.append(Made(Name("builtins", "frozenset"), tuple(since_mark())))
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
                    self.take(CALL + OBJECT * sum(len(each) for each in arguments if isinstance(each, (list, tuple))))
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
    """Put the pairs in a dict; keys nested in each other, whose hashes overflow the stack, are refused."""
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
