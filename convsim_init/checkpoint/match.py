"""Which tensor of a checkpoint belongs to which key of a model, under which prefix, and what stands in the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate, chain

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsim_init.checkpoint.load_report import LoadReport
from convsim_init.checkpoint.read import Checkpoint
from convsim_init.checkpoint.state_dict import fades, is_finite, state_entries
from convsim_init.errors import InputError
from convsim_init.functional.dtypes import converts, equal, name_of, narrows, same_kind
from convsim_init.layers import tree
from convsim_init.layers.names import WRAPPER_PARTS, bare_name, unwrap
from convsim_init.report.text import shown, some

MAX_CANDIDATES = 64  # for one renamed key: comparing names takes time
DEEPEST = 16  # parts of a prefix, so that a key made of dots alone costs no more than others

Shapes = Mapping[str, list[int]]


def match(checkpoint: Checkpoint, model: nn.Module, *, file: str, name: str | None = None) -> LoadReport:
    """Compare the tensors of a checkpoint with the state dict of a model. Neither is changed.

    The model may be on the meta device; DistributedDataParallel and torch.compile are looked through. ``file`` and
    ``name`` stand for the checkpoint and the model in the report; the name is by default the model's class.

    Raises:
        InputError: If the model is lazy: its shapes are not known yet; or the file holds several copies of it, or it
            several copies of what is in the file.
    """
    entries = state_entries(model)
    lazy = next((key for key, value in entries.items() if isinstance(value, Tensor) and is_lazy(value)), None)
    if lazy is not None:
        raise InputError(f"expected a model whose shapes are known, got a lazy {lazy!r}: run a forward pass first")
    raw = {bare_name(key): key for key in checkpoint.tensors}
    if len(raw) < len(checkpoint.tensors):  # two would be the same without what wrappers add
        raw = {key: key for key in checkpoint.tensors}
    theirs = {key: list(checkpoint.tensors[raw[key]].shape) for key in raw}
    own = {key: list(getattr(value, "shape", [])) for key, value in entries.items()}  # extra state may be no tensor

    changed = [source.split(".") for key, source in raw.items() if key != source]
    wrappers = [f"{part}." for part in WRAPPER_PARTS if any(part in parts for parts in changed)]
    twins = _twins(model)
    removed, added = _choose_prefixes(theirs, own, twins, file=file, wrapper=checkpoint.wrapper)
    sources = _sources(theirs, own, removed, added)
    matched = {key: raw[source] for key, source in sources.items() if theirs[source] == own[key]}
    tensors = {key: checkpoint.tensors[source] for key, source in matched.items()}
    absent = [key for key in own if key not in sources]
    used = set(sources.values())
    unexpected = [key for key in theirs if key not in used]
    tied = {key: twin for key in absent for twin in twins.get(key, ()) if twin in matched}
    pairs = {key: (tensors[key], value) for key, value in entries.items() if key in matched}
    dtypes = {
        key: (old.dtype, new.dtype)
        for key, (old, new) in pairs.items()
        # Where torch cannot convert, the model's own loading will say so.
        if isinstance(new, Tensor) and (old.dtype == new.dtype or (converts(old.dtype) and converts(new.dtype)))
    }
    return LoadReport(
        file=file,
        model=name or type(unwrap(model)).__name__,
        expected=len(own),
        wrapper=checkpoint.wrapper,
        others=list(checkpoint.others),
        unread=list(checkpoint.unread),
        removed=[*wrappers, *filter(None, [removed])],
        added=added,
        matched=matched,
        missing=[key for key in absent if key not in tied],
        unexpected=[raw[key] for key in unexpected],
        mismatched={key: (theirs[source], own[key]) for key, source in sources.items() if key not in matched},
        renamed={raw[old]: new for old, new in _renamed(unexpected, absent, theirs, own)},
        tied=tied,
        conflicting=_conflicting(twins, tensors),
        non_finite=[key for key, (_, dtype) in dtypes.items() if not is_finite(key, tensors[key].to(dtype))],
        faded=[key for key, (_, dtype) in dtypes.items() if fades(key, tensors[key], tensors[key].to(dtype))],
        retyped={key: (name_of(old), name_of(new)) for key, (old, new) in dtypes.items() if not same_kind(old, new)},
        narrowed={key: (name_of(old), name_of(new)) for key, (old, new) in dtypes.items() if narrows(old, new)},
    )


def _choose_prefixes(
    theirs: Shapes, own: Shapes, twins: Mapping[str, Sequence[str]], *, file: str, wrapper: str
) -> tuple[str, str]:
    """The prefix to take off the file's keys and the one to put in its place; both empty for another model's file."""
    choices = find_prefixes(theirs, own)
    removed, added = choices[0]
    copies = list(dict.fromkeys(prefix for prefix, _ in choices))  # of the model, in the file
    parts = [added, *(other for _, other in choices[1:] if not _is_tied(added, other, own, twins))]  # of the model
    if len(copies) == len(parts) == 1:
        return removed, added
    fitting = sum(theirs[source] == own[key] for key, source in _sources(theirs, own, removed, added).items())
    # A small model's keys may be in several parts of another, larger one: to ask which is meant
    # would not help there, and neither would one of the prefixes.
    if len(copies) > 1 and 2 * fitting > min(len(theirs), len(own)):
        keys = [f"{wrapper}.{copy}".strip(".") for copy in copies]
        raise InputError(
            f"expected one copy of the model in {file!r}, got {len(copies)}: choose one with key (--key NAME in the "
            f"shell): {some(map(shown, keys))}"
        )
    if len(parts) > 1 and 2 * fitting > len(theirs):
        names = [part.removesuffix(".") for part in parts]
        raise InputError(
            f"expected a file that fits one part of the model, got {file!r}, which fits {len(parts)}: "
            f"{some(map(shown, names))}; load_checkpoint(model.get_submodule({names[0]!r}), ...) loads it into one"
        )
    return "", ""


def _sources(theirs: Shapes, own: Shapes, removed: str, added: str) -> dict[str, str]:
    """For each of the model's keys that is in the file, with its prefix exchanged or as it is, the file's key."""
    moved = {added + key.removeprefix(removed): key for key in theirs if key.startswith(removed)}
    left = theirs.keys() - {moved[key] for key in own if key in moved}
    # A key of the file that is another one with the prefix exchanged is not used as it is, too.
    return {key: moved.get(key, key) for key in own if key in moved or key in left}


def _twins(model: nn.Module) -> dict[str, list[str]]:
    """For each key whose tensor has other names as well, these names."""
    inner = unwrap(model)
    names = defaultdict(list)
    parameters, buffers = (kind(inner, remove_duplicate=False) for kind in (tree.named_parameters, tree.named_buffers))
    for name, tensor in chain(parameters, buffers):
        names[id(tensor)].append(bare_name(name))
    return {name: [other for other in group if other != name] for group in names.values() for name in group}


def _is_tied(prefix: str, other: str, own: Shapes, twins: Mapping[str, Sequence[str]]) -> bool:
    """Whether the model's keys with one prefix name the tensors of those with another prefix."""
    keys = [key for key in own if key.startswith(prefix)]
    return all(other + key.removeprefix(prefix) in twins.get(key, ()) for key in keys)


def _conflicting(twins: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    found: dict[str, str] = {}
    seen: set[str] = set()
    for key, tensor in tensors.items():
        for twin in twins.get(key, ()):
            if twin in seen and not equal(tensor, tensors[twin]):
                found[key] = twin
        seen.add(key)
    return found


def _renamed(
    unexpected: Sequence[str], absent: Sequence[str], theirs: Shapes, own: Shapes
) -> Iterator[tuple[str, str]]:
    """Pairs of an unexpected and an absent key of one shape: the only two, or two with similar names."""
    free = defaultdict(list)
    for key in absent:
        free[tuple(own[key])].append(key)
    rivals = Counter(tuple(theirs[key]) for key in unexpected)
    for key in unexpected:
        shape = tuple(theirs[key])
        candidates = free[shape]
        only = len(candidates) == rivals[shape] == 1
        if len(candidates) <= MAX_CANDIDATES:
            for best in get_close_matches(key, candidates, n=1, cutoff=0.0 if only else 0.6):
                candidates.remove(best)
                yield key, best


def find_prefixes(file: Shapes, model: Shapes) -> list[tuple[str, str]]:
    """The best pairs of a prefix to take off a file's keys and one to put in its place; each may be empty.

    Prefixes are whole parts of a dotted name, ``"model."`` or ``"0.model."``. The best are those under which most
    tensors have the name and shape of one of the model's, then most the name; the fewest parts where that is equal. A
    change must bring together more than half of the keys of the smaller side. Several are equally good where the file
    has two copies of a network, for instance.
    """
    enough = min(len(file), len(model)) / 2
    scores = {("", ""): _score("", "", file, model)}
    for removed in _shared_prefixes(file, enough):
        for added in _shared_prefixes(model, enough):
            score = _score(removed, added, file, model)
            if score[1] > enough:
                scores[removed, added] = score
    best = max(scores.values())
    return [prefixes for prefixes, score in scores.items() if score == best]


def _shared_prefixes(keys: Shapes, enough: float) -> list[str]:
    """The prefixes that more than ``enough`` keys begin with."""
    parts_by_key = ((f"{part}." for part in key.split(".", DEEPEST)[:-1]) for key in keys)
    counts = Counter(prefix for parts in parts_by_key for prefix in accumulate(parts, initial=""))
    return [prefix for prefix, count in counts.items() if count > enough]


def _score(removed: str, added: str, file: Shapes, model: Shapes) -> tuple[int, int, int]:
    """The numbers of equal names and shapes and of equal names, and that of the prefixes' parts, negative."""
    # Both sides lead to the same pairs: the smaller one takes less time.
    if len(file) <= len(model):
        names = [key[len(removed) :] for key in file if key.startswith(removed)]
    else:
        names = [key[len(added) :] for key in model if key.startswith(added)]
    common = [name for name in names if removed + name in file and added + name in model]
    if removed and added:
        common = [name for name in common if "." in name]  # that both have a "weight" says nothing
    fitting = sum(list(file[removed + name]) == list(model[added + name]) for name in common)
    return fitting, len(common), -(removed.count(".") + added.count("."))
