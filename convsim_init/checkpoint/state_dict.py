"""A state dict as files want it: bare keys, and plain tensors that share no memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsim_init.errors import InputError
from convsim_init.functional.bank import all_finite, filter_norms
from convsim_init.functional.dtypes import converts, name_of, narrows
from convsim_init.layers.memory import has_no_data, is_sharded, is_wrapper, refuse_fake_mode
from convsim_init.layers.names import bare_entries, bare_name, split_weight_key, unwrap
from convsim_init.layers.weights import KERNEL_RANKS
from convsim_init.report.patterns import check_patterns, matches
from convsim_init.report.report import Report
from convsim_init.report.text import has_surrogates, quoted, shown, some

LEAVE_OUT = "leave it out with exclude (--without in the shell)"


def state_entries(source: nn.Module | Mapping[str, object]) -> dict[str, object]:
    """The entries of a model's state dict, or of the one given, without what wrappers add to their keys.

    Raises:
        InputError: If ``source`` is neither a module nor a mapping of bare names that are strings and differ.
    """
    refuse_fake_mode()
    if isinstance(source, nn.Module):
        return bare_entries(unwrap(source).state_dict(), parallel=False)
    if not isinstance(source, Mapping):
        raise InputError(f"expected a module or its state dict to write, got {type(source).__name__}")
    return bare_entries(source)


def module_versions(source: nn.Module | Mapping[str, object], prefix: str = "") -> OrderedDict[str, object] | None:
    """What modules note beside a state dict's tensors, such as their versions, under bare names.

    Some refuse a state dict without it. It travels in files of `torch.save` alone.
    """
    state = unwrap(source).state_dict() if isinstance(source, nn.Module) else source
    noted = getattr(state, "_metadata", None)
    if not isinstance(noted, Mapping):
        return None
    names = {name: f"{prefix}{bare_name(name)}".removesuffix(".") for name in noted if isinstance(name, str)}
    return OrderedDict((names[name], noted[name]) for name in names)


def with_versions(tensors: Mapping[str, Tensor], versions: Mapping[str, object] | None) -> OrderedDict[str, Tensor]:
    """A state dict that carries what `module_versions` returned."""
    state = OrderedDict(tensors)
    if versions is not None:
        state._metadata = versions  # type: ignore[attr-defined]
    return state


def without_keys(entries: Mapping[str, object], exclude: Sequence[str]) -> dict[str, object]:
    """The entries whose keys match none of these shell patterns.

    Raises:
        InputError: If a pattern matches no key, or no key is left.
    """
    check_patterns("exclude", exclude, entries, kind="key", refusal="expected a pattern that a key matches, got")
    kept = {key: value for key, value in entries.items() if not matches(key, exclude)}
    if entries and not kept:
        raise InputError(f"expected patterns that leave a key, got {', '.join(map(quoted, exclude))}: all keys match")
    return kept


def changed_entries(entries: Mapping[str, object], report: Report | None) -> dict[str, object]:
    """The entries of the convolutions that a report says were changed; tied ones under each of their names.

    Raises:
        InputError: If there is no report, it names no changed convolution, or one that is not among the entries.
    """
    if report is None:
        raise InputError("convs_only: expected the report that says which convolutions were changed, got none")
    layers = {layer.name for layer in report.layers if layer.after or layer.factor is not None}
    if not layers:
        raise InputError("convs_only: expected a report of changed convolutions, got one that changed none")
    owners = {key: parts[0] for key in entries if (parts := split_weight_key(key))}
    missing = layers - set(owners.values())
    if missing:
        raise InputError(f"convs_only: the report's layer {min(missing)!r} is not here: pass this model's own report")
    memory = {_memory(entries[key]) for key, layer in owners.items() if layer in layers}
    return {key: value for key, value in entries.items() if owners.get(key) in layers or _memory(value) in memory}


def plain_tensors(entries: Mapping[str, object], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The entries as finite contiguous tensors on the CPU, each with memory of its own; floating ones in that dtype.

    Raises:
        InputError: If there are no entries, one is anything but a dense tensor of finite numbers, or ``dtype`` is not
            a floating one.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and converts(dtype)):
        raise InputError(f"expected dtype to be a floating one such as torch.float32, or None, got {dtype!r}")
    if not entries:
        raise InputError("expected weights to write, got an empty state dict")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in entries.items():
        plain = check_entry(key, value).detach().resolve_conj().resolve_neg().cpu()
        tensor = _converted(key, plain, dtype)
        tensor = tensor.reshape(-1).view(tensor.shape)  # contiguous() keeps odd strides where a dimension is 1
        # What shares memory with another entry, or with more than itself, would be written as an alias or in excess.
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def faded_remarks(entries: Mapping[str, object], tensors: Mapping[str, Tensor]) -> list[str]:
    """A remark on filters that are too small for the dtype they were converted to, by `plain_tensors`."""
    faded = [key for key, tensor in tensors.items() if fades(key, entries[key], tensor)]
    if not faded:
        return []
    text = f"filters so small that {name_of(tensors[faded[0]].dtype)} rounds them away in the file"
    return [f"{text}: {some(map(shown, faded))}; another dtype keeps them"]


def fades(key: str, source: object, converted: Tensor) -> bool:
    """Whether a conversion to a dtype of less range or precision changes some filter by more than it rounds numbers."""
    if split_weight_key(key) is None or not isinstance(source, Tensor) or source.dim() not in KERNEL_RANKS:
        return False
    if not (source.is_floating_point() and converted.is_floating_point() and narrows(source.dtype, converted.dtype)):
        return False
    weight = source.detach().cpu().double()
    change = weight - converted.double()
    # Rounding changes a number by up to eps / 2 of it: a norm that changes more is out of range.
    tolerance = 4 * torch.finfo(converted.dtype).eps
    # The key does not tell whether filters lie along dimension 0 or, transposed, along 1.
    axes = [axis for axis in (0, 1) if weight.numel() > weight.shape[axis]]  # single numbers may be small by chance
    norms = ([filter_norms(tensor.movedim(axis, 0)[None]) for tensor in (change, weight)] for axis in axes)
    return any(bool((change_norms > tolerance * weight_norms).any()) for change_norms, weight_norms in norms)


def _memory(value: object) -> object:
    """What is equal for two entries that are the same tensor."""
    if not isinstance(value, Tensor) or is_lazy(value) or value.layout is not torch.strided:
        return id(value)
    return value.device, value.data_ptr(), value.shape


def is_extra_state(key: object) -> bool:
    """Whether a key is that of a module's extra state, which may be of any type."""
    return isinstance(key, str) and f".{key}".endswith("._extra_state")


def check_entry(key: str, value: object) -> Tensor:
    """The entry; InputError if `plain_tensors` would refuse it for anything but its numbers."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        holds_tensors = isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())
        hint = "pass the state dict inside it" if holds_tensors else LEAVE_OUT
        problem = f"a tensor in the state dict, got {kind}: {hint}"
        if is_extra_state(key):
            extra = f"a module's extra state of type {kind}, which no file of tensors holds"
            problem = f"only tensors in the state dict, got {extra}: {LEAVE_OUT}"
    elif has_surrogates(key):
        problem = f"a key of Unicode letters, got others: rename it, or {LEAVE_OUT}"
    elif is_lazy(value):
        problem = "a tensor with data, got a lazy one: run a forward pass first"
    elif has_no_data(value):
        problem = "a tensor with data, got one on the meta device: initialize it first"
    elif is_sharded(value):
        gathering = "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        problem = f"a whole tensor, got one that is sharded over processes: gather the state dict with {gathering}"
    elif value.layout is not torch.strided or value.is_quantized or is_wrapper(value):
        problem = "a dense tensor, got a sparse, quantized or wrapped one: convert it first"
    else:
        return value
    raise InputError(f"{shown(key)}: expected {problem}")


def is_finite(key: str, tensor: Tensor) -> bool:
    """Whether an entry holds neither infinities nor NaN; one that is no weight may hold infinities and zeros alone."""
    if _all_finite(tensor):
        return True
    if key.rpartition(".")[2] in ("weight", "bias", "running_mean", "running_var"):
        return False
    # Masks of attention are such entries, and the ranges of observers that have seen nothing yet.
    values = _readable(tensor)
    return bool((values.isinf() | (values == 0)).all())


def _converted(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point() or not converts(tensor.dtype):
        return tensor
    converted = tensor.to(dtype or tensor.dtype)
    fits = _all_finite(converted)
    # Single small numbers may become zero, but not the whole tensor.
    if fits and (not tensor.any() or converted.any()):
        return converted
    if fits or _all_finite(tensor):
        got = "smaller ones, which would all be zero" if fits else "larger ones"
        expected = f"{shown(key)}: expected numbers in the range of {converted.dtype}"
        raise InputError(f"{expected}, got {got}: choose {name_of(tensor.dtype)}")
    if not is_finite(key, tensor):
        raise InputError(f"{shown(key)}: expected finite numbers, got infinities or NaN: draw it anew, or {LEAVE_OUT}")
    return converted


def _all_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return bool(tensor.isfinite().all())
    # Of other dtypes torch cannot read the numbers, but float4 has neither infinities nor NaN.
    return tensor.numel() == 0 or not converts(tensor.dtype) or all_finite(_readable(tensor))


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, converted where torch cannot tell whether its numbers are finite, as for float8."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
