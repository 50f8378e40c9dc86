"""FILEs and MODELs: checking them before torch is loaded, and loading them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convsim_init.errors import InputError
from convsim_init.files.sources import (
    CHECKPOINT,
    READ_SUFFIXES,
    check_source,
    folder_files,
    is_source,
    of_another_kind,
    without_weights,
)
from convsim_init.models.build import build_model, check_model, find_model
from convsim_init.models.libraries import resolve
from convsim_init.models.spec import CONFIG
from convsim_init.models.zoo.catalog import MODELS
from convsim_init.report.record import read_record
from convsim_init.report.text import PATH, quoted, shown, some

from .arguments import OWN_OPTIONS
from .config import is_by_hand
from .signals import exit_on_signal

if TYPE_CHECKING:
    import torch

INFERRED = "layers of a file are inferred from names and shapes; --like MODEL settles which are grouped or transposed"


@dataclass(frozen=True)
class ModelOptions:
    """How a MODEL is built and a FILE is read."""

    seed: int | None  # None if the user gave none
    arguments: dict[str, Any]  # further arguments of `build_model`
    like: str | None = None  # model that a file's weights belong to
    key: str | None = None  # entry of a file that holds the weights

    def check(self, spec: str) -> None:
        """Refuse, without torch, a spec that is no model or cannot be built like this."""
        check_model(spec, **self.arguments)

    def build(self, spec: str) -> torch.nn.Module:
        """Build the model."""
        return build_model(spec, seed=self.seed or 0, **self.arguments)


@dataclass(frozen=True)
class Loaded:
    """The content of a FILE or a MODEL."""

    content: torch.nn.Module | Mapping[str, torch.Tensor]  # the model, or the state dict in the file
    name: str  # the spec; a bare name with the library that it was found in
    seed: int | None = None  # seed of the drawn weights; None for a file
    remarks: list[str] = field(default_factory=list)  # how the spec was understood
    built: str | None = None  # spec that the model was built from
    filled: frozenset[str] = frozenset()  # modules that the model's own code filled, as by `load_state_dict`


def is_file(spec: str) -> bool:
    """Whether a spec is a checkpoint (a file or folder) and no model; ``./resnet18`` is never the built-in model."""
    return spec not in MODELS and is_source(spec)


def check_sources(specs: Sequence[str], how: ModelOptions, *, drawn: bool = False) -> None:
    """Refuse, without torch, specs that are no file or model, and options of no use; files may be `drawn` anew."""
    files = [spec for spec in specs if is_file(spec)]
    for spec in specs:
        _check_source(spec, how)
    if not files and is_by_hand("key"):
        raise click.UsageError("--key: expected a FILE that has that entry, got none: leave it out")
    if how.like is not None:
        if not files:
            raise click.UsageError("--like: expected a FILE that is like that model, got none")
        how.check(how.like)
    given = [option for name, option in (OWN_OPTIONS | {"model_args": "--model-arg"}).items() if is_by_hand(name)]
    # A file that is drawn anew uses the seed, and the model that a file is like uses the other options.
    unused = [option for option in given if not (drawn if option == "--seed" else how.like)]
    if unused and len(files) == len(specs):
        hint = "" if unused == ["--seed"] else "; --like names the model it belongs to"
        raise click.UsageError(f"{', '.join(unused)}: a file has its weights already{hint}")


def check_found(specs: Sequence[str], like: str | None) -> None:
    """Refuse models that their library or module does not have, before any is built."""
    models = [spec for spec in [*specs, like] if spec is not None and not is_file(spec)]
    if models:
        with exit_on_signal():
            import torch  # noqa: F401
        for model in dict.fromkeys(models):
            find_model(model)


def load(spec: str, how: ModelOptions, *, convolutions_only: bool = False) -> Loaded:
    """Build a model, or read a file: its state dict or, with --like, the model that its weights belong to.

    The file has to be complete for that model, or only to have all of its convolutions.
    """
    if is_file(spec) and how.like is None:
        return _load_file(spec, how.key)
    from convsim_init.checkpoint.load import load_checkpoint
    from convsim_init.layers import tree
    from convsim_init.layers.find import find_convolutions
    from convsim_init.layers.names import bare_name
    from convsim_init.tracking.patching import noting_loaded

    found = resolve(how.like if how.like is not None and is_file(spec) else spec)
    name, remarks = found.text, [found.remark] if found.remark else []
    loaded: list[torch.nn.Module] = []
    with noting_loaded(loaded.append):
        model = how.build(name)
    if is_file(spec):
        report = load_checkpoint(model, spec, strict=not convolutions_only, key=how.key)
        lines, lacking = str(report).splitlines(), (*report.missing, *report.mismatched, *report.non_finite)
        prefixes = tuple(f"{layer}.".lstrip(".") for layer, _ in find_convolutions(model))
        if any(key.startswith(prefixes) for key in lacking):
            raise InputError(f"expected a file with all convolutions of the model, got {'; '.join(lines)}")
        return Loaded(model, spec, None, [*remarks, *_origin(spec), *lines], built=name)
    parts = set(map(id, loaded))
    filled = frozenset(bare_name(name) for name, part in tree.named_modules(model) if id(part) in parts)
    return Loaded(model, name, how.seed or 0, remarks, built=name, filled=filled)


def _check_source(spec: str, how: ModelOptions) -> None:
    rest = os.path.splitdrive(spec)[1]  # without a drive of Windows, which has a colon
    if is_file(spec):
        check_source(spec)
    elif ":" not in rest and (error := of_another_kind(Path(spec))):
        raise error
    elif ":" not in rest and Path(spec).suffix != ".py" and isfile(spec):
        raise InputError(
            f"expected a file name ending in {', '.join(READ_SUFFIXES)} or a model's name, got {spec!r}: {CHECKPOINT}"
        )
    # A name without a separator may be a model's, even if a folder has the same name.
    elif ":" not in rest and {"/", os.sep} & set(spec) and isdir(spec) and not isfile(Path(spec, CONFIG)):
        raise without_weights(spec)
    else:
        how.check(spec)


def _load_file(path: str, key: str | None) -> Loaded:
    from convsim_init.checkpoint.read import bare_tensors, read_checkpoint
    from convsim_init.layers.inferred import infer_layers

    checkpoint = read_checkpoint(path, key)
    state = bare_tensors(checkpoint, path)
    if not any(infer_layers(state)):
        raise InputError(
            f"expected a file with convolution weights, of rank 3 to 5, got {shown(path, PATH)!r}, none of whose "
            f"{len(state)} tensors is one: name that of a convolutional network"
        )
    remarks, extra = [*_origin(path), INFERRED], [*checkpoint.extra, *checkpoint.unread]
    if checkpoint.wrapper:
        more = f"; --key takes another: {some(map(shown, checkpoint.others))}" if checkpoint.others else ""
        remarks.append(f"the weights are those under {shown(checkpoint.wrapper)!r}{more}")
    remarks += [f"left out, for it is no tensor: {some(map(shown, extra))}"] if extra else []
    remarks += _prefix_remarks(list(checkpoint.tensors), list(state), path)
    return Loaded(state, path, None, remarks)


def _origin(path: str) -> list[str]:
    """Remarks on which of a folder's files was read, and on the run that made it, if this program wrote it."""
    names = [file.name for file in folder_files(Path(path))]
    taken = [f"{names[0]} was read, and not {some(names[1:])}"] if names[1:] else []
    if (part := re.search(r"-(\d+)-of-(\d+)$", Path(path).stem)) and int(part[2]) > 1:
        which = f"{shown(path, PATH)} is part {int(part[1])} of {int(part[2])} of a checkpoint"
        taken.append(f"{which}: its folder, or the index in it, names the whole")
    record = read_record(Path(path))
    if not {"version", "model", "seed", "base"} <= record.keys():
        return taken
    options = record["options"] if isinstance(record.get("options"), dict) else {}
    base = record["base"] if record["base"] != "model" else None
    chosen = {"": record["model"], "seed": record["seed"], "base": base, **options}  # of Python's report none
    made = ", ".join(f"{name} {value}".lstrip() for name, value in chosen.items() if value is not None)
    program = f"written by convsim-init {shown(str(record['version']))}"
    return [*taken, f"{program}: {shown(made, PATH)}" if made else program]


def _prefix_remarks(keys: Sequence[str], bare: Sequence[str], path: str) -> list[str]:
    """A remark on what was taken off a file's keys, if anything was."""
    if keys == bare:
        return []
    prefix, file = keys[0].removesuffix(bare[0]), shown(path, PATH)
    if all(key == prefix + bare_key for key, bare_key in zip(keys, bare, strict=True)):
        return [f"{quoted(prefix)} was taken off every key of {file}; --prefix {shown(prefix)} puts it back"]
    key, bare_key = next(pair for pair in zip(keys, bare, strict=True) if pair[0] != pair[1])
    return [f"{file} was read without what wrappers add to its keys: {quoted(bare_key)} for {quoted(key)}"]
