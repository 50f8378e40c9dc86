"""What fuzzing of the reader starts from: small files of each kind, whole and in parts, plain and hostile."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator

import safetensors.torch
import torch
from torch import nn

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


def seeds() -> Iterator[bytes]:
    """The inputs, each with the byte that says what it is."""
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
