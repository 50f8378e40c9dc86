"""Reading files of `torch.save`; what their pickles claim of tensors is checked against the bytes that are there.

Each tensor is built anew from a dtype, a part of the file, and an offset, extents and strides that stay in that part.
No other code that a pickle names is run, and a file that names any is refused.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor, UntypedStorage

from convsim_init.checkpoint.pickles import Made, Name, PickleReader, check_room
from convsim_init.errors import InputError
from convsim_init.files.sources import MAPPED
from convsim_init.report.text import quoted

ZIP_SIGNATURE = b"PK\3\4"
# 56 + 20 + 22: the end of a zip64 archive's directory, the place of that end, and the end as in older archives.
END = 98  # bytes of the three records that end a zip archive
ENTRY = 14  # bytes of memory for each that an entry takes in an archive's directory
LEGACY_HEAD = (0x1950A86A20F9469CFC6C, 1001)  # magic number, protocol
TENSOR = 600  # bytes of memory that a tensor takes beside its numbers
ALIGNED = 16  # bytes, of the widest dtype
DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
ALLOWED = re.compile(  # names that dense tensors are made of, and what trainers save beside the weights
    r"""collections\.(OrderedDict|defaultdict|Counter)
    | torch(\.\w+)*\.\w+Storage
    | torch\.(u?int\d+|float\d+(_\w+)?|bfloat16|complex\d+|bool|Size|device|Tensor)
    | torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)
    | torch\._tensor\._rebuild_from_type_v2
    | torch\.nn\.parameter\.Parameter
    | (builtins|__builtin__)\.(set|frozenset|complex|bytes|dict|list|tuple|int|long|float|str|unicode|bool)
    | _codecs\.encode
    # arguments, configs and progress
    | argparse\.Namespace
    | pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path
    | numpy(\._?core)?\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer|dtype|ndarray)
    | numpy\.dtypes\.\w+DType
    | datetime\.(date|time|datetime|timedelta|timezone)
    | torch\.torch_version\.TorchVersion
    | mmengine\.logging\.history_buffer\.HistoryBuffer
    | omegaconf(\.\w+)+ | typing\.Any
    | (pytorch_)?lightning(_fabric)?(\.\w+)+""",
    re.VERBOSE,
)
CONFIGS = re.compile(  # dicts whose entries are attributes, too
    r"""(pytorch_)?lightning(_fabric)?(\.\w+)+\.AttributeDict
    | mm(engine|cv)(\.\w+)+\.ConfigDict
    | (yacs|fvcore\.common)\.config\.CfgNode
    | addict(\.addict)?\.Dict | box\.box\.Box | easydict\.EasyDict | munch\.Munch""",
    re.VERBOSE,
)


@dataclass(eq=False, slots=True)
class Storage:
    """The memory of tensors of one dtype; None as long as its place in the file is not known."""

    dtype: torch.dtype
    data: UntypedStorage | None


class TensorReader(PickleReader):
    """Follows a pickle of `torch.save` and builds the tensors in it; ``find`` returns the memory of a storage's key."""

    def __init__(self, path: str, content: mmap.mmap, find: Callable[[str], UntypedStorage | None]) -> None:
        super().__init__(path, content)
        self.find = find
        self.storages: dict[str, Storage] = {}

    def name(self, name: Name) -> Name:
        """The name, if dense tensors or plain data are made of it; plain data are not made, either."""
        if not (ALLOWED.fullmatch(str(name)) or CONFIGS.fullmatch(str(name))):
            trouble = "which needs code to be run", "where you trust it, load it and save its state_dict()"
            if re.fullmatch(r"torch\._utils\._rebuild_(sparse_|sparse_csr_|nested_|meta_|q)tensor\w*", str(name)):
                trouble = "which holds tensors of another kind", "save dense ones, as by to_dense or dequantize"
            raise InputError(
                f"expected a file of dense tensors alone, got {self.path!r}, {trouble[0]} ({quoted(str(name))}): "
                f"{trouble[1]}"
            )
        return name

    def refer(self, reference: object) -> Storage:
        """The storage that is referred to."""
        match reference:
            # In very old files a sixth item that is not None makes it a view of another storage.
            case ("storage", Name(name=kind), str(key), str(), int(), *rest) if not any(rest):
                self.storages[key] = Storage(DTYPES[kind.removesuffix("Storage")], self.find(key))
                return self.storages[key]
        raise UnpicklingError("a reference to no storage")

    def call(self, maker: Name, arguments: tuple[Any, ...]) -> object:
        """A tensor where one is rebuilt."""
        owner = maker.module.partition(".")[0]
        match owner, maker.name:
            case "torch", "_rebuild_tensor" | "_rebuild_tensor_v2":
                return self._tensor(arguments, None, arguments[6:])
            case "torch", "_rebuild_tensor_v3":
                if arguments[6].module != "torch":  # of other modules any name may come here
                    raise UnpicklingError("a dtype of another library")
                return self._tensor(arguments, getattr(torch, arguments[6].name), arguments[7:])
            case "torch", "_rebuild_from_type_v2" if str(arguments[0]).startswith("torch._utils._rebuild_tensor"):
                return self.call(arguments[0], arguments[2])
            case "torch", "_rebuild_parameter" | "_rebuild_parameter_with_state" | "Parameter":
                return arguments[0]  # without attributes, hooks and gradient
            case "numpy", "_reconstruct" if isinstance(arguments[0], Name):  # numpy's arrays, told by their type
                return Made(arguments[0])
            case _ if CONFIGS.fullmatch(str(maker)):
                return arguments[0] if arguments and isinstance(arguments[0], dict) else {}
        return super().call(maker, arguments)

    def _tensor(self, arguments: tuple[Any, ...], dtype: torch.dtype | None, flags: tuple[Any, ...]) -> Tensor:
        self.take(TENSOR)
        storage, offset, size, stride = arguments[:4]
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            raise UnpicklingError("extents that are none")
        if any(any(flag.values()) for flag in flags if flag):
            raise InputError(f"expected plain tensors in {self.path!r}, got a conjugate or negative view: clone it")
        tensor = torch.empty(0, dtype=dtype or storage.dtype, device="cpu")
        if storage.data is None:
            return tensor
        last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
        # A tensor without numbers may claim any offset.
        if 0 in size:
            offset = 0
        elif (last + 1) * tensor.element_size() > storage.data.nbytes():
            raise UnpicklingError("a tensor past the end of its storage")
        return tensor.set_(storage.data, offset, size, stride)


class TorchFile:
    """A file that `torch.save` wrote to once or more; where files are `MAPPED`, its tensors stay on the disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.size = path, str(path), path.stat().st_size
        with path.open("rb") as file:
            if MAPPED:
                self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                # Not shared: what is written to a tensor stays in memory, and does not reach the file.
                self.data = cast("UntypedStorage", UntypedStorage.from_file(self.name, False, self.size))
            else:
                self.content = mmap.mmap(-1, self.size)
                file.readinto(self.content)
                self.data = torch.frombuffer(self.content, dtype=torch.uint8).untyped_storage()

    def read(self, start: int = 0, length: int | None = None) -> object:
        """What the file holds from ``start`` on, in ``length`` bytes or up to its end.

        Raises:
            InputError: If a checksum fails, a pickle needs code to be run, or memory is out of proportion to the file.
            Exception: Any kind, if `torch.save` did not write it.
        """
        end = self.size if length is None else start + length
        if not 0 <= start < end <= self.size:
            raise UnpicklingError("a part that is not in the file")
        self.content.seek(start)
        if self.content[start : start + len(ZIP_SIGNATURE)] != ZIP_SIGNATURE:
            return self._read_legacy()
        check_room(self.name, self.size, ENTRY * _directory_size(self.content[max(end - END, start) : end]))
        with self.path.open("rb") as file:
            file.seek(start)
            whole = file if length is None else io.BytesIO(file.read(length))
            return self._read_archive(zipfile.ZipFile(whole), start, end)

    def _read_archive(self, archive: zipfile.ZipFile, start: int, end: int) -> object:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(name.endswith("/constants.pkl") for name in entries):
            raise InputError(
                f"expected a file of tensors, got {self.name!r}, a TorchScript archive: save its state_dict() instead"
            )
        if entries and not any(name.endswith("/data.pkl") for name in entries):
            raise InputError(
                f"expected a file written by torch.save, got {self.name!r}, an archive of other files such as "
                f"{quoted(next(iter(entries)))}: save the PyTorch model's state_dict() instead"
            )
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries.values())
        unique = len(entries) == len(archive.infolist())
        total = sum(entry.file_size for entry in entries.values())
        # Torch compresses nothing and writes no comment: this is something else, or swells when it is read.
        if not stored or not unique or archive.comment or total > end - start:
            raise zipfile.BadZipFile("not as torch.save writes it")
        # torch.save can be told to leave out checksums: then all are 0.
        damaged = archive.testzip() if any(entry.CRC for entry in entries.values()) else None
        if damaged is not None:
            raise InputError(
                f"expected an intact file, got {self.name!r}, where {quoted(damaged)} fails its checksum: copy it again"
            )
        (pickle,) = (name for name in entries if name.endswith("/data.pkl"))
        folder = pickle.removesuffix("data.pkl")

        def position(name: str) -> int:
            # The lengths of the name and of the extra field in the entry's own header. The directory's differ: only
            # here torch pads, to align the numbers.
            header = start + entries[name].header_offset
            lengths: tuple[int, int] = struct.unpack_from("<2H", self.content, header + 26)
            return header + 30 + sum(lengths)

        if (order := entries.get(f"{folder}byteorder")) is not None:
            begin = position(order.filename)
            if self.content[begin : begin + order.file_size] != b"little":
                raise InputError(f"expected numbers in little endian, got {self.name!r}: save it on another machine")

        @cache
        def find(key: str) -> UntypedStorage:
            name = f"{folder}data/{key}"
            return self._part(position(name), entries[name].file_size)

        self.content.seek(position(pickle))
        return TensorReader(self.name, self.content, find).load()

    def _read_legacy(self) -> object:
        """Read a file from before PyTorch 1.6: pickles of its head, content and storages' keys, then the data."""
        parts: dict[str, UntypedStorage] = {}
        # The data stand behind the content that refers to them: it is read twice, first without them.
        reader = TensorReader(self.name, self.content, parts.get)
        magic, protocol, system = (reader.load() for _ in range(3))
        if (magic, protocol) != LEGACY_HEAD or not isinstance(system, dict) or not system.get("little_endian", True):
            raise UnpicklingError("not as torch.save writes it")
        begin = self.content.tell()
        reader.load()  # for the dtypes of the storages
        keys = reader.load()
        for key in cast("list[str]", keys):
            count = int.from_bytes(self.content.read(8), "little")
            length = count * reader.storages[key].dtype.itemsize
            parts[key] = self._part(self.content.tell(), length)
            self.content.seek(length, io.SEEK_CUR)
        self.content.seek(begin)
        return TensorReader(self.name, self.content, parts.__getitem__).load()

    def _part(self, position: int, length: int) -> UntypedStorage:
        if position + length > self.size:
            raise UnpicklingError("a storage past the end of the file")
        part = self.data[position : position + length]
        return part.clone() if part.data_ptr() % ALIGNED else part  # type: ignore[no-any-return]


def _directory_size(end: bytes) -> int:
    """Bytes of the list of entries that `zipfile` will read, from the records that end an archive."""
    if end[-22:-18] != b"PK\5\6":
        raise zipfile.BadZipFile("a comment, or no end")
    return int.from_bytes(end[40:48] if end[:4] == b"PK\6\6" else end[-10:-6], "little")
