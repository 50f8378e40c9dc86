"""Loading a checkpoint into a model, and reporting what became of every key."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from convsim_init.checkpoint.load_report import LoadReport
from convsim_init.checkpoint.match import match
from convsim_init.checkpoint.read import Checkpoint, read_checkpoint
from convsim_init.checkpoint.state_dict import with_versions
from convsim_init.errors import InputError, RunError
from convsim_init.functional.dtypes import equal
from convsim_init.layers import tree
from convsim_init.layers.forward.copies import Copying
from convsim_init.layers.memory import has_no_data, memories, write_values
from convsim_init.layers.names import bare_name, unwrap
from convsim_init.report.table import shape_text
from convsim_init.report.text import error_text, quoted, shown

EXAMPLES = 2  # keys of each side that an error names


@dataclass(frozen=True)
class _Outcome:
    """What a model's own loading says of a state dict."""

    refused: str | None = None  # its error; None if it raised none
    missing: Collection[str] | None = None  # keys, None where it does not tell
    unexpected: Collection[str] | None = None


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = False, key: str | None = None
) -> LoadReport:
    """Load what of a checkpoint fits a model into it, in place, and report what did not and why.

    A file that the model's own ``load_state_dict`` takes strictly is loaded by it, unchanged. For any other file
    prefixes are adapted: one is taken off the file's keys, or put before them, or both, if most of the keys are then
    the model's. What DistributedDataParallel, FSDP, activation checkpointing and torch.compile add to keys is taken
    off, too. Where shapes differ, as those of a classifier for another number of classes do, the model keeps its own
    tensor. The model's dtypes, devices and ``requires_grad`` stay. If loading fails, the model is as it was.

    Args:
        model: Any module; wrappers such as DistributedDataParallel and torch.compile are looked through.
        path: A file of safetensors or of `torch.save`, as its content says, with one of the usual suffixes, such as
            ``.safetensors``, ``.pt`` or ``.ckpt``; or a folder of Hugging Face or `torch.distributed.checkpoint`.
        strict: Refuse a file that is not complete, instead of reporting what it lacks.
        key: Key of the state dict in the file, or the prefix of one of several networks in it. Default: a
            usual key such as ``"state_dict"``, or the only one.

    Returns:
        What matched and what did not; look at its ``complete``.

    Raises:
        InputError: If the file cannot be read, none of its tensors fits, or, with ``strict``, not all
            do; if the model is lazy or its tensors are on the meta device, where nothing can be loaded.
        RunError: If the model does not let its tensors be written.

    Examples:
        >>> path = ci.save_checkpoint(nn.Conv2d(3, 8, 3), "init.pt", prefix="stem.", overwrite=True)
        >>> ci.load_checkpoint(nn.Conv2d(3, 8, 3), path).complete
        True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a module to load into, got {type(model).__name__}: pass the model first")
    checkpoint = read_checkpoint(path, key)
    report, state = _rehearse(model, checkpoint, file=str(path))
    if not report.matched and not report.converted:
        own, theirs = _examples(unwrap(model).state_dict()), _examples(checkpoint.tensors)
        raise InputError(
            f"expected tensors of {report.model} such as {own}, got {report.file!r} with {theirs}, none of which fits: "
            "name the file made for this model"
        )
    if strict and not report.complete:
        raise InputError(f"expected a file that is complete for the model, got {'; '.join(str(report).splitlines())}")
    _write(unwrap(model), state)
    return report


def verify_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None, key: str | None = None
) -> LoadReport:
    """What `load_checkpoint` would report; ``exact`` tells whether strict loaders take the file.

    The model may be on the meta device, and is not changed; its name in the report is by default its class. A file that
    cannot be read and a lazy model are an `InputError`.
    """
    return _rehearse(model, read_checkpoint(path, key), file=str(path), name=name)[0]


def _rehearse(
    model: nn.Module, checkpoint: Checkpoint, *, file: str, name: str | None = None
) -> tuple[LoadReport, Mapping[str, Tensor]]:
    """Compare a checkpoint with a model and load it into a copy, as the model's own loading has the last word."""
    inner = unwrap(model)
    report = match(checkpoint, model, file=file, name=name)
    with ExitStack() as stack:
        try:
            # deepcopy refuses tensors that have a history of gradients.
            with Copying(lambda tensor: None if tensor.is_leaf else tensor.detach().clone()):
                trial = copy.deepcopy(inner)
        except Exception:  # whatever the model holds that cannot be copied, such as a lock
            trial = inner
            stack.enter_context(_backup(inner))
        state = with_versions({**checkpoint.tensors, **checkpoint.extra}, checkpoint.versions)
        outcome = _try_loading(trial, state, strict=True)
        # A model whose strict loading takes an empty state dict tells nothing by taking a file.
        if outcome.refused is None and _try_loading(trial, {}, strict=True).refused is not None:
            report = replace(_settled(report, set(), set()), removed=[], added="")
            return _less_ignored(report, checkpoint.tensors, inner, _changes(inner, trial), is_strict=True), state
        if outcome.refused is not None and report.exact:
            report = replace(report, refused=outcome.refused)
        return _try_moved(report, checkpoint, inner, trial, is_strict=outcome.refused is not None)


def _try_moved(
    report: LoadReport, checkpoint: Checkpoint, inner: nn.Module, trial: nn.Module, *, is_strict: bool
) -> tuple[LoadReport, Mapping[str, Tensor]]:
    """Load what fits of the file, its prefix exchanged for the model's, into the copy."""
    # Keys as the model has them, unexpected ones too: its own loading may know what to do with them.
    own = inner.state_dict()
    real = {bare_name(key): key for key in own}
    # Two entries under one key would be one: what matched goes before what is only moved there.
    taken = {real[key] for key in (*report.matched, *report.mismatched)}
    moved = {source: key for source in report.unexpected if (key := _moved(source, report)) not in taken}
    fitting = {source: real[key] for key, source in report.matched.items()} | moved
    rest = checkpoint.tensors.keys() - fitting.keys() - set(report.unexpected)
    others = {source: real[key] for source in rest if (key := _moved(source, report)) in report.mismatched}
    extra = {_moved(source, report): value for source, value in checkpoint.extra.items()}
    # The model's own loading may know what to do with other shapes, too; if it refuses them, they are left out.
    # The file's own versions say which conversions it needs; some modules refuse a file without any.
    noted = (_moved_versions(checkpoint.versions, report, inner), getattr(own, "_metadata", None))
    for keys, versions in product([fitting | others, fitting] if others else [fitting], noted):
        state = with_versions({key: checkpoint.tensors[source] for source, key in keys.items()} | extra, versions)
        outcome = _try_loading(trial, state, strict=False)
        if outcome.refused is not None:
            continue
        changes = _changes(inner, trial)
        if outcome.missing is not None and outcome.unexpected is not None:
            left = {source for source in checkpoint.tensors if keys.get(source) in {None, *outcome.unexpected}}
            report = _settled(report, dict.fromkeys(map(bare_name, outcome.missing)), left)
        elif any(changes.get(key) for key in report.missing):  # it takes other names, and does not return them
            absent = [*report.missing, *report.mismatched]
            report = _settled(report, {*report.tied, *(key for key in absent if not changes.get(key))}, set())
        return _less_ignored(report, checkpoint.tensors, inner, changes, is_strict=is_strict), state
    return report, state


def _try_loading(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool) -> _Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the meta device nothing is loaded, which is all right here
        try:
            keys = _load(model, state, strict=strict)
        except Exception as error:  # whatever a module's own loading raises
            # Not the error, which holds the frames of the callers that hold it, and so the copy and the file.
            return _Outcome(refused=error_text(error))
    return _Outcome(None, getattr(keys, "missing_keys", None), getattr(keys, "unexpected_keys", None))


def _load(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool) -> object:
    """What a model's own loading returns, which need not know of ``strict``."""
    try:
        inspect.signature(model.load_state_dict).bind(state, strict=strict)
    except (TypeError, ValueError):
        return model.load_state_dict(state)
    return model.load_state_dict(state, strict=strict)


def _settled(report: LoadReport, missing: Collection[str], unexpected: Collection[str]) -> LoadReport:
    """The report, corrected by the keys that the model's own loading misses, and those of the file that it ignores."""
    # What matched may be missing all the same: a model may rename or drop keys as it loads them.
    absent = [*report.missing, *report.tied, *report.mismatched]
    matched = {key: source for key, source in report.matched.items() if key not in missing and source not in unexpected}
    lost = [source for key, source in report.matched.items() if key not in matched and source in unexpected]
    return replace(
        report,
        matched=matched,
        supplied=[key for key in absent if key not in missing],
        converted=[key for key in report.unexpected if key not in unexpected],
        missing=[*(key for key in report.missing if key in missing), *(key for key in missing if key not in absent)],
        tied={key: twin for key, twin in report.tied.items() if key in missing},
        mismatched={key: shapes for key, shapes in report.mismatched.items() if key in missing},
        unexpected=[*(key for key in report.unexpected if key in unexpected), *lost],
        renamed={old: new for old, new in report.renamed.items() if old in unexpected and new in missing},
    )


def _changes(model: nn.Module, loaded: nn.Module) -> dict[str, bool]:
    """Whether a model's own loading changed its tensors in a copy, by their keys, where that can be told."""
    before, after = _bare_state(model), _bare_state(loaded)
    # A model that could not be copied was tried itself: there is no before to compare with.
    keys = before.keys() & after.keys() if model is not loaded else ()
    return {key: not equal(before[key], after[key]) for key in keys if _are_comparable(before[key], after[key])}


def _bare_state(model: nn.Module) -> dict[str, Tensor]:
    return {bare_name(key): value for key, value in model.state_dict().items()}


def _are_comparable(*values: object) -> bool:
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_quantized]
    # What is lazy, sparse, sharded or without data has no memory, and nothing to compare.
    return len(memories(tensors)) == len(values)


def _less_ignored(
    report: LoadReport, tensors: Mapping[str, Tensor], model: nn.Module, changes: Mapping[str, bool], *, is_strict: bool
) -> LoadReport:
    """The report without matched keys that the model's own loading ignored; if it is strict it does so on purpose."""
    own = _bare_state(model)
    ignored = {
        key: source
        for key, source in report.matched.items()
        if changes.get(key) is False and not equal(own[key], tensors[source].to(own[key]))
    }
    left = replace(report, matched={key: source for key, source in report.matched.items() if key not in ignored})
    keys, sources = list(ignored), list(ignored.values())
    if is_strict:
        return replace(left, supplied=report.supplied + keys, converted=report.converted + sources)
    return replace(left, missing=report.missing + keys, unexpected=report.unexpected + sources)


def _moved(key: str, report: LoadReport) -> str:
    """A key of the file, or a module's name with a dot behind it, with the model's prefix in place of the file's."""
    # Without wrappers' prefixes, which the bare key has lost already.
    removed = "".join(prefix for prefix in report.removed if bare_name(prefix))
    bare = bare_name(key)
    return report.added + bare.removeprefix(removed) if bare.startswith(removed) else bare


def _moved_versions(
    versions: Mapping[str, object] | None, report: LoadReport, model: nn.Module
) -> Mapping[str, object] | None:
    if versions is None:
        return None
    real = {bare_name(name): name for name, _ in tree.named_modules(model)}
    names = {name: _moved(f"{name}." if name else "", report).removesuffix(".") for name in versions}
    return {real.get(names[name], names[name]): value for name, value in versions.items()}


def _write(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    # Copying to a tensor without data does nothing, without an error.
    for key in state:
        tensor = own.get(key)
        if isinstance(tensor, Tensor) and has_no_data(tensor):
            raise InputError(
                f"{shown(key)}: expected a tensor with data, got one on the meta device: call to_empty first"
            )
        if isinstance(tensor, Tensor) and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise InputError(
                f"{shown(key)}: expected a tensor that can be written, got one made under torch.inference_mode: load "
                "there, too"
            )
    with _backup(model) as restoring:  # after an interrupt, too, which may leave half of the weights written
        try:
            _load(model, state, strict=False)
        except Exception as error:
            raise RunError(
                f"the model's tensors cannot be written, it is as it was: its own loading raised {error_text(error)}"
            ) from error
        restoring.pop_all()


def _backup(model: nn.Module) -> ExitStack:
    """Context that ends with a model's parameters and buffers given back the values that they have now."""
    restoring = ExitStack()
    for tensor in (*tree.parameters(model), *tree.buffers(model)):
        if not has_no_data(tensor):
            restoring.callback(_restore, tensor, tensor.detach().clone())
    return restoring


@torch.no_grad()
def _restore(tensor: Tensor, value: Tensor) -> None:
    if not equal(tensor, value):  # others may not let themselves be written
        write_values(tensor, value)


def _examples(state: Mapping[str, object]) -> str:
    shapes = ((key, getattr(value, "shape", ())) for key, value in list(state.items())[:EXAMPLES])
    return " and ".join(f"{quoted(key)} ({shape_text(shape)})" for key, shape in shapes) or "none"
