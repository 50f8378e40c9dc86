"""Which prefix to take off a file's keys, and which to put before them, so that most of them are a model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

DEEPEST = 16  # parts of a prefix, so that a key made of dots alone costs no more than others

Shapes = Mapping[str, Sequence[int]]


def find_prefixes(file: Shapes, model: Shapes) -> list[tuple[str, str]]:
    """The prefix to take off a file's keys and the one to put in its place, either or both of them empty.

    Prefixes are whole parts of a dotted name, ``"model."`` or ``"0.model."``. Chosen are those under which most
    tensors have the name and shape of one of the model's, then most the name; the fewest parts where that is equal. A
    change must bring together more than half of the keys of the smaller side.

    Args:
        file: Shapes by the file's keys.
        model: Shapes by the model's keys.

    Returns:
        The changes that serve best: one, or several where which is meant cannot be known, as with two
        copies of a network in one file.
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
    """The prefixes that more than so many keys begin with."""
    counts = Counter(prefix for key in keys for prefix in _prefixes(key))
    return [prefix for prefix, count in counts.items() if count > enough]


def _prefixes(key: str) -> list[str]:
    parts = key.split(".", DEEPEST)[:-1]
    return list(accumulate((part + "." for part in parts), initial=""))


def _score(removed: str, added: str, file: Shapes, model: Shapes) -> tuple[int, int, int]:
    if len(file) <= len(model):
        names = [key[len(removed) :] for key in file if key.startswith(removed)]
    else:
        names = [key[len(added) :] for key in model if key.startswith(added)]
    met = [name for name in names if removed + name in file and added + name in model]
    if removed and added:
        met = [name for name in met if "." in name]  # that both have a "weight" says nothing
    fitting = sum(list(file[removed + name]) == list(model[added + name]) for name in met)
    return fitting, len(met), -(removed.count(".") + added.count("."))
