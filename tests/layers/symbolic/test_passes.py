"""Passes on unknown values: what is known is computed, so that code which keeps it beyond a pass keeps numbers."""

import copy
from functools import cache, lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

import convsim_init as ci
from convsim_init.layers.symbolic.follow import follow
from convsim_init.layers.symbolic.uses import find_uses

FACTORS, COUNT, COUNTS = torch.tensor([1.0, 2.0, 1.0]), torch.zeros(1), np.zeros(1)


@lru_cache
def window(size):
    mask = torch.zeros(size)
    mask[1:] = torch.arange(size - 1) + 1.0
    return mask


@lru_cache
def reach(sigma):
    return int(torch.ceil(torch.tensor(3 * sigma)))


@lru_cache
def factors(device):
    return FACTORS.to(device)


KEPT: dict[str, torch.Tensor] = {}


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x * self.factor())


class ByACache(Kept):
    def factor(self):
        return window(5)


class AsANumber(Kept):
    def factor(self):
        return reach(1.4)


class OfAConstant(Kept):
    def factor(self):
        return factors("cpu").repeat(2)[:5]


class ForTheInput(Kept):
    def factor(self, x):
        if "factor" not in KEPT:
            KEPT["factor"] = torch.linspace(0, 1, 5, dtype=x.dtype, device=x.device)
        return KEPT["factor"]

    def forward(self, x):
        return self.conv(x * self.factor(x))


class InADict(Kept):
    def factor(self):
        if "factor" not in KEPT:
            KEPT["factor"] = torch.linspace(0, 1, 5).view(1, 1, 1, -1)
        return KEPT["factor"]


@pytest.mark.parametrize("kind", [ByACache, AsANumber, OfAConstant, ForTheInput, InADict])
def test_what_code_keeps_outside_the_model_is_what_it_is_without_us(kind):
    model, x = kind().double(), torch.randn(2, 3, 5, 5).double()

    def forget():
        KEPT.clear()
        for function in (window, reach, factors):
            function.cache_clear()

    expected = copy.deepcopy(model)(x)
    forget()
    report = ci.measure(model)
    assert (report.layers[0].reason, report.remarks) == (None, [])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    forget()


LOSSES: list[torch.Tensor] = []
AVERAGES: dict[str, object] = {"mean": 0.0, "all": []}


class Store:
    def __init__(self):
        self.total, self.maps = 0.0, []

    def add(self, x):
        self.total = self.total + x
        self.maps.append(x)


STORE = Store()


class Shared(Kept):
    kept: dict[str, torch.Tensor] = {}  # noqa: RUF012


class Lazy(dict[str, object]):
    """As those of Transformers, which import what they are asked for."""

    def keys(self):
        raise AssertionError("read")

    values = items = __iter__ = keys


LAZY = Lazy(size=1)


def collector():
    found = []

    def collect(x):
        found.append(x)

    return collect, found


collect, FOUND = collector()


class Collecting(Shared):
    """As mixtures of experts collect losses, and those who look at networks collect maps."""

    def factor(self):
        return LAZY["size"]

    def forward(self, x):
        x = super().forward(x)
        LOSSES.append(x.mean())
        AVERAGES["mean"] = AVERAGES["mean"] * 0.9 + 0.1 * x.mean()
        AVERAGES["all"].append(x)
        STORE.add(x.mean())
        self.kept["last"] = x
        collect(x)
        return x


def test_no_unknown_value_stays_outside_the_model():
    model = Collecting()
    ci.measure(model)
    assert (LOSSES, AVERAGES, vars(STORE)) == ([], {"mean": 0.0, "all": []}, {"total": 0.0, "maps": []})
    assert (Shared.kept, FOUND) == ({}, [])
    model(torch.randn(1, 3, 5, 5))
    assert (len(LOSSES), len(AVERAGES["all"]), len(STORE.maps)) == (1, 1, 1)
    LOSSES.clear()


class Keeping(nn.Module):
    """Its forward pass is a patch that knows the model itself, as in code that looks at maps."""

    def __init__(self):
        super().__init__()
        self.conv, self.maps, self.calls = nn.Conv2d(3, 8, 3), [], 0

        def forward(x):
            self.calls += 1
            forward.calls += 1
            self.conv.doubled = 2 * self.conv.weight
            self.maps.append(F.conv2d(x, self.conv.doubled))
            return self.maps[-1]

        forward.calls, self.forward = 0, forward


def test_a_patched_forward_pass_is_copied_with_what_it_knows():
    model = Keeping()
    followed = follow(model)
    assert not followed.failed
    assert [(use.by, use.how) for use in find_uses(followed).by_layer["conv"]] == [("", "replaced")]
    assert (model.calls, model.forward.calls, model.maps, hasattr(model.conv, "doubled")) == (0, 0, [], False)


class Handle:
    """Computes for its model, and is the same for a copy of it, as the handles of sharded parameters are."""

    def __init__(self, model):
        self.model = model

    def __deepcopy__(self, memo):
        return self

    def __call__(self, x):
        self.model.conv.doubled = 2 * self.model.conv.weight
        self.model.maps.append(F.conv2d(x, self.model.conv.doubled))
        return self.model.maps[-1]


def test_no_unknown_value_stays_in_a_model_that_a_pass_reaches_itself():
    model = Keeping()
    model.maps.append(0.5)
    model.forward = Handle(model)
    (layer,) = ci.measure(model).layers
    assert layer.outcome is ci.Outcome.MEASURED
    assert (model.maps, hasattr(model.conv, "doubled")) == ([0.5], False)


SHIFTS: dict[str, torch.Tensor] = {}


def logged(function):
    def inner(*arguments):
        return function(*arguments)

    return inner


@logged
def activated(x):
    return torch.relu(x)


class Logged(nn.Module):
    """Its own function and the other have the same code, which a decorator gave them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    @logged
    def shifted(self, x):
        if "shift" not in SHIFTS:
            SHIFTS["shift"] = x * 0 + 1
        return x + SHIFTS["shift"]

    def forward(self, x):
        return self.second(self.shifted(activated(self.first(x))))


def test_what_a_decorated_function_keeps_is_found_beside_others_of_that_decorator():
    model = Logged()
    ci.measure(model)
    ci.initialize_(model, settings=ci.Settings(steps=1))
    assert SHIFTS == {}


@lru_cache
def like(scale):
    return {"scaled": LOSSES[0] * scale}


@cache
def pair(scale):
    return LOSSES[0] * scale, LOSSES[0] / scale


class OfTheInput(Kept):
    def forward(self, x):
        LOSSES[:] = [x]
        return self.conv(x * like(2)["scaled"] + pair(2)[0])


class OfItsOwn(Kept):
    def __init__(self):
        super().__init__()
        self.weight_of = lru_cache(lambda: self.conv.weight * 2)

    def forward(self, x):
        return F.conv2d(x, self.weight_of())


@pytest.mark.parametrize("kind", [OfTheInput, OfItsOwn])
def test_a_cache_holds_no_unknown_value(kind):
    model, x = kind(), torch.randn(1, 3, 5, 5)
    ci.measure(model)
    assert model(x).isfinite().all()
    like.cache_clear()
    pair.cache_clear()
    LOSSES.clear()


class Assembled(nn.Module):
    """Its weight is written into a part of what is known until then."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def part(self, weight):
        return weight

    def forward(self, x):
        weight = torch.zeros(8, 3, 3, 3)
        self.part(weight)[:, :, 1:].flatten(0, 1)[:, 0] = self.conv.weight[:, :, 0].flatten(0, 1)
        return F.conv2d(x, weight)


class ByItsData(Assembled):
    def part(self, weight):
        return weight.data


class Detached(Assembled):
    def part(self, weight):
        return weight.detach()


@pytest.mark.parametrize("kind", [Assembled, ByItsData, Detached])
def test_a_constant_that_something_unknown_is_written_into_is_known_no_longer(kind):
    uses = find_uses(follow(kind()))
    assert {(use.by, use.how) for use in uses.by_layer["conv"]} == {("", "replaced")}


class Counting(Kept):
    def factor(self):
        COUNT.add_(1)
        COUNT.view(-1)[0] += 1
        torch.add(COUNT, 1, out=COUNT)
        torch._foreach_add_([COUNT], 1)
        torch.as_tensor(COUNTS).add_(1)
        return 1


def test_tensors_and_arrays_that_were_there_before_a_pass_are_not_changed_by_it():
    ci.measure(Counting())
    assert (COUNT, COUNTS) == (0, 0)


class Large(Kept):
    def factor(self):
        return torch.ones(2**24, 2**24)[:1, :1]


class Elsewhere(Kept):
    def factor(self):
        return torch.ones(1, device="xpu")


@pytest.mark.parametrize("kind", [Large, Elsewhere])
def test_constants_that_cannot_be_computed_here_are_unknown(kind):
    assert not follow(kind()).failed


class Steps(nn.Module):
    """Goes through time steps, as diffusion models do that are sampled from in their forward pass."""

    def __init__(self, kind):
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(9)))
        self.steps = kind(torch.linspace(0, 1, 10**4))

    def forward(self, x):
        for step in self.steps:
            x = self.convs(x) * step
        return x


@pytest.mark.parametrize("kind", [nn.Parameter, torch.clone])
def test_loops_over_many_numbers_are_followed_for_one_turn(kind):
    ((nodes, whole),) = follow(Steps(kind)).runs
    assert (len([node for node in nodes if node.module is not None]), whole) == (9, True)


def widened(x):
    while len(x.shape) < 4:
        x = x.unsqueeze(-1)
    return x


def widened_by_an_index(x):
    while x.dim() < 4:
        x = x[..., None]
    return x


def pooled(x):
    while x.ndim > 2:
        x = x.mean(-1)
    return x


def pooled_by_name(x):
    while x.dim() > 2:
        x = torch.amax(x, dim=2)
    return x


def pooled_by_several(x):
    while x.dim() > 2:
        x = x.mean((-2, -1)) if x.dim() > 3 else x.argmax(-1)
    return x


def pooled_by_an_index(x):
    while x.dim() > 2:
        x = x[..., 0]
    return x


def squeezed(x):
    x = x[:, :, :1]
    while x.dim() > 2:
        x = x.squeeze(-1)
    return x


def widened_to_fewer_than_guessed(x):
    while x.dim() != 2:
        x = x.unsqueeze(-1)
    return x


def pooled_to_more_than_guessed(x):
    while x.dim() != 4:
        x = x.sum(0)
    return x


OTHERS = [pooled_by_several, pooled_by_an_index, widened_to_fewer_than_guessed, pooled_to_more_than_guessed]


@pytest.mark.parametrize("loop", [widened, widened_by_an_index, pooled, pooled_by_name, squeezed, *OTHERS])
def test_loops_until_there_are_so_many_dimensions_end(loop):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 8, 3), nn.LazyBatchNorm2d() if "widened" in loop.__name__ else None

        def forward(self, x):
            x = loop(self.conv(x))
            return x if self.norm is None else self.norm(x)

    followed = follow(Net())
    assert followed.failed == set()
    ((nodes, whole),) = followed.runs
    assert whole
    assert len(nodes) < 100


def cond(x):
    """Of the same name as that of `torch.cond`, which is given other arguments."""
    if has_torch_function((x,)):
        return handle_torch_function(cond, (x,), x)
    return x


def test_a_function_of_that_name_is_not_taken_for_the_condition_of_torch():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(cond(x)))

    assert follow(Named()).failed == set()
