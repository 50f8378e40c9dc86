"""Finding the state dict in what a file holds, which may be in other dicts and beside copies of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from convsim_init.errors import InputError
from convsim_init.report.text import quoted, shown, some

WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "net", "module", "params_ema", "params")
LONGEST = 255  # characters of a key that leads to a state dict, at most


def unwrapped(name: str, content: object, wanted: str | None) -> tuple[object, str, tuple[str, ...]]:
    """Find the state dict in what a file holds.

    ``name`` is the file's, for errors, and ``wanted`` the key in it, as in `read_checkpoint`. Returned are the state
    dict, the keys that lead to it, joined by dots, and those of other state dicts that could have been meant.

    Raises:
        InputError: If there are several and none is wanted, or not the one that is.
    """
    opened: list[str] = []
    whole = content
    # A dict may hold itself. A wanted key is used up level by level; without one the levels are bounded.
    while isinstance(content, Mapping) and (wanted is not None or len(opened) < len(WRAPPERS)):
        inside = list(_state_dicts(content))
        ids = {id(state) for _, state in inside}  # each is looked at once, though many keys may lead to it
        texts = [key for key in content if isinstance(key, str)]
        found = [key for key in texts if id(content[key]) in ids]
        if wanted is not None:
            starts = [key for key in texts if f"{wanted}.".startswith(f"{key}.")]
            # The longest that leads to a dict, for keys may have dots; else the longest, to be refused for what it is.
            starts = [key for key in starts if isinstance(content[key], Mapping)] or starts
            wrapper = max(starts, key=len, default=None)
            part = {key[len(wanted) + 1 :]: content[key] for key in texts if key.startswith(f"{wanted}.")}
            if wrapper is None and part:
                content = part
                opened.append(wanted)
                break
            if wrapper is None:
                there = f"there is {some(map(shown, found))}" if found else "there is none"
                raise InputError(f"expected a state dict under {quoted(wanted)} in {name}: {there}")
            wanted = wanted[len(wrapper) + 1 :] or None
        else:
            usual = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
            # The first usual key may lead to a config of the model, not to its weights.
            wrapper = next((key for key in usual if any(_state_dicts(content[key]))), None)
            leading = found or list(dict.fromkeys(path[0] for path, _ in inside if path))
            # Beside a tensor, dicts are entries of this state dict, and refused later because they are no tensors.
            if wrapper is None and leading and not any(isinstance(value, Tensor) for value in content.values()):
                if len(leading) > 1:
                    keys = some(shown(".".join([*opened, key])) for key in leading)
                    raise InputError(
                        f"expected one state dict in {name}, got {keys}: choose one with key (--key NAME in the shell)"
                    )
                (wrapper,) = leading
            # Opened although nothing in it is a tensor, so that the error can say what is there.
            elif wrapper is None and not found:
                alone = texts if len(content) == 1 else []
                wrapper = next((key for key in (*usual, *alone) if isinstance(content[key], Mapping)), None)
            if wrapper is None:
                break
        content = content[wrapper]
        opened.append(wrapper)
    return content, ".".join(opened), tuple(_others(whole, opened, content))


def _others(whole: object, opened: Sequence[str], content: object) -> Iterator[str]:
    """The keys of state dicts beside the one that was opened, and of those elsewhere that share a name with it."""
    names = _last_names(content)
    for path, other in _state_dicts(whole) if opened else ():
        beside, around = path[:-1] == tuple(opened[:-1]), path == tuple(opened[: len(path)])
        if not around and (beside or not names.isdisjoint(_last_names(other))):
            yield ".".join(path)


def _last_names(state: object) -> set[str]:
    """The last two parts of each key: the names of a module and of its tensor."""
    return {".".join(str(key).split(".")[-2:]) for key in state} if isinstance(state, Mapping) else set()


def _state_dicts(value: object) -> Iterator[tuple[tuple[str, ...], Mapping[object, object]]]:
    """The dicts with tensors in a value, itself or nested in it, each after the keys that lead to it."""
    known = set[int]()
    pending: list[tuple[tuple[str, ...], object]] = [((), value)]
    for path, inner in pending:  # which grows
        if isinstance(inner, Mapping) and id(inner) not in known and len(path) <= len(WRAPPERS):
            known.add(id(inner))
            if any(isinstance(entry, Tensor) for entry in inner.values()):
                yield path, inner
            names = (key for key in inner if isinstance(key, str) and len(key) <= LONGEST)
            pending += [((*path, key), inner[key]) for key in names if isinstance(inner[key], Mapping)]
