"""Initialize random layers with random settings, and check what must hold of each.

    python tests/fuzz/random_layers.py [--layers 10000] [--seed 0]

Shapes, ranks, groups, transposition, dtypes and settings are drawn; so are weights of scale 1e-30 to 1e30 with zero,
constant, duplicated, denormal and non-finite filters among them. Prints how many there were of each kind, and the
layers that broke a rule; the status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import convsim_init as ci
from convsim_init.functional.bank import accumulation_dtype, filter_bank, filter_norms

CONVOLUTIONS = (
    (nn.Conv1d, nn.ConvTranspose1d),
    (nn.Conv2d, nn.ConvTranspose2d),
    (nn.Conv3d, nn.ConvTranspose3d),
)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
KINDS = ("plain", "zero", "constant", "duplicated", "denormal", "mixed scales", "sparse", "nan", "infinite")


def draw(seed: int) -> tuple[nn.Module, ci.Settings, str]:
    """A layer beside one that is left alone, settings, and what is odd about the weights."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    rank = chance.choice([1, 2, 2, 2, 3])
    groups = chance.choice([1, 1, 1, 2, 3])
    channels = [groups * chance.randint(1, 8) for _ in range(2)]
    kernel = tuple(chance.choice([1, 1, 2, 3, 3, 4, 5]) for _ in range(rank))
    layer = CONVOLUTIONS[rank - 1][chance.random() < 0.3](*channels, kernel, groups=groups)
    settings = ci.Settings(
        pairs=chance.choice(["all", "all", "adjacent"]),
        channels=chance.choice(["matched", "matched", "all"]),
        norm=chance.choice(["preserve", "preserve", "free"]),
        optimizer=chance.choice(["conjugate_gradient"] * 4 + ["adam"]),
        steps=chance.choice([1, 2, 5, 15]),
        tolerance=chance.choice([0.0, 2e-3]),
    )
    dtype = chance.choice(DTYPES)
    model = nn.ModuleDict({"treated": layer, "left": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}).to(dtype)
    kind = chance.choice(KINDS)
    with torch.no_grad():
        layer.weight.copy_(_odd(layer.weight.detach().double(), kind, chance, dtype))
    return model, settings, kind


def _odd(weight: Tensor, kind: str, chance: random.Random, dtype: torch.dtype) -> Tensor:
    small, large = (-4, 3) if dtype is torch.float16 else (-30, 30)
    weight = weight * 10.0 ** chance.uniform(small, large)
    flat = weight.flatten(1)
    chosen = torch.rand(len(flat)) < 0.4
    if kind == "zero":
        flat[chosen] = 0
    elif kind == "constant":
        flat[chosen] = flat.abs().max()
    elif kind == "duplicated":
        flat[chosen] = flat[0].clone()
    elif kind == "denormal":
        flat[chosen] *= torch.finfo(dtype).tiny / flat.abs().max() / 8
    elif kind == "mixed scales":
        flat *= 10.0 ** torch.linspace(small / 2, -small / 2, len(flat))[:, None] / 10.0 ** (large / 2)
    elif kind == "sparse":
        flat[torch.rand(flat.shape) < 0.8] = 0
    elif kind in ("nan", "infinite"):
        flat[0, 0] = float(kind[:3])
    largest = torch.finfo(dtype).max / 4
    return (
        flat.reshape(weight.shape)
        if kind in ("nan", "infinite")
        else flat.reshape(weight.shape).clamp(-largest, largest)
    )


def violations(seed: int) -> Iterator[str]:
    """What does not hold of the layer drawn with that seed."""
    model, settings, _ = draw(seed)
    before = copy.deepcopy(model.state_dict())
    layer = model["treated"]
    groups, transposed = layer.groups, layer.transposed
    old = layer.weight.detach().clone()
    report = ci.initialize_(model, settings=settings, exclude=["left"])
    told, new = report.layers[0], layer.weight.detach()

    for key, value in model.state_dict().items():
        if key != "treated.weight" and not torch.equal(value, before[key]):
            yield f"{key} changed"
    if told.outcome is not ci.Outcome.INITIALIZED:
        if not told.reason:
            yield f"{told.outcome} without a reason"
        if not torch.equal(old.nan_to_num(), new.nan_to_num()):
            yield f"changed although {told.reason}"
        # Adam minimizes the raw loss, whose fourth powers overflow where conjugate gradients see unit filters.
        if told.outcome is ci.Outcome.FAILED and settings.optimizer != "adam" and bool(old.isfinite().all()):
            yield f"finite weights failed: {told.reason}"
        return
    if not new.isfinite().all():
        yield "weights that are not finite"
        return
    banks = [
        filter_bank(weight.double(), groups=groups, transposed=transposed, channels=settings.channels)
        for weight in (old, new)
    ]
    norms = [filter_norms(bank) for bank in banks]
    alive = norms[0] > 0
    info = torch.finfo(new.dtype)
    # A filter near the smallest numbers keeps its norm to within the spacing of those.
    spacing = info.smallest_normal * info.eps * banks[0][0, 0].numel() ** 0.5
    if settings.norm == "preserve":
        error = ((norms[1] - norms[0]).abs() - spacing).clamp(min=0) / norms[0].clamp(min=1e-300)
        worst = float(error[alive].max())
        if worst > max(4 * info.eps, 4 * torch.finfo(accumulation_dtype(new.dtype)).eps):
            yield f"a norm changed by {worst:.1e}"
        if bool((norms[1] > 0)[~alive].any()):
            yield "a zero filter is one no more"
    for measure, value in {**told.before, **told.after}.items():
        if value != value:
            yield f"{measure} is not a number"
    # Where all of a filter is below the normal numbers, written weights are too coarse to keep what was gained.
    coarse = bool((banks[0].abs().flatten(2).amax(-1)[alive] < 4 * info.smallest_normal).any())
    # What is lowered: of unit filters where norms are kept, but Adam lowers the raw sum in either case.
    raw = settings.norm == "free" or settings.optimizer == "adam"
    was, now = (
        float(
            ci.convolutional_similarity(
                weight.double(),
                pairs=settings.pairs,
                channels=settings.channels,
                groups=groups,
                transposed=transposed,
                normalized=not raw,
            )
        )
        for weight in (old, new)
    )
    if raw and not 1e-20 < was < 1e20:
        return  # Adam's sums of fourth powers leave the range of float32
    if not coarse and not now <= was * (1 + 4 * info.eps) + (0 if raw else info.eps**2):
        yield f"the {'raw' if raw else 'normalized'} similarity rose from {was:.6e} to {now:.6e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10000, help="how many (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="the first (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: Counter[str] = Counter()
    broken = 0
    for seed in range(options.seed, options.seed + options.layers):
        model, settings, kind = draw(seed)
        kinds[kind] += 1
        for violation in violations(seed):
            broken += 1
            print(f"seed {seed} ({kind}, {model['treated']}, {model['treated'].weight.dtype}, {settings}): {violation}")
    print(f"{options.layers} layers, {broken} violations; {dict(kinds)}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
