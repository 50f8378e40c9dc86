"""What fuzzing of the reader starts from: small files of each kind, whole and in parts, plain and hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

KINDS = ("safetensors", "pt", "header", "pickle", "legacy", "index", "metadata")
HEAD = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
TENSOR = (  # ``{"a": tensor}`` of an old file, with places for its offset, extent and stride
    b"\x80\x02}q\0X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\nq\2((X\7\0\0\0storagectorch\nFloatStorage\n"
    b"X\1\0\0\x000X\3\0\0\0cpuK@%sQ%s%s\x85%s\x85\x89ccollections\nOrderedDict\n)RtRs."
)
TENSORS = {"conv.weight": torch.ones(2, 3, 2, 2), "conv.bias": torch.ones(2, dtype=torch.float16)}
EXPANDED = {"a.weight": torch.ones(1).expand(2, 3, 2, 2)}


class Planted:
    """A pickle that leaves a trace where it is ever unpickled with its code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


class Buffer:
    """A pickle that asks for memory by a number."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (1000,)


def write_distributed(folder: Path) -> None:
    """A folder of `torch.distributed.checkpoint`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save({"app": {"model": TENSORS, "epoch": 3}}, checkpoint_id=folder)


def seeds() -> Iterator[bytes]:
    """The inputs, each with the byte that says what it is."""
    parts = [(kind, content) for kind in ("pickle", "legacy") for content in tensors(kind)]
    for kind, rest in (*described(), *parts):
        yield bytes([KINDS.index(kind)]) + rest
    plain = safetensors.torch.save(TENSORS, metadata={"format": "pt"})
    yield b"\0" + plain
    yield b"\2" + plain[8 : 8 + int.from_bytes(plain[:8], "little")]
    for dtype in ("BOOL", "F64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "I16", "U64"):
        yield b"\2" + f'{{"a.weight":{{"dtype":"{dtype}","shape":[1,0],"data_offsets":[0,0]}}}}'.encode()
    contents: list[object] = [
        TENSORS,
        {"epoch": 3, "state_dict": OrderedDict(TENSORS), "optimizer": {"state": {}, "groups": [1, "a", None, 0.5]}},
        {f"module._orig_mod.{key}": nn.Parameter(value.float()) for key, value in TENSORS.items()},
        {"a": torch.ones(2, 2).to_sparse(), "b": torch.ones(2, 2).to(torch.float8_e4m3fn)},
        EXPANDED,
        {"q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "c": torch.ones(2, dtype=torch.cfloat)},
        {"a": Planted()},
        {"a": Buffer(), "b": torch.device("cpu"), "c": torch.Size([2]), "d": {1, 2}, "e": b"bytes"},
    ]
    for content in contents:
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            yield b"\1" + buffer.getvalue()
            if zipped:
                with zipfile.ZipFile(buffer) as archive:
                    name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                    yield b"\3" + archive.read(name)
    yield b"\1" + pickle.dumps(Planted(), 2)


def described() -> Iterator[tuple[str, bytes]]:
    """What names files, and the metadata of those that it names."""
    yield "index", json.dumps({"weight_map": dict.fromkeys(TENSORS, "model-1.safetensors")}).encode()
    yield "index", b'{"weight_map":{"a":"../b","\\ud800":"\\ud800","c":3}}'
    with tempfile.TemporaryDirectory() as folder:
        write_distributed(Path(folder))
        yield "metadata", (Path(folder) / ".metadata").read_bytes()


def tensors(kind: str) -> Iterator[bytes]:
    """Pickles whose numbers are in a storage of 64 and out of it, and keys and values in each other."""
    for numbers in ((0, 64, 1), (63, 1, 1), (64, 1, 1), (0, -1, 1), (63, 2, -1), (-1, 1, 1), (2**62, 1, 1), (0, 9, 0)):
        codes = [b"\x8a\x08" + number.to_bytes(8, "little", signed=True) for number in numbers]
        yield TENSOR % (b"Nt" if kind == "legacy" else b"t", *codes)
    for deep in (b")" + b"\x85" * 2000, b"]" * 1000 + b"a" * 999):
        yield b"\x80\x02}" + deep + b"K\1s."
        yield b"\x80\x02}K\1" + deep + b"s."
