"""Models and checkpoints side by side: their measures layer by layer, and in what their entries differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from string import ascii_uppercase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsim_init.checkpoint.state_dict import state_entries
from convsim_init.errors import InputError
from convsim_init.functional.dtypes import equal
from convsim_init.layers.memory import has_no_data, memories
from convsim_init.metrics.snapshot import Snapshot, take_snapshot
from convsim_init.report.report import LayerReport
from convsim_init.report.table import COLUMNS, Table, measure_cells, outcomes_text, shape_text, shared_reason
from convsim_init.report.text import PATH, layer_name, shown, some

IDENTICAL, DIFFERENT, RESHAPED, INCOMPLETE = "identical", "different", "shapes differ", "not in all"  # values
NO_VALUES = "without values"  # of which at least one is lazy or on the meta device
COMPUTED = "computed by a parametrization"  # the weight of the layer is no entry, at least in one


@dataclass(frozen=True)
class ComparedEntry:
    """One key of the state dicts, or one convolution's weight, across all that are compared."""

    name: str  # the key, or the layer's name
    shapes: list[list[int] | None]  # in each; None where it is missing
    weights: str  # one of the words above


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    snapshots: list[Snapshot]  # of what was compared, in the order given, labelled by its names
    layers: list[ComparedEntry]  # every convolution of any of them
    entries: list[ComparedEntry]  # every key of any of their state dicts
    weights: set[str]  # keys of the entries that the weights of layers are stored in or computed from

    @property
    def reports(self) -> list[list[LayerReport | None]]:
        """For each layer what was measured of it in each; None where it is missing."""
        by_name = [{layer.name: layer for layer in snapshot.report.layers} for snapshot in self.snapshots]
        return [[reports.get(layer.name) for reports in by_name] for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, ready for JSON."""
        layers = [
            asdict(layer)
            | {
                "outcomes": [report and report.outcome.value for report in reports],
                "reasons": [report and report.reason for report in reports],
                "measures": [report and (report.before or None) for report in reports],
            }
            for layer, reports in zip(self.layers, self.reports, strict=True)
        ]
        return {
            "compared": [snapshot.label for snapshot in self.snapshots],
            "layers": layers,
            "totals": [snapshot.report.totals for snapshot in self.snapshots],
            "remarks": [snapshot.report.remarks for snapshot in self.snapshots],
            "entries": [asdict(entry) for entry in self.entries],
        }

    @property
    def table(self) -> Table:
        """The comparison as people read it."""
        letters = [ascii_uppercase[index : index + 1] or f"#{index + 1}" for index in range(len(self.snapshots))]
        rows = [["", "", *_side_by_side([[letter] * len(COLUMNS) for letter in letters]), ""]]
        for layer, reports in zip(self.layers, self.reports, strict=True):
            cells = _side_by_side([measure_cells(report.before if report else {}) for report in reports])
            weights = f"only in {_owners(layer, letters)}" if layer.weights == INCOMPLETE else layer.weights
            rows.append([layer_name(layer.name), _shapes(layer), *cells, weights])
        totals = [measure_cells(snapshot.report.totals["before"]) for snapshot in self.snapshots]
        rows.append(["mean of the measured", "", *_side_by_side(totals), ""])
        legend = [f"{letter}  {_about(snapshot)}" for letter, snapshot in zip(letters, self.snapshots, strict=True)]
        summary = [*legend, *self._remarks(letters), *self._differences(letters)]
        return Table(["layer", "shape", *COLUMNS, "weights"], rows, summary)

    def _remarks(self, letters: Sequence[str]) -> list[str]:
        """What is said of each that is compared, once where it is said of several, and why layers were not measured."""
        owners = defaultdict[str, list[str]](list)
        for letter, snapshot in zip(letters, self.snapshots, strict=True):
            left = defaultdict[str, list[str]](list)
            for layer in snapshot.report.layers:
                if not layer.before:
                    left[f"{layer.outcome.value}, {layer.reason}"].append(layer_name(layer.name))
            for remark in (*snapshot.report.remarks, *(f"{why}: {some(names)}" for why, names in left.items())):
                owners[remark].append(letter)
        return [f"{', '.join(dict.fromkeys(known))}: {remark}" for remark, known in owners.items()]

    def _differences(self, letters: Sequence[str]) -> list[str]:
        by_kind = {
            kind: [entry for entry in self.entries if entry.weights == kind]
            for kind in (IDENTICAL, DIFFERENT, RESHAPED, INCOMPLETE, NO_VALUES)
        }
        counts = ", ".join(f"{len(entries)} {kind}" for kind, entries in by_kind.items() if entries)
        lines = [f"{len(self.entries)} entries of their state dicts: {counts}"]
        others = [shown(entry.name) for entry in by_kind[DIFFERENT] if entry.name not in self.weights]
        if others:
            lines.append(f"different, and no convolution's weight: {some(others)}")
        if by_kind[RESHAPED]:
            lines.append(f"shapes differ: {some(f'{shown(e.name)} ({_shapes(e)})' for e in by_kind[RESHAPED])}")
        for owners in dict.fromkeys(_owners(entry, letters) for entry in by_kind[INCOMPLETE]):
            names = [shown(entry.name) for entry in by_kind[INCOMPLETE] if _owners(entry, letters) == owners]
            lines.append(f"only in {owners}: {some(names)}")
        return lines


def compare(sources: Sequence[tuple[str, nn.Module | Mapping[str, Tensor]]]) -> Comparison:
    """Measure two or more models or state dicts, each after what to call it, and find in what they differ."""
    if len(sources) < 2:
        raise InputError(f"expected at least two models or checkpoints to compare, got {len(sources)}")
    snapshots = [take_snapshot(label, source) for label, source in sources]
    states = [{key: x for key, x in state_entries(s).items() if isinstance(x, Tensor)} for _, s in sources]
    entries = [_entry(key, [state.get(key) for state in states]) for key in _union(states)]
    by_key = {entry.name: entry for entry in entries}
    known = [{layer.name: layer.shape for layer in snapshot.report.layers} for snapshot in snapshots]
    # By memory, because a key may be that of another name of the layer, or of a factor of its weight.
    pairs = zip(snapshots, states, strict=True)
    own = {key for snapshot, state in pairs for key, x in state.items() if snapshot.memory.intersection(memories([x]))}
    layers = []
    for name in _union(known):
        entry = by_key.get(_weight_key(name))
        shapes = [shapes_by_name.get(name) for shapes_by_name in known]
        if None in shapes:
            weights = INCOMPLETE
        # The layer is in all of them, the entry not: where it is missing, the weight is computed from others.
        elif entry is None or entry.weights == INCOMPLETE:
            weights = COMPUTED
        else:
            weights = entry.weights
        layers.append(ComparedEntry(name, shapes, weights))
    return Comparison(snapshots, layers, entries, own | {_weight_key(layer.name) for layer in layers})


def _about(snapshot: Snapshot) -> str:
    totals = snapshot.report.totals
    note = shared_reason(snapshot.report.to_dict()["layers"])
    end = f"; each {note}" if note else ""
    return f"{shown(snapshot.label, PATH)}, {totals['layers']} convolutions: {outcomes_text(totals)}{end}"


def _entry(name: str, tensors: Sequence[Tensor | None]) -> ComparedEntry:
    shapes = [None if tensor is None or is_lazy(tensor) else list(tensor.shape) for tensor in tensors]
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < len(tensors):
        weights = INCOMPLETE
    # Before shapes are compared, because a lazy tensor has none.
    elif any(is_lazy(tensor) or has_no_data(tensor) for tensor in present):
        weights = NO_VALUES
    elif any(shape != shapes[0] for shape in shapes):
        weights = RESHAPED
    else:
        weights = IDENTICAL if all(equal(present[0], other) for other in present[1:]) else DIFFERENT
    return ComparedEntry(name, shapes, weights)


def _union(names: Sequence[Sequence[str] | Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for its_names in names for name in its_names))


def _weight_key(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _side_by_side(cells: Sequence[Sequence[str]]) -> list[str]:
    """For each measure one cell with the values of all."""
    return [
        "  ".join(value.ljust(9 if name == "similarity" else 6) for value in values).rstrip()
        for name, values in zip(COLUMNS, zip(*cells, strict=True), strict=True)
    ]


def _shapes(entry: ComparedEntry) -> str:
    return " / ".join(dict.fromkeys(shape_text(shape) for shape in entry.shapes if shape is not None))


def _owners(entry: ComparedEntry, letters: Sequence[str]) -> str:
    return ", ".join(letter for letter, shape in zip(letters, entry.shapes, strict=True) if shape is not None)
