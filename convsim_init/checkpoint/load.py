"""Loading a checkpoint into a model, and telling what became of every key."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import torch
from torch import nn

from convsim_init.checkpoint.load_report import LoadReport
from convsim_init.checkpoint.match import match
from convsim_init.checkpoint.read import Checkpoint, read_checkpoint
from convsim_init.checkpoint.state_dict import bare_key, module_versions, with_versions
from convsim_init.errors import InputError, RunError
from convsim_init.layers.find import unwrap
from convsim_init.report.table import shape_text
from convsim_init.report.text import quoted, shown

EXAMPLES = 2


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = False) -> LoadReport:
    """Load what of a checkpoint fits a model into it, in place, and tell what did not and why.

    Prefixes are looked after: one is taken off the file's keys, or put before them, or both, if most of them are then
    the model's, whatever the prefix is; so is what DistributedDataParallel and torch.compile add. Where shapes differ,
    as those of a classifier for other classes do, the model keeps its own tensor. The model's dtypes, devices and
    ``requires_grad`` stay. If it fails, the model is as it was.

    Args:
        model: Any module; DistributedDataParallel and torch.compile wrappers are looked through.
        path: Ends in ``.safetensors``, or in ``.pt`` or ``.pth`` for a file of `torch.save`.
        strict: Refuse a file that is not complete, instead of reporting what it lacks.

    Returns:
        What matched and what did not; look at its ``complete``.

    Raises:
        InputError: If the file cannot be read, none of its tensors fits, or, with ``strict``, not all do; if the model
            is lazy or its tensors are on the meta device, where nothing can be loaded.
        RunError: If the model does not let its tensors be written.

    Examples:
        >>> path = ci.save_checkpoint(nn.Conv2d(3, 8, 3), "init.pt", prefix="stem.", overwrite=True)
        >>> ci.load_checkpoint(nn.Conv2d(3, 8, 3), path).complete
        True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a module to load into, got {type(model).__name__}: pass the model first")
    checkpoint = read_checkpoint(path)
    report = match(checkpoint, model, file=str(path))
    if not report.matched:
        own = {key: list(getattr(value, "shape", [])) for key, value in unwrap(model).state_dict().items()}
        theirs = {key: list(value.shape) for key, value in checkpoint.tensors.items()}
        raise InputError(
            f"expected tensors of {report.model} such as {_examples(own)}, got {report.file!r} with "
            f"{_examples(theirs)}, none of which fits: name the file made for this model"
        )
    if strict and not report.complete:
        raise InputError(f"expected a file that is complete for the model, got {'; '.join(str(report).splitlines())}")
    _write(model, {key: checkpoint.tensors[source] for key, source in report.matched.items()})
    return report


def verify_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> LoadReport:
    """What `load_checkpoint` would report; ``exact`` tells whether strict loaders take the file.

    Where all seems well the model's own ``load_state_dict`` has the last word: the weights are then the file's.

    Args:
        model: Any module; one on the meta device has nothing loaded into it, and no last word.
        path: As for `load_checkpoint`.
        name: What to call the model. Default: its class.

    Raises:
        InputError: If the file cannot be read, or the model is lazy.
    """
    checkpoint = read_checkpoint(path)
    report = match(checkpoint, model, file=str(path), name=name)
    return replace(report, refused=_refusal(model, checkpoint)) if report.exact else report


def _refusal(model: nn.Module, checkpoint: Checkpoint) -> str:
    inner = unwrap(model)
    if any(tensor.is_meta for tensor in (*inner.parameters(), *inner.buffers())):
        return ""
    try:
        inner.load_state_dict(with_versions(checkpoint.tensors, checkpoint.versions), strict=True)
    except Exception as error:  # whatever a module's own loading raises
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _write(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    inner = unwrap(model)
    own = {key: value for key, value in inner.state_dict().items() if bare_key(key) in tensors}
    for key, value in own.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise InputError(
                f"{shown(key)}: expected a tensor with data, got one on the meta device: call to_empty first"
            )
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in own.items()}
    try:
        fitting = {key: tensors[bare_key(key)] for key in own}
        inner.load_state_dict(with_versions(fitting, module_versions(model)), strict=False)
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # again of the tensors that cannot be written
            inner.load_state_dict(before, strict=False)
        if isinstance(error, RuntimeError):
            raise RunError(f"the model's tensors cannot be written, it is as it was: {error}") from error
        raise


def _examples(shapes: dict[str, list[int]]) -> str:
    some = [f"{quoted(key)} ({shape_text(shape) or 'scalar'})" for key, shape in list(shapes.items())[:EXAMPLES]]
    return " and ".join(some) or "none"
