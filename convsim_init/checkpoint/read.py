"""Reading the tensors of a checkpoint, whoever wrote it, without running what may be hidden in it."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from convsim_init.checkpoint.distributed import read_distributed
from convsim_init.checkpoint.nested import unwrapped
from convsim_init.checkpoint.pickles import check_room, is_plain, type_name
from convsim_init.checkpoint.state_dict import is_extra_state, module_versions
from convsim_init.checkpoint.torch_files import TorchFile
from convsim_init.errors import InputError
from convsim_init.files.sources import MAPPED, check_source, of_another_kind
from convsim_init.layers.memory import refuse_fake_mode
from convsim_init.layers.names import bare_entries
from convsim_init.report.text import has_surrogates, quoted, shown, some
from convsim_init.settings import check_type

WRITERS = {".safetensors": "safetensors", ".json": "Hugging Face", "": "torch.distributed.checkpoint"}  # by suffix
MODEL_PREFIX = "model."  # Lightning puts it before all keys
NAME_LENGTH = 255  # characters of a file's name, at most
JSON = 32  # bytes of memory for each of a header of safetensors or of an index, where no tensor has a number


class Checkpoint(NamedTuple):
    """The tensors of a file under its own keys."""

    tensors: dict[str, Tensor]  # dense, on the CPU
    wrapper: str  # key that the file keeps them under, such as "state_dict"; empty if under nothing
    versions: OrderedDict[str, object] | None = None  # notes of modules, as `module_versions` returns them
    others: tuple[str, ...] = ()  # keys of other state dicts in the file, which were not read
    extra: Mapping[str, Any] = {}  # extra states of modules that are no tensors, if all are plain data
    unread: tuple[str, ...] = ()  # keys of these extra states, if one is not


def bare_tensors(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint without what wrappers or Lightning add to keys; `InputError` if two become one."""
    try:
        bare = bare_entries(checkpoint.tensors)
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}") from error
    if all(key.startswith(MODEL_PREFIX) for key in bare):  # the module behind it may be wrapped, too
        bare = bare_entries({key.removeprefix(MODEL_PREFIX): value for key, value in bare.items()})
    return {key: value for key, value in bare.items() if isinstance(value, Tensor)}


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """The tensors of a checkpoint, on the CPU, under the keys that they have there.

    What a file holds decides how it is read, not its name. A dict that holds the state dict under one of
    `nested.WRAPPERS` is opened, the first of these that is there, and so is one that holds a single state
    dict under any other key, be it in further dicts, or nothing but another dict. Files of `torch.save` are
    not unpickled: their pickles are followed, and the tensors in them built anew, so that no code is run.
    Tensors stay on the disk until they are used; on Windows, where nobody could replace the file then, they are read.

    Args:
        path: A file of safetensors or of `torch.save`, or a folder of Hugging Face or `torch.distributed.checkpoint`.
        key: Key of the state dict in the file, with dots where it is in several dicts; or a prefix of
            its keys, where it is one of several networks in a state dict. Default: as above.

    Returns:
        Dense tensors, at least one, in the order of the file.

    Raises:
        InputError: If the file is missing, damaged, or holds anything but tensors.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"expected the path of a checkpoint, got {type(path).__name__}: load_state_dict takes tensors")
    if key is not None:
        check_type("key", key, str, "write key='state_dict'")
    refuse_fake_mode()
    source = check_source(path)
    name = repr(str(source))
    with _errors(source):
        content: object
        size = source.stat().st_size
        if source.suffix == ".json":
            content, size = _read_shards(source)
        elif source.name == ".metadata":
            content, size = read_distributed(source)
        else:
            content = _read(source)
    return _checked(name, content, size, key)


def _read(path: Path) -> object:
    """Read a file: as one of safetensors if it begins with the length of a header in JSON, else as `torch.save`'s."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
        length = int.from_bytes(head[:8], "little")
        may_be_torch = path.suffix != ".safetensors" or head.startswith((b"PK", b"\x80"))  # zipped or pickled
        if may_be_torch and not (length < size and head[8:] == b"{"):
            return TorchFile(path).read()
        check_room(str(path), size, JSON * min(length, size))
        file.seek(8)
        header = file.read(length)
    # The library would lose one of two equal keys. On Windows an error must not be raised while the file is mapped.
    json.loads(header, object_pairs_hook=partial(_only_once, str(path)))
    tensors = safetensors.torch.load_file(path)
    return tensors if MAPPED else {key: tensor.clone() for key, tensor in tensors.items()}


def _read_shards(index: Path) -> tuple[dict[str, object], int]:
    """The tensors that an index of Hugging Face lists, each from the file it names, and the size of all in bytes."""
    size = index.stat().st_size
    check_room(str(index), size, JSON * size)
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, object] = {}
    for name in dict.fromkeys(places.values()):
        # A name with a separator would lead out of the folder.
        if Path(name).name != name or len(name) > NAME_LENGTH:
            raise InputError(
                f"expected names of files beside {str(index)!r}, got {quoted(name)}: copy the folder again"
            )
        shard = check_source(index.parent / name)
        with _errors(shard):
            content = _read(shard)
        if not isinstance(content, Mapping):
            raise InputError(f"expected a state dict in {str(shard)!r}, got {type(content).__name__}")
        wanted = [key for key, place in places.items() if place == name]
        absent = [key for key in wanted if key not in content]
        if absent:
            raise InputError(
                f"expected {some(map(shown, absent))} in {str(shard)!r}, as its index says, got a file without: copy "
                "the folder again"
            )
        tensors |= {key: content[key] for key in wanted}
        size += shard.stat().st_size
    return tensors, size


def _only_once(path: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise InputError(f"expected each key once, got {path!r}, whose header repeats {quoted(key)}: write it again")
    return entries


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn whatever libraries and the system raise at a file that they cannot read into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        name = repr(str(path))
        # EINVAL comes from torch, where an archive is cut off.
        if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:
            raise InputError(f"cannot read {name}: {error.strerror}; check the file") from error
        if has_surrogates(str(path)):
            raise InputError(f"cannot read {name}: its path is not in UTF-8, as libraries expect; rename it") from error
        writer = WRITERS.get(path.suffix, "torch.save")
        raise of_another_kind(path) or InputError(
            f"expected a file written by {writer}, got {name}, which is damaged or of another kind: copy it again"
        ) from error


def _checked(name: str, content: object, size: int, wanted: str | None) -> Checkpoint:
    inner, opened, others = unwrapped(name, content, wanted)
    place = f" under {opened!r}" if opened else ""
    if not isinstance(inner, Mapping):
        raise InputError(
            f"expected a state dict in {name}, got {shown(type_name(inner))}{place}: save the model's state_dict()"
        )
    tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor) or not is_extra_state(key)}
    if not tensors:
        got = "extra states of modules alone" if inner else "an empty state dict"
        raise InputError(f"expected weights in {name}, got {got}{place}: save the model's state_dict()")
    extra = {key: value for key, value in inner.items() if key not in tensors}
    extra, unread = (extra, ()) if is_plain(extra) else ({}, tuple(extra))
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            under = quoted(key) if is_plain(key) else "a key that is no text"
            got = f"{shown(type_name(value))} under {under}{place}"
            is_state = isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())
            advice = "choose it with key (--key NAME in the shell)" if is_state else "save the model's state_dict()"
            raise InputError(f"expected only tensors in {name}, got {got}: {advice}")
        if has_surrogates(key):
            raise InputError(f"expected names of Unicode letters in {name}, got {quoted(key)}{place}: rename it")
        # One row may claim to be a million of them, or there may be a million empty ones.
        if max(value.nbytes, *value.shape, 0) > size:
            got = f"shape {list(value.shape)} under {quoted(key)}{place}"
            raise InputError(f"expected tensors no larger than the file in {name}, got {got}: copy the file again")
    return Checkpoint(tensors, opened, _plain(module_versions(inner)), others, extra, unread)


def _plain(versions: Mapping[str, object] | None) -> OrderedDict[str, object] | None:
    """The versions that a file holds, as far as they are whole numbers and texts."""
    if versions is None:
        return None
    return OrderedDict(
        (name, {key: value for key, value in noted.items() if isinstance(key, str) and isinstance(value, (int, str))})
        for name, noted in versions.items()
        if isinstance(noted, Mapping)
    )
