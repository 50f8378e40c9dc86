"""Coverage-guided fuzzing of checkpoint reading; runs until it is stopped or something breaks.

    pip install atheris && python tests/fuzz/reading.py [corpus folder] [options of libFuzzer, such as -runs=1000000]

The first byte of an input chooses what the rest of it is: a whole file, the header of a safetensors file, the pickle
in a zip archive or in an old file of `torch.save`, whose checksums and storages blind mutation would never get right,
the index of a folder of Hugging Face or the metadata of one of `torch.distributed.checkpoint`. Whatever it is, reading
gives dense tensors that are no larger than the file, or an InputError of one line, takes no memory to speak of, and
runs nothing.
"""

from __future__ import annotations

import os
import pickle
import resource
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["convsim_init.checkpoint"]):
    from convsim_init.checkpoint.read import bare_tensors, read_checkpoint
    from convsim_init.errors import InputError
    from convsim_init.metrics.measure import measure

import safetensors.torch
import torch
from seeds import HEAD, KINDS, TENSORS, seeds, write_distributed

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
MORE_MEMORY = 64 * 1024  # KiB that all runs together may take beyond the first ones; no file is larger than 64 KiB
BESIDE = 20_000  # bytes of files beside an index
peak = 0
runs = 0


def write(data: bytes) -> Path:
    kind, rest = KINDS[data[0] % len(KINDS)], data[1:]
    path = FOLDER / ("a.safetensors" if kind in ("safetensors", "header") else "a.pt")
    if kind == "header":
        rest = len(rest).to_bytes(8, "little") + rest + bytes(256)
    if kind == "legacy":
        storages = ((256 // 4).to_bytes(8, "little") + bytes(256)) * 3
        rest = HEAD + rest + pickle.dumps(["0", "1", "2"], 2) + storages
    if kind == "index":
        path = FOLDER / "model.safetensors.index.json"
    if kind == "metadata":
        path = FOLDER / "distributed" / ".metadata"
    if kind == "pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", rest)
            archive.writestr("a/byteorder", b"little")
            archive.writestr("a/version", b"3\n")
            for key in range(3):
                archive.writestr(f"a/data/{key}", bytes(256))
    else:
        path.write_bytes(rest)
    return path


def test_one_input(data: bytes) -> None:
    global peak, runs
    if not data:
        return
    path = write(data)
    message = ""
    try:
        tensors = bare_tensors(read_checkpoint(path), path)
        size = path.stat().st_size + BESIDE
        for tensor in tensors.values():
            assert type(tensor) is torch.Tensor
            assert not vars(tensor)
            assert tensor.layout is torch.strided
            assert tensor.nbytes <= size, f"a tensor of {tensor.nbytes} bytes from a file of {size}"
        measure(tensors)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000
    runs += 1
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if runs == 100:
        peak = used
    assert runs <= 100 or used < peak + MORE_MEMORY, f"{used - peak} KiB more than at the start"
    assert not os.listdir(), "something was run"


def main() -> None:
    torch.set_num_threads(1)
    corpus = next((Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if corpus is not None:
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
    write_distributed(FOLDER / "distributed")
    safetensors.torch.save_file(TENSORS, FOLDER / "model-1.safetensors")
    work = FOLDER / "cwd"
    work.mkdir()
    arguments = [argument if argument.startswith("-") else str(Path(argument).resolve()) for argument in sys.argv]
    os.chdir(work)
    atheris.Setup(arguments, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
