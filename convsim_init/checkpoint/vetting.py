"""What a file of `torch.save` may hold, checked before torch unpickles it.

`weights_only=True` runs no code of the file's, but it builds what the file asks for: a `bytearray` of a terabyte, say,
or a tensor whose million rows are one. Here a file is refused unless its parts are as large as they claim and its
pickles name nothing but what dense tensors are made of.
"""

from __future__ import annotations

import mmap
import pickletools
import re
import zipfile
from pathlib import Path

from convsim_init.errors import InputError
from convsim_init.report.text import quoted

ZIP_SIGNATURE = b"PK\3\4"
LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages; their data follow
UNTYPED = "torch.storage UntypedStorage"
DENSE_TENSORS = re.compile(
    r"""collections\ (OrderedDict|Counter)
    | torch(\.\w+)*\ (?!Untyped|Typed)\w*Storage
    | torch\ (u?int\d+|float\d+(_\w+)?|bfloat16|complex\d+|bool|Size|device|Tensor)
    | torch\._utils\ _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)
    | torch\._tensor\ _rebuild_from_type_v2
    | torch\.nn\.parameter\ Parameter
    | (builtins|__builtin__)\ (set|complex)
    | _codecs\ encode""",
    re.VERBOSE,
)


def is_zipped(path: Path) -> bool:
    """Whether torch takes the file for a zip archive; else it holds bare pickles, as before PyTorch 1.6."""
    with path.open("rb") as file:
        return file.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE


def vet_torch_file(path: Path) -> None:
    """Refuse a file of `torch.save` that is damaged or needs more than dense tensors need.

    Raises:
        InputError: If a checksum fails, or a pickle needs code to be run.
        Exception: Any kind, if it is no file of `torch.save`.
    """
    if is_zipped(path):
        _vet_archive(path)
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(LEGACY_PICKLES):
            _vet_pickle(path, content)


def _vet_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise InputError(
                f"expected a file of tensors, got {str(path)!r}, a TorchScript archive: save its state_dict() instead"
            )
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        unique = len({entry.filename for entry in entries}) == len(entries)
        # Torch compresses nothing and writes no comment: this is something else, or swells when it is read.
        if not stored or not unique or archive.comment or sum(e.file_size for e in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("not as torch.save writes it")
        damaged = archive.testzip()  # torch takes damaged tensors as they are
        if damaged is not None:
            raise InputError(
                f"expected an intact file, got {str(path)!r}, where {quoted(damaged)} fails its checksum: copy it again"
            )
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as pickle:
                    _vet_pickle(path, pickle)


def _vet_pickle(path: Path, pickle: object) -> None:
    for operation, argument, _ in pickletools.genops(pickle):  # type: ignore[arg-type]
        if operation.name == "GLOBAL" and argument == UNTYPED:  # a pickle may also call it, for memory without end
            raise InputError(
                f"expected tensors of a dtype with a storage class of its own in {str(path)!r}, got others, such as "
                f"float8: save them as .safetensors"
            )
        if operation.name == "GLOBAL" and not DENSE_TENSORS.fullmatch(str(argument)):
            raise InputError(
                f"expected a file of dense tensors alone, got {str(path)!r}, which needs code to be run "
                f"({quoted(str(argument).replace(' ', '.'))}): where you trust it, load it and save its state_dict()"
            )
