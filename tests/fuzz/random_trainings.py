"""Run random training scripts within `initializing`, each beside itself without it, and check what must hold of both.

    python tests/fuzz/random_trainings.py [--scripts 500] [--seed 0]

Drawn are scripts that build, copy, pickle, load, freeze and draw networks anew, make optimizers and train, in any
order, with learning rates of zero: without the context a weight then ends as it was last drawn or loaded, W, and within
it must end as W, or as what one descent makes of W. What was loaded must stay, what was drawn must be treated where
nothing forbids it, what was trained must not change; everything else must be equal in both runs, the random state too.
Prints a line for each violation and a summary; the status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import convsim_init as ci
from convsim_init import context

SETTINGS = ci.Settings(steps=3)
EPSILON = 1e-6
SETTING = {"drawn", "drawn by hand", "loaded", "loaded from here", "unknown"}  # what a value comes from
TREATING = {"optimizer", "one optimizer", "train", "evaluate", "late layer", "end"}  # when a weight may be treated


class Block(nn.Module):
    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, filters)
        self.down = nn.Conv2d(channels, filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + self.down(x))


class Network(nn.Module):
    """What all networks have: a head, and room for a layer that is added later."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.late, self.head = body, None, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x if self.late is None else self.late(x)
        return self.head(x.mean((2, 3)))

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)


class Residual(Network):
    def __init__(self) -> None:
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        super().__init__(nn.Sequential(stem, Block(8, 8), Block(8, 12)))


class Plain(Network):
    """Without normalization; with groups, and a transposed convolution."""

    def __init__(self) -> None:
        first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2, padding=1)
        super().__init__(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, padding=1)))


class Growing(Network):
    """A layer of it is built in the first forward pass."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU()))
        self.grown = None

    def features(self, x: Tensor) -> Tensor:
        if self.grown is None:
            self.grown = nn.Conv2d(12, 12, 3, padding=1)
        return self.grown(self.body(x))


class Script:
    """A run of a script: its networks, and what has happened to the weights of their convolutions.

    Attributes:
        weights: Each weight with its convolution and the number of its network.
        events: What happened to them, in order, by their ids.
        trained: The network that each step of the script trains.
    """

    def __init__(self) -> None:
        self.models: list[Network] = []
        self.optimizers: dict[int, torch.optim.Optimizer] = {}  # of all of them: -1
        self.saved: list[tuple[int, dict[str, Tensor]]] = []
        self.others: list[nn.Module] = []  # wrappers, kept alive
        self.weights: dict[int, tuple[nn.Parameter, _ConvNd, int]] = {}
        self.events: defaultdict[int, list[str]] = defaultdict(list)
        self.trained: dict[int, int] = {}
        self.step = 0

    def note(self, model: nn.Module, event: str, keys: Any = None) -> None:
        """Note what happened to the weights of a model, or to those of these keys."""
        for name, part in convolutions(model).items():
            if keys is None or f"{name}.weight" in keys:
                self.events[id(part.weight)].append(event)

    def add(self, model: Network, like: Network | None = None) -> Network:
        """A new network, drawn or a copy of one."""
        self.models.append(model)
        for name, part in convolutions(model).items():
            source = None if like is None else convolutions(like)[name].weight
            self.events[id(part.weight)] = ["drawn"] if source is None else list(self.events[id(source)] or ["unknown"])
        return model

    def snapshot(self) -> dict[int, Tensor]:
        """The values of all weights, by their numbers."""
        numbers = {id(weight): number for number, (weight, _, _) in self.weights.items()}
        for index, model in enumerate(self.models):
            for part in convolutions(model).values():
                if id(part.weight) not in numbers:
                    numbers[id(part.weight)] = len(self.weights)
                    self.weights[len(self.weights)] = part.weight, part, index
        return {number: weight.detach().clone() for number, (weight, _, _) in self.weights.items()}


def convolutions(model: nn.Module) -> dict[str, _ConvNd]:
    return {name: part for name, part in model.named_modules() if isinstance(part, _ConvNd)}


# What a script may do: functions of the run and of a source of chance.


def build(run: Script, chance: random.Random) -> None:
    run.add(chance.choice([Residual, Residual, Plain, Growing])())


def copy_one(run: Script, chance: random.Random) -> None:
    original = chance.choice(run.models)
    run.add(copy.deepcopy(original), original)


def average(run: Script, chance: random.Random) -> None:
    original = chance.choice(run.models)
    run.others.append(averaged := torch.optim.swa_utils.AveragedModel(original))
    run.add(averaged.module, original)


def pickle(run: Script, chance: random.Random) -> None:
    original, file = chance.choice(run.models), io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    run.add(torch.load(file, weights_only=False), original)


def target(run: Script, chance: random.Random) -> None:
    original = chance.choice(run.models)
    if original.late is None and not isinstance(original, Growing):
        twin = run.add(type(original)())
        twin.load_state_dict(original.state_dict())
        run.note(twin, "loaded from here")


def frozen_copy(run: Script, chance: random.Random) -> None:
    copy_one(run, chance)
    run.note(run.models[-1].requires_grad_(False), "frozen")


def freeze(run: Script, chance: random.Random) -> None:
    model = chance.choice(run.models)
    for parameter in list(model.parameters())[: chance.randrange(4)]:
        parameter.requires_grad_(False)
    run.note(model, "frozen")


def draw_by_hand(run: Script, chance: random.Random) -> None:
    model = chance.choice(run.models)
    for part in convolutions(model).values():
        if chance.random() < 0.5:
            nn.init.kaiming_normal_(part.weight)
        else:
            part.weight.data = torch.randn_like(part.weight)
    run.note(model, "drawn by hand")


def scale(run: Script, chance: random.Random) -> None:
    model = chance.choice(run.models)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    run.note(model, "drawn by hand")


def draw_anew(run: Script, chance: random.Random) -> None:
    model = chance.choice(run.models)
    for parameter in model.parameters():
        parameter.grad = None
    for part in model.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    run.note(model, "drawn")


def load(run: Script, chance: random.Random) -> None:
    """Load values from elsewhere, of all modules or of some."""
    model, numbers = chance.choice(run.models), torch.Generator().manual_seed(chance.randrange(10**6))
    state, share = model.state_dict(), chance.choice([1, 1, 0.5])
    chosen = {part for part in sorted({key.rpartition(".")[0] for key in state}) if chance.random() < share}
    keys = [key for key in state if key.rpartition(".")[0] in chosen]
    values = {key: torch.randn(state[key].shape, generator=numbers) for key in keys}
    model.load_state_dict(values, strict=False, assign=chance.random() < 0.25)
    run.note(model, "loaded", keys)


def save(run: Script, chance: random.Random) -> None:
    index = chance.randrange(len(run.models))
    run.saved.append((index, copy.deepcopy(run.models[index].state_dict())))


def load_saved(run: Script, chance: random.Random) -> None:
    """Load what was saved here, into the network that it was of or, if it fits, into another."""
    if run.saved:
        index, state = chance.choice(run.saved)
        model = chance.choice([run.models[index], *run.models])
        if all(value.shape == state[key].shape for key, value in model.state_dict().items() if key in state):
            model.load_state_dict(state, strict=False)
            run.note(model, "loaded from here")


def initialize(run: Script, chance: random.Random) -> None:
    model = chance.choice(run.models)
    ci.initialize_(model, settings=SETTINGS)
    run.note(model, "treated by hand")


def build_within(run: Script, chance: random.Random) -> None:
    with ci.initializing(settings=SETTINGS):
        build(run, chance)
    run.note(run.models[-1], "treated by hand")


def one_optimizer(run: Script, chance: random.Random) -> None:
    parameters = {id(one): one for model in run.models for one in model.parameters()}
    run.optimizers[-1] = torch.optim.SGD(parameters.values(), lr=0.0)
    for model in run.models:
        run.note(model, "optimizer")


def optimizer(run: Script, chance: random.Random) -> None:
    index = chance.randrange(len(run.models))
    parameters = list(run.models[index].parameters())
    parameters = parameters[chance.choice([0, 0, 0, len(parameters) // 2]) :]
    run.optimizers[index] = chance.choice([torch.optim.SGD, torch.optim.Adam])(parameters, lr=0.0)
    for model in run.models:
        run.note(model, "optimizer")


def add_late_layer(run: Script, chance: random.Random) -> None:
    index = chance.randrange(len(run.models))
    model = run.models[index]
    model.late = nn.Conv2d(12, 12, 3, padding=1)
    run.note(model.late, "drawn")
    if index in run.optimizers and chance.random() < 0.7:
        run.optimizers[index].add_param_group({"params": list(model.late.parameters())})


def train(run: Script, chance: random.Random) -> None:
    index = chance.choice([one for one in run.optimizers if one >= 0] or range(len(run.models)))
    model = run.models[index].train()
    own = set(map(id, model.parameters()))
    all_of_them = run.optimizers.get(-1)
    known = all_of_them and {id(one) for group in all_of_them.param_groups for one in group["params"]}
    stepping = run.optimizers.get(index) or (all_of_them if known and known & own else None)
    for _ in range(chance.randint(1, 2)):
        loss = model(torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)).square().mean()
        if loss.requires_grad:
            loss.backward()
        if stepping is not None:
            stepping.step()
            stepping.zero_grad()
    run.note(model, "trained")
    run.trained[run.step] = index


@torch.no_grad()
def evaluate(run: Script, chance: random.Random) -> None:
    chance.choice(run.models).eval()(torch.ones(2, 3, 8, 8))


def wrap(run: Script, chance: random.Random) -> None:
    run.others.append(nn.DataParallel(chance.choice(run.models)))


ACTIONS: dict[str, tuple[Callable[[Script, random.Random], None], float]] = {
    **{"build": (build, 2), "copy": (copy_one, 2), "average": (average, 0.7), "pickle": (pickle, 0.7)},
    **{"target": (target, 1.5), "frozen copy": (frozen_copy, 1), "freeze": (freeze, 1), "scale": (scale, 0.5)},
    **{"draw by hand": (draw_by_hand, 2), "draw anew": (draw_anew, 1.5), "load": (load, 2), "save": (save, 2)},
    **{"load saved": (load_saved, 3), "initialize": (initialize, 0.7), "build within": (build_within, 0.5)},
    **{"one optimizer": (one_optimizer, 1), "optimizer": (optimizer, 3), "late layer": (add_late_layer, 1)},
    **{"train": (train, 4), "evaluate": (evaluate, 1), "wrap": (wrap, 0.5)},
}


def draw(seed: int) -> list[str]:
    """What a script does, in order; equal for equal seeds."""
    names, weights = [*ACTIONS], [weight for _, weight in ACTIONS.values()]
    chance = random.Random(seed)
    return ["build", *chance.choices(names, weights, k=chance.randint(2, 8))]


def execute(actions: list[str], seed: int) -> tuple[Script, list[dict[int, Tensor]]]:
    """A run of a script, and the weights after each action."""
    torch.manual_seed(seed)
    run, snapshots = Script(), []
    for run.step, name in enumerate(actions):
        ACTIONS[name][0](run, random.Random(f"{seed} {run.step}"))
        snapshots.append(run.snapshot())
    return run, snapshots


# What must hold.


def violations(seed: int) -> Iterator[str]:
    """What does not hold of a script."""
    actions, wrong = draw(seed), list[str]()
    usual, without = execute(actions, seed)
    state = torch.get_rng_state()
    watched = mock.patch.object(context, "initialize_layers", _watching(context.initialize_layers, wrong))
    try:
        with watched, ci.initializing(settings=SETTINGS):
            run, within = execute(actions, seed)
    except Exception as error:
        yield f"raises {type(error).__name__}: {error}"
        return
    yield from wrong
    if not torch.equal(state, torch.get_rng_state()):
        yield "another random state"
    without.append(usual.snapshot())
    within.append(run.snapshot())
    for index, (a, b) in enumerate(zip(usual.models, run.models, strict=True)):
        yield from (f"model {index}: {what}" for what in _other_changes(a, b))
    steps = [*actions, "end"]
    for number, (weight, part, index) in run.weights.items():
        history = [
            (step, a[number], b[number], run.trained.get(i) == index)
            for i, (step, a, b) in enumerate(zip(steps, without, within, strict=True))
            if number in b
        ]
        events = run.events[id(weight)]
        name = next((name for name, one in convolutions(run.models[index]).items() if one is part), None)
        if name and weight is part.weight:  # else another one was put in its place
            _, usual_end, end, _ = history[-1]
            wrongs = [*_final(part, usual_end, end, events), *_changes(part, history)]
            yield from (f"model {index}, {name}: {what} ({', '.join(events)})" for what in wrongs)


def _watching(initialize_layers: Callable[..., ci.Report], wrong: list[str]) -> Callable[..., ci.Report]:
    """As it is; noted is where its report names other weights than those that it changes."""

    def watched(model: nn.Module, layers: Any, *args: Any, **kwargs: Any) -> ci.Report:
        parts = convolutions(model.module if isinstance(model, nn.DataParallel) else model)
        before = {name: part.weight.detach().clone() for name, part in parts.items()}
        report = initialize_layers(model, layers, *args, **kwargs)
        changed = {name for name, part in parts.items() if not torch.equal(part.weight, before[name])}
        if changed != {layer.name for layer in report.layers if layer.after}:
            wrong.append(
                f"the report of {type(model).__name__} says otherwise than that {sorted(changed)} have changed"
            )
        return report

    return watched


def _other_changes(usual: nn.Module, within: nn.Module) -> Iterator[str]:
    """What differs between the networks of both runs beside the weights of convolutions."""
    weights = {id(part.weight) for part in convolutions(within).values()}
    pairs = zip(usual.state_dict(keep_vars=True).items(), within.state_dict(keep_vars=True).items(), strict=True)
    for (name, one), (_, other) in pairs:
        if id(other) not in weights and not torch.equal(one, other):
            yield f"{name} has changed"
        if (one.requires_grad, [*vars(one)]) != (other.requires_grad, [*vars(other)]):
            yield f"{name} has other attributes"
    for (name, a), (_, b) in zip(usual.named_modules(), within.named_modules(), strict=True):
        if set(vars(a)) != set(vars(b)) or len(a._forward_pre_hooks) != len(b._forward_pre_hooks):
            yield f"{name} has other attributes or hooks"


def _treated(part: _ConvNd, weight: Tensor) -> list[Tensor]:
    """What a descent makes of a weight, with either choice of channels."""
    settings = [ci.Settings(steps=SETTINGS.steps, channels=channels) for channels in ("matched", "all")]
    options = {"groups": part.groups, "transposed": part.transposed}
    return [ci.convsim_(weight.clone(), settings=one, **options) for one in settings]


def _final(part: _ConvNd, usual: Tensor, within: Tensor, events: list[str]) -> Iterator[str]:
    """What is wrong with how a weight ends."""
    once = _treated(part, usual)
    twice = [other for one in once for other in _treated(part, one)] if "treated by hand" in events else []
    if torch.equal(usual, within):
        one_tap = set(part.kernel_size) == {1}  # at which there may be nothing to lower
        if _must_be_treated(events) and not one_tap and not torch.allclose(once[0], usual, atol=EPSILON):
            yield "drawn, and not treated"
    elif not any(torch.allclose(within, one, rtol=1e-4, atol=EPSILON) for one in once + twice):
        yield "neither as it was drawn or loaded, nor treated once"
    elif [event for event in events if event in SETTING][-1:] == ["loaded"]:
        yield "loaded, and treated"


def _must_be_treated(events: list[str]) -> bool:
    """Whether a weight was drawn last, and was not trained, frozen, treated or loaded in a way that forbids it."""
    last = max((i for i, event in enumerate(events) if event in SETTING), default=0)
    before, after = set(events[:last]), events[last + 1 :]
    trained = "trained" in after[: after.index("optimizer") if "optimizer" in after else None]
    if trained or {"frozen", "treated by hand"} & {*events} or events[0] != "drawn":
        return False
    # What is drawn by hand cannot be told from what was trained or loaded before.
    by_hand = events[last] == "drawn by hand" and not {"trained", "optimizer", "loaded", "loaded from here"} & before
    return events[last] == "drawn" or by_hand


def _changes(part: _ConvNd, history: list[tuple[str, Tensor, Tensor, bool]]) -> Iterator[str]:
    """What is wrong with when a weight changes, by each step, its values in both runs, and whether that trains it."""
    trained = False
    for number, (step, usual, within, trains) in enumerate(history):
        if number:
            _, usual_before, before, _ = history[number - 1]
            is_set = not torch.equal(usual_before, usual) or step == "load saved"  # by the script
            trained &= not is_set
            if not (is_set or torch.equal(before, within)) and (trained or step not in TREATING):
                yield f"changed by {step}" + (" after it was trained" if trained else "")
        trained |= trains and part.weight.requires_grad and part.weight.grad is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = Counter[str]()
    for seed in range(options.seed, options.seed + options.scripts):
        for violation in dict.fromkeys(violations(seed)):
            counts["violations"] += 1
            print(f"seed {seed} ({', '.join(draw(seed))}): {violation}", flush=True)
    print(f"{options.scripts} scripts, {counts['violations']} violations")
    return int(counts["violations"] > 0)


if __name__ == "__main__":
    sys.exit(main())
