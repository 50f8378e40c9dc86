"""Measure, plan and initialize random modules that do what people's modules do, and check what must hold of each.

    python tests/fuzz/random_modules.py [--modules 2000] [--seed 0]

Drawn are convolutions whose class, hooks, parametrizations or memory make the weight that is used another than the
parameter, forward passes that change all that they can, ties, wrappers, dtypes and memory formats. What each
convolution is given is seen from outside, in a real forward pass of an equal module; its similarity is computed in
float64 by the definition. What a class or a closure holds outside of its modules is not looked at. Prints a line for
each violation and a summary; the status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, parametrize, prune

import convsim_init as ci
from convsim_init.initialize import plan

CONVOLUTIONS = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))
CALLS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
WRAPPER_PARTS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
SETTINGS = ci.Settings(steps=4)


# What a forward pass does with the weight: functions of the module and the stored weight.


def standardized(m: nn.Module, w: Tensor) -> Tensor:
    axes = tuple(range(1, w.dim()))
    return (w - w.mean(axes, keepdim=True)) / (w.std(axes, keepdim=True, unbiased=False) + 1e-5)


def masked_in_place(m: nn.Module, w: Tensor) -> Tensor:
    w.data *= m.mask
    return w


def renormed_in_place(m: nn.Module, w: Tensor) -> Tensor:
    w.data.copy_(w.data.renorm(2, 0, 0.3))
    return w


def noisy(m: nn.Module, w: Tensor) -> Tensor:
    return w * (1 + 1e-4 * torch.randn_like(w) + 1e-9 * random.random() + 1e-9 * np.random.rand())


def cached(m: nn.Module, w: Tensor) -> Tensor:
    if m.cache is None:
        m.cache = (w * 1.5).detach()
    return m.cache


def alternating(m: nn.Module, w: Tensor) -> Tensor:
    m.flag = not m.flag
    return w if m.flag else w * 2


def block_sparse(m: nn.Module, w: Tensor) -> Tensor:
    return w * m.mask.flatten(2)[..., :1].view(*w.shape[:2], *[1] * (w.dim() - 2))


def quantized(m: nn.Module, w: Tensor) -> Tensor:
    scale = w.detach().abs().max() / 31 + 1e-9
    return w + ((w / scale).round() * scale - w).detach()


def of_the_input(m: nn.Module, w: Tensor) -> Tensor:
    return w * (1 + m.seen.float().mean()).to(w)


def broken(m: nn.Module, w: Tensor) -> Tensor:
    raise LookupError("its own")


USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "stored": lambda m, w: w,
    "standardized": standardized,
    "scaled": lambda m, w: w * 0.3,
    "gains": lambda m, w: standardized(m, w) * m.gain,
    "masked in place": masked_in_place,
    "masked": lambda m, w: w * m.mask,
    "block-sparse": block_sparse,
    "renormed": renormed_in_place,
    "noisy": noisy,
    "cached": cached,
    "alternating": alternating,
    "quantized": quantized,
    "signs": lambda m, w: w.sign() * w.abs().mean(),
    "flipped": lambda m, w: w.flip(-1),
    "of the input": of_the_input,
    "broken": broken,
    "dropped": lambda m, w: F.dropout(w, 0.5, m.training),
}


# What a forward pass does beside it.


def counts(m: nn.Module) -> None:
    m.calls += 1
    m.count += 1
    m.history.append(m.calls)


def averages(m: nn.Module) -> None:
    m.average = 0.9 * m.average + 0.1 * m.weight.detach().float().abs().mean()
    m.average.mul_(1.01)


def draws(m: nn.Module) -> None:
    m.drawn = torch.rand(2), random.random(), np.random.rand(), torch.rand(1, generator=m.generator)


def toggles(m: nn.Module) -> None:
    m.train(not m.training)
    m.weight.requires_grad_(not m.weight.requires_grad) if m.weight.is_leaf else None


def rebinds(m: nn.Module) -> None:
    m.mask = m.mask.clone()
    m.register_buffer("late", torch.ones(1))
    m.notes["last"] = torch.ones(1)
    m.notes["inner"]["deep"].append(1)


def hooks_itself(m: nn.Module) -> None:
    m.register_forward_hook(lambda *_: None)
    if m.weight.requires_grad:
        m.weight.register_hook(lambda gradient: gradient)


def spoils(m: nn.Module) -> None:
    with torch.no_grad():
        m.bias.add_(1) if m.bias is not None else None
        m.spare.zero_()
    if m.weight.is_leaf:
        m.weight.grad = torch.ones_like(m.weight)


SIDE_EFFECTS = {f.__name__: f for f in (counts, averages, draws, toggles, rebinds, hooks_itself, spoils)}


def custom(base: type[_ConvNd]) -> type[_ConvNd]:
    """A subclass with a forward pass of its own."""

    class Custom(base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            for effect in self.effects:
                SIDE_EFFECTS[effect](self)
            call = getattr(F, f"conv{'_transpose' if self.transposed else ''}{x.dim() - 2}d")
            return call(x, USES[self.use](self, self.weight), self.bias, groups=self.groups)

    return Custom


class HomeMade(nn.Module):
    """A module that is no convolution of PyTorch and convolves with a parameter of its own."""

    def __init__(self, base: type[_ConvNd], *arguments: object, **options: object) -> None:
        super().__init__()
        model = base(*arguments, **options)
        self.weight, self.bias = model.weight, model.bias
        self.groups, self.transposed, self.channels = model.groups, model.transposed, model.in_channels
        self.taps = model.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return custom(nn.Conv2d).forward(self, x)


class Fixed(nn.Module):
    """A parametrization: a function of the weight, with its inverse where it has one."""

    def __init__(self, factor: float, inverse: bool) -> None:
        super().__init__()
        self.factor, self.calls = factor, 0
        self.register_buffer("passes", torch.zeros(()))
        if inverse:
            self.right_inverse = lambda weight: weight / self.factor

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        self.passes += 1
        return weight * self.factor


# What is done to a convolution when it is there.


def hooked_mask(m: nn.Module, chance: random.Random) -> None:
    mask = (torch.rand(m.weight.shape) < 0.6).to(m.weight)
    m.register_forward_pre_hook(lambda module, _: (module.weight.data.mul_(mask), None)[1])


def hooked_effects(m: nn.Module, chance: random.Random) -> None:
    m.register_buffer("ticks", torch.zeros(1))

    def ticks(module: nn.Module, _: object) -> None:
        module.ticks += torch.rand(1)
        module.last = module.ticks.clone()

    m.register_forward_pre_hook(ticks)
    m.register_forward_hook(lambda module, *_: module.ticks.mul_(2) and None)


def pruned(m: nn.Module, chance: random.Random) -> None:
    m.weight.data = m.weight.data.contiguous()
    for _ in range(chance.choice([1, 1, 2])):
        if chance.random() < 0.7:
            prune.random_unstructured(m, "weight", 0.3)
        else:
            prune.ln_structured(m, "weight", 0.3, n=2, dim=0)


def frozen(m: nn.Module, chance: random.Random) -> None:
    m.requires_grad_(False)


def zeros(m: nn.Module, chance: random.Random) -> None:
    m.weight.data[chance.choice([slice(0, 1), slice(0, 2), slice(None)])] = 0


def strided(m: nn.Module, chance: random.Random) -> None:
    order = [1, 0, *range(2, m.weight.dim())]
    m.weight.data = m.weight.data.permute(order).contiguous().permute(order)


def channels_last(m: nn.Module, chance: random.Random) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    m.to(memory_format=formats.get(m.weight.dim(), torch.contiguous_format))


def part_of_a_storage(m: nn.Module, chance: random.Random) -> None:
    whole = torch.randn(m.weight.numel() + 7, dtype=m.weight.dtype)
    m.weight.data = whole[5:-2].view(m.weight.shape).copy_(m.weight.data)


def expanded(m: nn.Module, chance: random.Random) -> None:
    m.weight = nn.Parameter(m.weight.data[:, :1].expand(m.weight.shape))


def graded(m: nn.Module, chance: random.Random) -> None:
    m.weight.grad = torch.randn_like(m.weight)


def parametrized(m: nn.Module, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 2])):
        parametrize.register_parametrization(m, "weight", Fixed(chance.choice([2.0, -0.5]), chance.random() < 0.7))


LAST = {  # one of these, as each wants the parameter to be there
    "pruned": pruned,
    "weight_norm": lambda m, chance: parametrizations.weight_norm(m, dim=chance.choice([0, 0, 1, None])),
    "old weight_norm": lambda m, chance: nn.utils.weight_norm(m, dim=chance.choice([0, 0, 1, None])),
    "spectral_norm": lambda m, chance: parametrizations.spectral_norm(m),
    "old spectral_norm": lambda m, chance: nn.utils.spectral_norm(m),
    "parametrized": parametrized,
    "expanded": expanded,
}
CHANGES: dict[str, Callable[[nn.Module, random.Random], object]] = {
    f.__name__: f
    for f in (hooked_mask, hooked_effects, frozen, zeros, strided, channels_last, part_of_a_storage, graded)
}


def draw_layer(chance: random.Random, kinds: list[str]) -> nn.Module:
    rank = chance.choice([1, 2, 2, 2, 3])
    groups = chance.choice([1, 1, 1, 1, 2, 4])
    channels = [groups * chance.randint(1 if groups > 1 else 2, 5) for _ in range(2)]
    kernel = tuple(chance.choice([1, 2, 3, 3, 5]) for _ in range(rank))
    base = CONVOLUTIONS[rank - 1][chance.random() < 0.2]
    options = {"groups": groups, "bias": chance.random() < 0.5}
    if chance.random() < 0.35:
        m = base(*channels, kernel, **options)
    else:
        home_made = chance.random() < 0.2
        m = HomeMade(base, *channels, kernel, **options) if home_made else custom(base)(*channels, kernel, **options)
        kinds += ["home-made"] * home_made
        m.use = chance.choice(list(USES))
        m.effects = [name for name in SIDE_EFFECTS if chance.random() < 0.25]
        m.register_buffer("mask", (torch.rand(m.weight.shape) < 0.7).float())
        m.register_buffer("count", torch.zeros((), dtype=torch.int64))
        m.register_buffer("average", torch.zeros(()))
        m.gain = nn.Parameter(torch.rand(m.weight.shape[0], *[1] * (rank + 1)) + 0.5)
        m.spare = torch.ones(2)
        m.calls, m.history, m.flag, m.cache, m.notes = 0, [], False, None, {"inner": {"deep": []}}
        m.generator = torch.Generator().manual_seed(1)
        kinds += [f"uses {m.use}", *m.effects]
    if chance.random() < 0.25:
        m.to(chance.choice([torch.float64, torch.float16, torch.bfloat16]))
    for name, change in CHANGES.items():
        if chance.random() < 0.12:
            change(m, chance)
            kinds.append(name)
    if chance.random() < 0.35:
        name = chance.choice(list(LAST))
        if not (name.startswith("old spectral") and m.weight.dtype in (torch.float16, torch.bfloat16)):
            LAST[name](m, chance)
            kinds.append(name)
    return m


class Wrapped(nn.Module):
    """What DataParallel, activation checkpointing and torch.compile do to the names."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


def tie(a: _ConvNd, b: _ConvNd, chance: random.Random) -> str:
    """Let two convolutions share memory in one of the ways that people do."""
    kind = chance.choice(["one parameter", "same data", "slices", "slices apart", "transposed"])
    shape, dtype = a.weight.shape, a.weight.dtype
    if kind == "one parameter":
        b.weight = a.weight
    elif kind == "same data":
        b.weight.data = a.weight.data
    elif kind.startswith("slices"):
        whole = torch.randn(2 * shape[0], *shape[1:]).to(dtype) * 0.2
        start = shape[0] if kind == "slices apart" else shape[0] // 2
        a.weight.data, b.weight.data = whole[: shape[0]], whole[start : start + shape[0]]
    else:
        b.weight = nn.Parameter(a.weight.data.flip(0) if shape[0] == 0 else a.weight.data.transpose(-1, -2))
    return f"tied: {kind}"


def draw(seed: int) -> tuple[nn.Module, list[str], list[str]]:
    """A model, the patterns of layers to leave alone, and what it is made of; equal for equal seeds."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    kinds: list[str] = []
    model = nn.ModuleDict({f"l{i}": draw_layer(chance, kinds) for i in range(chance.randint(1, 4))})
    if chance.random() < 0.3:
        a = draw_layer(chance, kinds)
        if type(a) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and "weight" in a._parameters:
            b = type(a)(a.in_channels, a.out_channels, a.kernel_size, groups=a.groups, dtype=a.weight.dtype)
            kinds.append(tie(a, b, chance))
            model["tied a"], model["tied b"] = a, b
    if chance.random() < 0.2:
        model["again"] = model["l0"]
        kinds.append("a module twice")
    model["norm"] = nn.BatchNorm2d(3)
    for name in list(model):
        if chance.random() < 0.2:
            wrapper = chance.choice(["module", *sorted(WRAPPER_PARTS)])
            model[name] = Wrapped(wrapper, model[name])
            kinds.append(f"wrapped: {wrapper}")
    for module in model.modules():
        module.training = chance.random() < 0.7
    if chance.random() < 0.2:
        model = Wrapped("_orig_mod", model)
    return model, [chance.choice(["l0*", "*"])] if chance.random() < 0.2 else [], kinds


# What is looked at from outside.


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions by their names without what wrappers add."""
    named = model.named_modules()
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS): module
        for name, module in named
        if isinstance(module, (_ConvNd, HomeMade))
    }


class SeenError(BaseException):
    """Ends a forward pass at its convolution."""


def given(module: nn.Module) -> Tensor | None:
    """The weight that ``F.conv*`` is given in a forward pass in evaluation mode; None where it ends with an error."""
    seen: list[Tensor] = []

    def watched(x: Tensor, weight: Tensor, *rest: object, **options: object) -> Tensor:
        seen.append(weight.detach().clone())
        raise SeenError

    module.eval()
    dtype = next((p.dtype for name, p in module.named_parameters() if "weight" in name), torch.float32)
    home_made = isinstance(module, HomeMade)
    channels, taps = (module.channels, module.taps) if home_made else (module.in_channels, module.kernel_size)
    x = torch.zeros(1, channels, *taps, dtype=dtype)
    with mock.patch.multiple(F, **dict.fromkeys(CALLS, watched)):
        try:
            module(x)
        except SeenError:
            return seen[0]
        except Exception:
            return None
    return None


def bank_of(module: nn.Module, weight: Tensor) -> Tensor:
    """The filters ``[G, M, C, *kernel_size]`` of a weight, in float64."""
    parts = weight.double().unflatten(0, (module.groups, -1))
    return parts.transpose(1, 2) if module.transposed else parts


def similarity(bank: Tensor) -> float:
    """The mean over pairs of the energy of the cross-correlations of two unit filters, by its Fourier transform."""
    norms = bank.flatten(2).norm(dim=2)
    values = []
    for group, lengths in zip(bank, norms, strict=True):
        alive = lengths > 0
        unit = group[alive] / lengths[alive].view(-1, *[1] * (group.dim() - 1))
        sizes = [2 * size - 1 for size in unit.shape[2:]]
        spectra = np.fft.fftn(unit.numpy(), s=sizes, axes=tuple(range(2, unit.dim())))  # [M, C, *sizes]
        power = torch.from_numpy(np.abs(spectra) ** 2).flatten(2)
        energies = torch.einsum("mcf,ncf->mn", power, power) / power.shape[-1]
        values += energies[tuple(torch.triu_indices(len(unit), len(unit), 1))].tolist()
    return float(np.mean(values)) if values else float("nan")


def traces(model: nn.Module) -> dict[str, object]:
    """All that may not change: values, places, flags and gradients of tensors, attributes, hooks, random states."""
    found: dict[str, object] = {
        "random states": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = trace(value)
            if key in ("_parameters", "_buffers"):
                found |= {f"{name}.{inner}": trace(one) for inner, one in value.items()}
                found[f"{name}.{key}"] = [(inner, id(one)) for inner, one in value.items()]
    return found


def trace(value: object) -> object:
    if isinstance(value, Tensor):
        grad = None if value.grad_fn is not None or value.grad is None else (id(value.grad), value.grad.tolist())
        place = (id(value), value.data_ptr(), value.stride(), value.dtype, value.requires_grad, grad)
        hooks = [] if value.grad_fn is not None else list(value._backward_hooks or {})
        return *place, hooks, value.detach().double().nan_to_num(7).tolist()
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, dict):
        return id(value), [(key, trace(one)) for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [trace(one) for one in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]


def may_change(model: nn.Module, report: ci.Report) -> Callable[[str], bool]:
    """Whether a trace is that of a treated layer's weight, or of what a weight in the same memory is.

    spectral_norm's vectors belong to the weight: they are estimates of its norm.
    """
    treated = {layer.name for layer in report.layers if layer.after}
    owners, memory = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, HomeMade)) and convolutions_name(name) in treated:
            owners.add(name)
            memory |= {p.untyped_storage().data_ptr() for key, p in module.named_parameters() if "weight" in key}
    shared = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in module._parameters.items()
        if value is not None and value.untyped_storage().data_ptr() in memory
    }
    vectors = ("parametrizations.weight.0._u", "parametrizations.weight.0._v", "weight_u", "weight_v")
    owned = {f"{name}.{vector}" for name in owners for vector in vectors}
    return lambda key: key in shared | owned or key.removesuffix(".weight") in owners


def convolutions_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def violations(seed: int) -> Iterator[str]:
    """What does not hold of the module drawn with that seed."""
    model, exclude, _ = draw(seed)
    if all(isinstance(module, HomeMade) and given(module) is None for module in convolutions(draw(seed)[0]).values()):
        return  # nothing is known of those, and a model without a convolution is refused
    start = traces(model)
    measured = ci.measure(model)
    if changed := differences(start, traces(model)):
        yield f"measure changed {changed}"
        return
    exclude = [one for one in exclude if any(fnmatchcase(layer.name, one) for layer in measured.layers)]
    planned = plan(model, exclude=exclude)
    if changed := differences(start, traces(model)):
        yield f"plan changed {changed}"
        return
    report = ci.initialize_(model, exclude=exclude, settings=SETTINGS)
    allowed = may_change(model, report)
    if changed := [key for key in differences(start, traces(model)) if not allowed(key)]:
        yield f"initialize_ changed {changed}"
    twin = convolutions(draw(seed)[0])
    live = convolutions(model)
    for name in live.keys() - {layer.name for layer in report.layers}:
        if given(twin[name]) is not None or not isinstance(live[name], HomeMade):
            yield f"{name} is not in the report"
    for m, p, r in zip(measured.layers, planned.layers, report.layers, strict=True):
        module = live[r.name]
        before, after = given(twin[r.name]), given(module)
        if r.outcome is ci.Outcome.FAILED and before is not None and "infinities or NaN" not in r.reason:
            yield f"{r.name} failed: {r.reason}"
        if p.outcome is ci.Outcome.SKIPPED and (r.outcome is not ci.Outcome.SKIPPED or r.reason != p.reason):
            yield f"{r.name}: plan said {p.reason}, initialize_ {r.outcome.value}: {r.reason}"
        if before is None or after is None:
            if m.before or r.after:
                yield f"{r.name} is reported though its forward pass ends with an error"
            continue
        if r.outcome is ci.Outcome.SKIPPED and not r.reason:
            yield f"{r.name} skipped without a reason"
        banks = bank_of(module, before), bank_of(module, after)
        was, now = map(similarity, banks)
        told = [(m.before, was, "measure"), (r.before, was, "before"), (r.after, now, "after")]
        for said, real, what in told:
            value = said.get("normalized_similarity", real)
            if abs(value - real) > 1e-2 * real + 1e-7:
                yield f"{r.name} {r.outcome.value} ({r.reason}): {what} reported {value:.4e}, really {real:.4e}"
        if r.outcome is ci.Outcome.INITIALIZED:
            norms = [bank.flatten(2).norm(dim=2) for bank in banks]
            precision = torch.finfo(after.dtype).eps
            error = float(((norms[1] - norms[0]).abs() / norms[0].clamp(min=1e-30)).max())
            if error > max(1e-3, 8 * precision):
                yield f"{r.name}: a norm changed by {error:.1e}"
            if now > was * (1 + 1e-3):
                yield f"{r.name}: the similarity rose from {was:.4e} to {now:.4e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="the first (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    drawn: Counter[str] = Counter()
    layers = wrong = 0
    for seed in range(options.seed, options.seed + options.modules):
        model, _, kinds = draw(seed)
        drawn.update(set(kinds))
        layers += len(convolutions(model))
        for violation in violations(seed):
            wrong += 1
            print(f"seed {seed} ({', '.join(kinds)}): {violation}", flush=True)
    print(f"{options.modules} modules, {layers} layers, {wrong} violations; {dict(drawn)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
