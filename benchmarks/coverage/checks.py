"""What is promised of every model, held to one of them."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import convsim_init as ci
from benchmarks.coverage.outside import Seen, Watch
from benchmarks.coverage.sources import Architecture, Inputs

SHARED = re.compile("shares its weight with .*")
NORM_ERROR = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SIMILARITY_ERROR = 0.01  # relative
LEAST_SIMILARITY = 1e-6  # of two filters on average, below which a difference is one from here


class CheckError(Exception):
    """A check that did not hold."""


class NoInputError(Exception):
    """No input is known that the model takes."""


class Errors(NamedTuple):
    """How far what was seen of a layer is from what its report says, relatively."""

    similarity: float
    norm: float


def check(architecture: Architecture, steps: int) -> dict[str, object]:
    """Initialize a model and hold it to what is promised."""
    model, untouched = build(architecture), build(architecture)
    report = ci.initialize_(model, settings=ci.Settings(steps=steps))

    treated = {layer.name: layer for layer in report.layers if layer.after}
    skipped = [layer for layer in report.layers if layer.outcome is ci.Outcome.SKIPPED]
    expect(len(treated) + len(skipped) == len(report.layers), f"outcomes {report.totals}")
    expect(all(layer.reason for layer in skipped), "a layer was skipped without a reason")
    check_other_entries(model, untouched, treated)
    seen = check_forward(model, untouched, architecture, treated)
    remarks = [check_reload(model, untouched, report)]
    unseen = [name for name in treated if name not in seen]
    if unseen:
        remarks.append(f"not called: {', '.join(unseen[:3])}{f' and {len(unseen) - 3} more' * (len(unseen) > 3)}")
    reasons = Counter(SHARED.sub("shares its weight with another layer", layer.reason) for layer in skipped)
    return {
        "outcome": "passed",
        "layers": len(report.layers),
        "treated": len(treated),
        "seen": len(seen),
        "largest_similarity_error": f"{max((one.similarity for one in seen.values()), default=0):.1e}",
        "largest_norm_error": f"{max((one.norm for one in seen.values()), default=0):.1e}",
        "skipped": json.dumps(reasons, sort_keys=True) if reasons else "",
        "detail": "; ".join(filter(None, remarks)),
    }


def build(architecture: Architecture) -> nn.Module:
    """The model, with the same weights at every call."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return architecture.build()


def check_other_entries(model: nn.Module, untouched: nn.Module, names: Iterable[str]) -> None:
    """Nothing but the treated layers has changed; entries under other names may share their memory."""
    state, inside = model.state_dict(), tuple(f"{name}." if name else "" for name in names)
    treated = {value.data_ptr() for key, value in state.items() if key.startswith(inside)}
    changed = differing(state, untouched.state_dict())
    others = [key for key in changed if not key.startswith(inside) and state[key].data_ptr() not in treated]
    expect(not others, f"other entries changed: {others[:3]}")


def differing(state: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose tensors differ in a bit."""
    expect(state.keys() == other.keys(), "the keys differ")
    return [key for key in state if isinstance(state[key], Tensor) and not same(state[key], other[key])]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def check_reload(model: nn.Module, fresh: nn.Module, report: ci.Report) -> str:
    """What is written loads strictly and to the bit; a remark where only a file of torch.save does."""
    remark = ""
    with tempfile.TemporaryDirectory() as folder:
        path = ci.save_checkpoint(model, Path(folder) / "init.safetensors", report=report, dtype=None)
        try:
            fresh.load_state_dict(load_file(path), strict=True)
        except ValueError as error:  # torchvision's MNASNet wants the version that only torch.save keeps
            expect("version" in str(error) and ci.load_checkpoint(fresh, path).complete, str(error))
            path = ci.save_checkpoint(model, Path(folder) / "init.pt", report=report, dtype=None)
            fresh.load_state_dict(torch.load(path, weights_only=True), strict=True)
            remark = f"load_state_dict takes its .pt file and load_checkpoint both; of safetensors it says: {error}"
    expect(not differing(fresh.state_dict(), model.state_dict()), "what was loaded is not what was written")
    return remark


def check_forward(
    model: nn.Module, untouched: nn.Module, architecture: Architecture, treated: Mapping[str, ci.LayerReport]
) -> dict[str, Errors]:
    """The forward pass is finite, or was not before either; what it gives to convolutions is as the report says.

    Returns:
        How far the layers that are called in the forward pass are from the report, by name.
    """
    was_finite, before, inputs = first_run(untouched, list(treated), architecture.inputs(untouched))
    finite, after, _ = first_run(model, list(treated), [inputs])
    expect(finite or not was_finite, "the forward pass is not finite, and was before")
    expect(before.keys() == after.keys(), "the forward pass calls other layers than before")
    return {name: compare(treated[name], before[name], after[name]) for name in after}


def first_run(model: nn.Module, names: Sequence[str], candidates: Iterable[Inputs]) -> tuple[bool, Mapping, Inputs]:
    """Run the model on the first inputs that it takes.

    Returns:
        Whether the output is finite, what was seen of these layers, and the inputs.
    """
    errors = []
    for inputs in candidates:
        watch = Watch()
        try:
            with watch.over(model, names):
                return run(model, inputs), watch.seen, inputs
        except Exception as error:  # inputs that are too small, in the model's own words
            errors.append(f"{type(error).__name__}: {error}")
    raise NoInputError("; ".join(dict.fromkeys(errors)))


def compare(layer: ci.LayerReport, before: Seen, after: Seen) -> Errors:
    """Hold a layer's report to what was seen."""
    similarity = 0.0
    for seen, measures in ((before, layer.before), (after, layer.after)):
        reported, there = measures["normalized_similarity"], seen.similarity[layer.channels]
        error = abs(there - reported) / max(there, reported, LEAST_SIMILARITY)
        expect(
            error <= SIMILARITY_ERROR,
            f"{layer.name}: the convolution was given a weight of similarity {there:.6g}, not {reported:.6g}",
        )
        similarity = max(similarity, error)
    kind = layer.channels
    expect(after.similarity[kind] <= 1.001 * before.similarity[kind], f"{layer.name} is more similar than before")
    norm = float(((after.norms - before.norms) / before.norms.where(before.norms > 0, 1)).abs().max())
    expect(norm <= NORM_ERROR[after.dtype], f"norms of {layer.name} changed by {norm}")
    return Errors(similarity, norm)


@torch.no_grad()
def run(model: nn.Module, inputs: Any) -> bool:
    """Whether the model's output is finite."""
    torch.manual_seed(0)
    output = model.eval()(**inputs) if isinstance(inputs, Mapping) else model.eval()(*inputs)
    return all(bool(tensor.isfinite().all()) for tensor in tensors(output))


def tensors(output: object) -> Iterator[Tensor]:
    """Every tensor of a nested output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for one in output:
            yield from tensors(one)
    elif hasattr(output, "__dict__"):  # a dataclass, a distribution
        yield from tensors(vars(output))


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckError(otherwise)
