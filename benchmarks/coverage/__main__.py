"""The census: every classification model of timm and torchvision that fits is built, initialized and checked.

    python -m benchmarks.coverage [PATTERN]... [--largest 60] [--steps 3]

For each model with convolutions: a few steps of `initialize_`; no layer may fail, every skipped one has its reason, the
norms of the filters that are used stay, nothing but the treated layers changes, what is written loads strictly and to
the bit, and the forward pass is finite. A line for each model goes to results/census.csv as it is done; models that are
there already are not done again. results/census.md sums up.

PATTERN is a shell pattern of specs, such as 'timm:convnext*'.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import convsim_init as ci
from convsim_init.functional.bank import filter_norms, nonzero
from convsim_init.layers.find import find_layers

RESULTS = Path(__file__).parents[1] / "results"
FIELDS = ["model", "outcome", "parameters", "layers", "treated", "largest_norm_error", "skipped", "seconds", "detail"]
SHARED = re.compile("shares its weight with .*")
NORM_ERROR = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class CheckError(Exception):
    """A check that did not hold."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--largest", type=float, default=60, help="million parameters; larger models are left out")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="do failed models once more")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table = RESULTS / "census.csv"
    rows = {row["model"]: row for row in read(table) if not (options.again and row["outcome"] == "failed")}
    specs = [
        spec for spec in all_specs() if not options.patterns or any(fnmatchcase(spec, p) for p in options.patterns)
    ]
    for spec in tqdm([spec for spec in specs if spec not in rows], unit="model", disable=not sys.stderr.isatty()):
        rows[spec] = examine(spec, options)
        write(table, rows.values())
    summarize(list(rows.values()), options)


def all_specs() -> list[str]:
    """Every classification model of torchvision, then every model of timm."""
    import timm
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision:{name}" for name in names] + [f"timm:{name}" for name in timm.list_models()]


def examine(spec: str, options: argparse.Namespace) -> dict[str, object]:
    """One line of the table."""
    started = time.perf_counter()
    row: dict[str, object] = dict.fromkeys(FIELDS, "") | {"model": spec}
    try:
        row["parameters"] = count_parameters(spec)
        if row["parameters"] > options.largest * 1e6:
            row["outcome"] = "too large"
        else:
            row |= check(spec, options.steps)
    except Exception as error:  # whatever a library raises
        row |= {"outcome": "failed", "detail": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return row | {"seconds": f"{time.perf_counter() - started:.1f}"}


def count_parameters(spec: str) -> int:
    """Without drawing them, where a library can do without."""
    library, _, name = spec.partition(":")
    try:
        with torch.device("meta"):
            model = builder(library)(name)
    except Exception:  # models that compute with their weights while they are built
        model = ci.build_model(spec)
    return sum(parameter.numel() for parameter in model.parameters())


def builder(library: str):
    if library == "timm":
        import timm

        return timm.create_model
    import torchvision

    return torchvision.models.get_model


def check(spec: str, steps: int) -> dict[str, object]:
    """Initialize a model and hold it to what is promised."""
    model = ci.build_model(spec)
    if not any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        return {"outcome": "no convolution"}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    norms = {layer.name: norms_of(layer) for layer in find_layers(model) if layer.obstacle is None}
    report = ci.initialize_(model, settings=ci.Settings(steps=steps))

    treated = [layer for layer in report.layers if layer.after]
    skipped = [layer for layer in report.layers if layer.outcome is ci.Outcome.SKIPPED]
    expect(len(treated) + len(skipped) == len(report.layers), f"outcomes {report.totals}")
    expect(all(layer.reason for layer in skipped), "a layer was skipped without a reason")
    expect(
        all(layer.after["normalized_similarity"] <= 1.001 * layer.before["normalized_similarity"] for layer in treated),
        "a layer is more similar than before",
    )
    names = {layer.name for layer in treated}
    after = {layer.name: layer for layer in find_layers(model) if layer.name in names}
    errors = [
        float(((norms_of(layer) - norms[name]) / nonzero(norms[name])).abs().max()) for name, layer in after.items()
    ]
    allowed = [NORM_ERROR[layer.weight.sources[0].dtype] for layer in after.values()]
    expect(
        all(error <= bound for error, bound in zip(errors, allowed, strict=True)),
        f"norms changed by {max(errors or [0])}",
    )
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    expect(
        all(any(key.startswith(f"{name}.") or not name for name in names) for key in changed), "other entries changed"
    )
    detail = check_reload(model, report)
    check_forward(model, spec)
    reasons = Counter(SHARED.sub("shares its weight with another layer", layer.reason) for layer in skipped)
    return {
        "outcome": "passed",
        "layers": len(report.layers),
        "treated": len(treated),
        "largest_norm_error": f"{max(errors, default=0):.1e}",
        "skipped": json.dumps(reasons, sort_keys=True) if reasons else "",
        "detail": detail,
    }


def norms_of(layer) -> Tensor:
    return filter_norms(layer.bank().double())


def check_reload(model: nn.Module, report: ci.Report) -> str:
    """What is written loads strictly and to the bit; a remark where only a file of torch.save does."""
    written, remark = {key: value.clone() for key, value in model.state_dict().items()}, ""
    with tempfile.TemporaryDirectory() as folder:
        path = ci.save_checkpoint(model, Path(folder) / "init.safetensors", report=report, dtype=None)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.zero_()
        try:
            model.load_state_dict(load_file(path), strict=True)
        except ValueError as error:  # torchvision's MNASNet wants the version that only torch.save keeps
            expect("version" in str(error) and ci.load_checkpoint(model, path).complete, str(error))
            path = ci.save_checkpoint(model, Path(folder) / "init.pt", report=report, dtype=None)
            model.load_state_dict(torch.load(path, weights_only=True), strict=True)
            remark = f"load_state_dict takes its .pt file and load_checkpoint both; of safetensors it says: {error}"
    same = all(torch.equal(value, written[key]) for key, value in model.state_dict().items())
    expect(same, "what was loaded is not what was written")
    return remark


def check_forward(model: nn.Module, spec: str) -> None:
    """The forward pass is finite, or was not before either."""
    size = (3, 299, 299) if spec == "torchvision:inception_v3" else (3, 224, 224)
    size = tuple(getattr(model, "default_cfg", {}).get("input_size", size))
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    if not finite(model, images):
        expect(not finite(ci.build_model(spec), images), "the forward pass is not finite, and was before")


@torch.no_grad()
def finite(model: nn.Module, images: Tensor) -> bool:
    output = model.eval()(images)
    tensors = output if isinstance(output, (tuple, list)) else [output]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckError(otherwise)


def read(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summarize(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    """Print a summary of the table, and write it to results/census.md."""
    import timm
    import torchvision

    lines = [
        "# Census",
        "",
        f"`python -m benchmarks.coverage`, {date.today()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, timm {timm.__version__}, {platform.machine()}, on the CPU. Up to "
        f"{options.largest:g} million parameters, {options.steps} steps a layer. Every model is in "
        "[census.csv](census.csv).",
        "",
        "| library | models | passed | without a convolution | too large | failed |",
        "|---|---|---|---|---|---|",
    ]
    for library in ("torchvision", "timm"):
        mine = Counter(row["outcome"] for row in rows if str(row["model"]).startswith(f"{library}:"))
        counts = [mine[name] for name in ("passed", "no convolution", "too large", "failed")]
        lines.append(f"| {library} | {sum(counts)} | {' | '.join(map(str, counts))} |")
    passed = [row for row in rows if row["outcome"] == "passed"]
    reasons = Counter[str]()
    for row in passed:
        reasons.update(json.loads(row["skipped"]) if row["skipped"] else {})
    layers, treated = (sum(int(row[name]) for row in passed) for name in ("layers", "treated"))
    lines += [
        "",
        f"{layers} convolutions, {treated} treated; the largest relative change of a filter's norm is "
        f"{max((float(row['largest_norm_error']) for row in passed), default=0):.1e}. Skipped:",
        "",
        "| layers | reason |",
        "|---|---|",
        *(f"| {count} | {reason} |" for reason, count in reasons.most_common()),
    ]
    lines += ["", "## Remarks", "", *(f"- {row['model']}: {row['detail']}" for row in passed if row["detail"])]
    failures = [f"- {row['model']}: {row['detail']}" for row in rows if row["outcome"] == "failed"]
    lines += ["", "## Failures", "", *(failures or ["None."])]
    text = "\n".join(lines) + "\n"
    (RESULTS / "census.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
