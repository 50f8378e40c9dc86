"""Result of matching a checkpoint's keys with a model's, as data and as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from convsim_init.report.table import shape_text
from convsim_init.report.text import PATH, quoted, shown, some


@dataclass(frozen=True, repr=False)
class LoadReport:
    """Result of matching a checkpoint's keys with a model's.

    ``print`` shows a line for all of it and one for each kind of difference. Keys are the model's,
    without what wrappers add to them, unless said otherwise.

    Attributes:
        file: Path of the checkpoint.
        model: Name of the model: its class, or its spec where it was built by name.
        expected: Number of the model's keys.
        wrapper: Key that the file keeps its state dict under, such as ``"state_dict"``; mostly empty.
        others: Keys of other state dicts in the file, which were not looked at.
        unread: The file's keys of extra states of modules that are neither tensors nor plain data, and were not read.
        removed: Prefixes that were taken off the file's keys.
        added: Prefix that was put in their place; mostly empty.
        matched: The file's key for each key whose tensor is in the file in the model's shape.
        missing: Keys that the file does not have.
        unexpected: The file's keys that the model does not have.
        mismatched: Keys whose shapes differ: the file's and the model's. The model keeps its tensor.
        renamed: A missing key of the same shape for unexpected ones: a guess.
        tied: Missing keys that share their tensor with a matched one, which is the value.
        conflicting: Tied keys that are both in the file, with different values.
        non_finite: Matched keys that hold, in the model's dtype, infinities or NaN.
        retyped: Matched keys whose kind of dtype differs, such as integers for floats: the file's and the model's.
        narrowed: Matched keys whose dtype in the model has less range or precision: the file's and the model's.
        faded: Those of them with filters so small that the model's dtype rounds them away.
        refused: Error of the model's own strict loading although the keys match; mostly empty.
        supplied: Keys that are not in the file in the model's shape, which the model's own loading sets
            or keeps of its own accord, such as batch norm's ``num_batches_tracked`` for old files.
        converted: The file's keys that the model does not have and its own loading makes use of.

    Examples:
        >>> path = ci.save_checkpoint({"weight": torch.zeros(8, 3, 3, 3)}, "init.pt", overwrite=True)
        >>> print(ci.load_checkpoint(nn.Conv2d(3, 8, 3), path))
        init.pt into Conv2d: 1 of 2 keys matched
        missing in the file, 1: bias
    """

    file: str
    model: str
    expected: int
    wrapper: str = ""
    others: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    added: str = ""
    matched: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    conflicting: dict[str, str] = field(default_factory=dict)
    non_finite: list[str] = field(default_factory=list)
    retyped: dict[str, tuple[str, str]] = field(default_factory=dict)
    narrowed: dict[str, tuple[str, str]] = field(default_factory=dict)
    faded: list[str] = field(default_factory=list)
    refused: str = ""
    supplied: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model is in the file, finite and in its shape, and nothing else is.

        What the model's own loading supplies or converts is all right.
        """
        return not (self.missing or self.unexpected or self.mismatched or self.conflicting or self.non_finite)

    @property
    def exact(self) -> bool:
        """Whether it is complete for strict loaders too, which change no key and know no tied ones."""
        changed = self.removed or self.added or self.tied or self.retyped
        return self.complete and not (changed or self.refused or self.unread)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        sides = {
            name: {key: {"file": file, "model": model} for key, (file, model) in getattr(self, name).items()}
            for name in ("mismatched", "retyped", "narrowed")
        }
        return asdict(self) | sides | {"complete": self.complete, "exact": self.exact}

    def __str__(self) -> str:
        names = f"{shown(self.file, PATH)} into {shown(self.model)}"
        prefix = ", but for a prefix" if self.removed or self.added else ""
        matched = f"{names}: {len(self.matched)} of {self.expected} keys matched{prefix}"
        return "\n".join([matched, *self._differences()])

    __repr__ = __str__

    def _differences(self) -> Iterator[str]:
        in_file = len(self.matched) + len(self.mismatched) + len(self.unexpected)
        if 2 * len(self.matched) < min(self.expected, in_file):
            yield "most keys do not match: the file looks like another model's"
        if self.wrapper:
            others = f"; key (--key in the shell) takes another: {some(map(shown, self.others))}" if self.others else ""
            yield f"the file's tensors are under {self.wrapper!r}{others}"
        for prefix in self.removed:
            yield f"prefix: the file's keys have {quoted(prefix)}; load_checkpoint takes it off, strict loaders do not"
        if self.added:
            yield (
                f"prefix: the file's keys lack {quoted(self.added)}; load_checkpoint puts it there, for strict "
                f"loaders write the file with prefix={self.added!r} (--prefix {shown(self.added)} in the shell)"
            )
        if self.refused:
            yield (
                f"the model's own strict loading raised {self.refused}; where it asks for a version, write a .pt file, "
                f"which holds it"
            )
        shapes = {key: (shape_text(file), shape_text(model)) for key, (file, model) in self.mismatched.items()}
        kinds = {
            "extra state of modules, no plain data and not read": map(shown, self.unread),
            "not in the file, or of another shape there, and set by the model's own loading": map(shown, self.supplied),
            "converted by the model's own loading": map(shown, self.converted),
            "missing in the file": map(shown, self.missing),
            "unexpected, not in the model": map(shown, self.unexpected),
            "of one shape, perhaps renamed": _pairs(self.renamed, "for"),
            "other shape": _sides(shapes),
            "infinities or NaN": map(shown, self.non_finite),
            "missing, but tied": _pairs(self.tied, "to"),
            "tied in the model, different in the file": _pairs(self.conflicting, "and"),
            "other kind of dtype": _sides(self.retyped),
            "dtype narrowed": _sides(self.narrowed),
            "filters so small that the model's dtype rounds them away": map(shown, self.faded),
        }
        for kind, entries in kinds.items():
            if listed := list(entries):
                yield f"{kind}, {len(listed)}: {some(listed)}"


def _pairs(keys: Mapping[str, str], between: str) -> list[str]:
    return [f"{shown(a)} {between} {shown(b)}" for a, b in keys.items()]


def _sides(entries: Mapping[str, tuple[str, str]]) -> list[str]:
    return [f"{shown(key)} (file {file}, model {model})" for key, (file, model) in entries.items()]
