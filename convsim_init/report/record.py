"""The full record of a run as a JSON file: docs/report.md has its schema. Imports no torch."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from convsim_init.files.sources import MAX_HEADER, METADATA_KEY, TORCH_SUFFIXES, folder_file, safetensors_header
from convsim_init.report.report import Report, json_ready
from convsim_init.version import __version__, installed_version

FORMAT_VERSION = 1
SUFFIXES = (".json",)
TORCH_RECORD = "archive/convsim_init.json"  # in a file of torch.save, which is a zip archive


def run_record(report: Report) -> dict[str, Any]:
    """Everything known of a run as plain data: the report, the loss at each step, versions."""
    data = report.to_dict()
    layers = [plain | {"losses": layer.losses} for plain, layer in zip(data["layers"], report.layers, strict=True)]
    versions = {"convsim-init": __version__, "torch": installed_version("torch"), "python": platform.python_version()}
    return {"format_version": FORMAT_VERSION, "versions": versions, **data, "layers": layers}


def record_text(report: Report) -> str:
    """The record of a run as the text of a JSON file."""
    return json_text(run_record(report), indent=1) + "\n"


def read_record(path: Path) -> dict[str, Any]:
    """What a record or a file of weights says of the run that made it; empty if it says nothing."""
    try:
        if path.suffix in SUFFIXES:
            record = json.loads(path.read_bytes())
        elif path.suffix in TORCH_SUFFIXES:
            with ZipFile(path) as archive, archive.open(TORCH_RECORD) as file:
                # The entry may be of any size when it is unpacked.
                record = json.loads(file.read(MAX_HEADER))
        else:
            record = json.loads(safetensors_header(folder_file(path) or path)[METADATA_KEY]["convsim_init"])
    except Exception:  # damaged files raise errors of many kinds
        return {}
    return record if isinstance(record, dict) else {}


def json_text(data: object, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Plain data as JSON; numbers that are not finite, which it does not have, are null."""
    return json.dumps(json_ready(data), indent=indent, sort_keys=sort_keys, allow_nan=False)
