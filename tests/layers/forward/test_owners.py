"""Forward passes that change the weights of several convolutions: what is reported is what those are given."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from seen import given, similarity_of
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import convsim_init as ci

SETTINGS = ci.Settings(steps=8, channels="matched")


class Convex(nn.Module):
    """A network some of whose kernels may not be negative, as an input convex one's."""

    def __init__(self, alter=lambda network: None):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.hidden = nn.ModuleList(nn.Conv2d(16, 16, 3) for _ in range(2))
        self.last, self.alter = nn.Conv2d(16, 16, 3), alter

    def forward(self, x):
        self.alter(self)
        x = self.first(x).relu()
        for layer in self.hidden:
            x = layer(x).relu()
        return self.last(x)


def by_loop(network):
    for module in network.hidden:
        module.weight.data.clamp_(min=0)


def by_parameters(network):
    for parameter in network.hidden.parameters():
        parameter.data.clamp_(min=0)


@torch.no_grad()
def by_names(network):
    for name, parameter in network.named_parameters():
        if name.startswith("hidden"):
            parameter.clamp_(min=0)


def by_state_dict(network):
    for name, tensor in network.state_dict().items():
        if name.startswith("hidden"):
            tensor.clamp_(min=0)


def by_modules(network):
    for module in network.modules():
        if getattr(module, "in_channels", 0) == 16:
            module.weight.data.clamp_(min=0)


def by_application(network):
    network.hidden.apply(lambda module: module.weight.data.clamp_(min=0) if hasattr(module, "weight") else None)


@torch.no_grad()
def by_variable(network):
    for layer in network.hidden:
        weight = layer.weight
        weight *= 0.5 + 0.5 * weight.sign()


class OnTheWay(Convex):
    def forward(self, x):
        x = self.first(x).relu()
        for layer in self.hidden:
            layer.weight.data.clamp_(min=0)
            x = layer(x).relu()
        return self.last(x)


class Absolute(Convex):
    def forward(self, x):
        x = self.first(x).relu()
        for layer in self.hidden:
            x = layer._conv_forward(x, layer.weight.abs(), layer.bias)
        return self.last(x)


def limited(layer, low):
    layer.weight.data.clamp_(min=low)


class Limit:
    """No module, but what one may hold."""

    def __init__(self, layers=()):
        self.weights = [layer.weight for layer in layers]

    def __call__(self, layer):
        self.apply(layer)

    def apply(self, layer):
        limited(layer, 0)

    def step(self):
        for weight in self.weights:
            weight.data.clamp_(min=0)


LIMIT = Limit()


class Holding(Convex):
    def __init__(self, alter):
        super().__init__(alter)
        self.limit, self.bound = Limit(self.hidden), Limit(self.hidden).step
        self.limits = {"all": [partial(limited, low=0), Limit()]}
        self.gathered = list(self.hidden.parameters())


def by_gathered(network):
    for weight in network.gathered:
        weight.data.clamp_(min=0)


@torch.no_grad()
def by_function(network):
    for weight in network.gathered:
        torch.clamp_(weight, min=0)


@torch.no_grad()
def by_function_of_many(network):
    torch._foreach_clamp_min_(network.gathered, 0)


def by_initialization(network):
    for weight in network.gathered:
        nn.init.constant_(weight, 0.1)


class ByLoading(Convex):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.rand(16, 16, 3, 3))
        self.alter = lambda network: network.hidden[0].load_state_dict({"weight": network.kernel}, strict=False)


class OwnCall(Convex):
    def __call__(self, x):
        self.hidden[0].weight.data.clamp_(min=0)
        return super().__call__(x)


class Functional(Convex):
    def forward(self, x):
        x = self.first(x).relu()
        for layer in self.hidden:
            used = {name: parameter.abs() for name, parameter in layer.named_parameters()}
            x = torch.func.functional_call(layer, used, (x,)).relu()
        return self.last(x)


class ByZip(Convex):
    """The lengths of what it goes through beside its layers are not known without an input."""

    def forward(self, x):
        x = self.first(x).relu()
        for layer, part in zip(self.hidden, x.expand(len(self.hidden), *x.shape).split(1), strict=False):
            x = F.conv2d(x + part[0], layer.weight.abs(), layer.bias).relu()[..., :1, :1].expand_as(x)
        return self.last(x)


class ByZipWithAParameter(Convex):
    def __init__(self):
        super().__init__()
        self.signs = nn.Parameter(torch.ones(len(self.hidden)))

    def forward(self, x):
        x = self.first(x).relu()
        for layer, sign in zip(self.hidden, self.signs, strict=False):
            x = F.conv2d(x, layer.weight.abs() * sign, layer.bias).relu()
        return self.last(x)


WAYS = {
    "loop": (Convex, by_loop),
    "index": (Convex, lambda network: network.hidden[0].weight.data.clamp_(min=0)),
    "parameters": (Convex, by_parameters),
    "names": (Convex, by_names),
    "state dict": (Convex, by_state_dict),
    "modules": (Convex, by_modules),
    "application": (Convex, by_application),
    "variable": (Convex, by_variable),
    "object": (Holding, lambda network: network.limit.apply(network.hidden[0])),
    "callable": (Holding, lambda network: network.limit(network.hidden[0])),
    "global callable": (Holding, lambda network: LIMIT(network.hidden[0])),
    "what an object holds": (Holding, lambda network: network.limit.step()),
    "bound method": (Holding, lambda network: network.bound()),
    "partial in a dict": (Holding, lambda network: network.limits["all"][0](network.hidden[0])),
    "callable in a dict": (Holding, lambda network: network.limits["all"][1](network.hidden[0])),
    "gathered": (Holding, by_gathered),
    "function": (Holding, by_function),
    "function of many": (Holding, by_function_of_many),
    "initialization": (Holding, by_initialization),
    **{kind.__name__: (kind,) for kind in (OnTheWay, Absolute, ByLoading, OwnCall, Functional)},
    **{kind.__name__: (kind,) for kind in (ByZip, ByZipWithAParameter)},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_reported_is_what_the_convolutions_are_given(way):
    kind, *alter = WAYS[way]
    model = kind(*alter)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ci.measure(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    report = ci.initialize_(model, settings=SETTINGS)
    assert not report.remarks
    assert not any("used together" in str(layer.reason) for layer in report.layers)
    changed = 0
    for layer, weight in zip(report.layers, given(model.eval(), torch.randn(1, 3, 16, 16)), strict=True):
        if layer.after:
            assert layer.after["normalized_similarity"] == similarity_of(weight)
            changed += layer.outcome is ci.Outcome.APPROXIMATED
        else:
            assert "is no better" in layer.reason
            changed += 1
    assert changed >= 1


@pytest.mark.parametrize("way", ["loop", "names", "modules", "what an object holds", "function of many", "Functional"])
def test_one_that_cannot_be_tried_is_told(way):
    kind, *alter = WAYS[way]

    class Network(kind):
        """Takes no input of a convolution."""

        def __init__(self):
            super().__init__(*alter)
            self.embedding = nn.Embedding(4, 3)

        def forward(self, x):
            return super().forward(self.embedding(x).permute(0, 3, 1, 2))

    for layer in ci.initialize_(Network(), settings=SETTINGS).layers[1:3]:
        assert layer.reason == "Network may change it in its forward pass, which could not be tried"


class WithinSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x):
        for parameter in self.body.parameters():
            parameter.data.clamp_(min=0)
        return self.body(x)


class LoopWithinSequential(WithinSequential):
    def forward(self, x):
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                module.weight.data.clamp_(min=0)
        return self.body(x)


class GatheredWithinSequential(WithinSequential):
    def __init__(self):
        super().__init__()
        self.gathered = list(self.body.parameters())

    def forward(self, x):
        for weight in self.gathered:
            weight.data.clamp_(min=0)
        return self.body(x)


@pytest.mark.parametrize("kind", [WithinSequential, LoopWithinSequential, GatheredWithinSequential])
def test_changes_further_inside_are_told(kind):
    remark = "not tried, though they may use other weights: the forward passes of (the model itself)"
    assert ci.initialize_(kind(), settings=SETTINGS).remarks == [remark]


class Asking(nn.Module):
    """What is named beside weights changes none of them."""

    def __init__(self):
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.embedding, self.norms = nn.Embedding(10, 8), nn.ModuleList([nn.BatchNorm2d(8)])
        self.lambda_ = 2.0

    def forward(self, x, t):
        raise NotImplementedError


class InPlaceBeside(Asking):
    def forward(self, x, t):
        table = self.embedding
        x = self.conv(x)
        x.add_(F.embedding(t, table.weight)[:, :, None, None])
        for norm in self.norms:
            x.mul_(norm.weight[:, None, None])
        return self.body(x)


class InPlaceOverChildren(Asking):
    def forward(self, x, t):
        for part in self.children():
            x = F.relu_(part(x))
        return x


class InPlaceByDevice(Asking):
    def forward(self, x, t):
        x = self.conv(x.data.to(next(self.parameters()).device, next(self.body.parameters()).dtype))
        x.sub_(self.body(x)).fill_(sum(parameter.square().sum() for parameter in self.parameters()))
        for parameter in self.parameters():
            parameter.requires_grad_()
        return F.relu_(x) * self.lambda_


class Mover:
    """Puts parameters where they belong, as an offloading hook does."""

    def move(self, part, name):
        *above, last = name.split(".")
        for parent in above:
            part = getattr(part, parent)
        part._parameters[last] = nn.Parameter(part._parameters[last].to(torch.float32))


class InPlaceByTheWay(Asking):
    """Its buffers, counters, gradients, and the weights of what is no convolution."""

    def __init__(self):
        super().__init__()
        self.mover = Mover()
        self.linear, self.count, self.history, self.means = nn.Linear(8, 8), 0, [torch.zeros(1)], {}
        self.register_buffer("mean", torch.zeros(8))

    def limit(self, x):
        self.linear.weight.data.clamp_(-1, 1)
        x[:, 0] += self.linear.weight[0, 0]

    def forward(self, x, t):
        for parameter in self.parameters():
            self.count += parameter.numel()
            if parameter.grad is not None:
                parameter.grad.clamp_(-1, 1)
        for tensor in (*self.buffers(), *self.history):
            tensor.data.mul_(0.9)
        for part in self.modules():
            part.calls = getattr(part, "calls", 0)
            part.calls += 1
        self.mover.move(self, "body.0.weight")
        x.data.clamp_(-1, 1)
        self.mean.data.mul_(0.9)
        self.means["all"] = torch.zeros_like(self.linear.bias).add_(1)
        self.limit(x)
        return self.body(F.relu_(self.conv(x)))


@pytest.mark.parametrize("kind", [InPlaceBeside, InPlaceOverChildren, InPlaceByDevice, InPlaceByTheWay])
def test_what_is_changed_beside_weights_is_no_change_of_them(kind):
    report = ci.initialize_(kind(), settings=SETTINGS)
    assert not report.remarks
    assert [layer.reason for layer in report.layers] == [None] * 2


def clamp(part, *_):
    part.conv.weight.data.clamp_(min=0)


class Clamping:
    def __call__(self, part, inputs):
        for parameter in part.parameters():
            parameter.data.clamp_(min=0)


class Watching:
    """Looks at what comes by, as a profiler does."""

    def __init__(self):
        self.seen = []

    def __call__(self, part, inputs, *outputs):
        self.seen.append((sum(parameter.numel() for parameter in part.parameters()), next(part.parameters()).dtype))
        part.calls = getattr(part, "calls", 0) + 1
        for tensor in inputs:
            tensor.mul_(1)


class Several(nn.Module):
    """Cannot be tried: it takes several inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x, t):
        return self.conv(x) + t


@pytest.mark.parametrize("hook", [clamp, Clamping(), Watching()], ids=["function", "object", "harmless"])
def test_a_hook_before_what_cannot_be_tried_is_told_if_it_may_change_weights(hook):
    model = nn.ModuleList([Several()])
    model[0].register_forward_pre_hook(hook)
    (layer,) = ci.measure(model).layers
    harmless = isinstance(hook, Watching)
    expected = None if harmless else "a hook of Several may change it in its forward pass, which could not be tried"
    assert layer.reason == expected


class Log:
    """Keeps what comes by, and the model that it belongs to."""

    passes = 0

    def __init__(self, model):
        self.model, self.shapes = model, []
        for part in model:
            part.register_forward_pre_hook(self.note)

    def note(self, part, inputs):
        type(self).passes += isinstance(part, nn.Conv2d)  # also of a copy
        self.shapes.append((len(inputs), part.extra_repr()))


def test_for_a_hook_that_changes_no_weight_a_layer_runs_once(monkeypatch):
    monkeypatch.setattr(Log, "passes", 0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), spectral_norm(nn.Conv2d(8, 8, 3)))
    twin, log = copy.deepcopy(model), Log(model)
    report = ci.initialize_(model, settings=SETTINGS)
    assert Log.passes <= 4  # one of the two layers each, and the symbolic pass
    assert not log.shapes
    expected = ci.initialize_(twin, settings=SETTINGS)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert [layer.reason for layer in report.layers] == [layer.reason for layer in expected.layers]


class Through:
    """A hook whose change of weights its own code does not name."""

    def __init__(self, change):
        self.changes = [change]

    def __call__(self, part, inputs):
        for change in self.changes:
            change(part, *inputs)


HOLES = torch.arange(27).view(3, 3, 3) % 3 != 0
KEPT_ALREADY = {  # what a hook leaves as it is at the first weight, and at zeros
    "masked": (lambda w, x: w.mul_(HOLES), "within its mask, 67% of the entries"),
    "positive": (lambda w, x: w.clamp_(min=0), "its class keeps a weight that differs by "),
    "at-zeros": (lambda w, x: w.mul_(1 + HOLES * x.abs().max()), "depends on its input"),
}


@pytest.mark.parametrize(("change", "reason"), KEPT_ALREADY.values(), ids=KEPT_ALREADY)
def test_a_hook_that_would_change_other_weights_is_found_by_other_weights(change, reason):
    conv = nn.Conv2d(3, 8, 3)
    conv.weight.data.copy_(conv.weight.data.abs() * HOLES)
    conv.register_forward_pre_hook(Through(lambda part, x: change(part.weight.data, x)))
    (layer,) = ci.initialize_(conv, settings=SETTINGS).layers
    assert reason in layer.reason


def test_a_hook_that_refuses_a_trial_input_does_not_let_a_spectral_norm_converge_further():
    def of_one_sample(part, inputs):
        if len(*inputs) != 1:
            raise ValueError

    torch.manual_seed(0)
    plain = spectral_norm(nn.Conv2d(4, 8, 3))
    hooked = copy.deepcopy(plain)
    hooked.register_forward_pre_hook(of_one_sample)
    after = [ci.initialize_(conv, settings=SETTINGS).layers[0].after for conv in (plain, hooked)]
    assert after[0] == after[1]


def with_hook(place, *, after=False, own=False, harmless=False):
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))

    def hook(part, *_):
        model[2].weight.data.clamp_(min=0)

    def hook_of_its_own(part, *_):
        part.weight.data.clamp_(min=0)

    register = model[place].register_forward_hook if after else model[place].register_forward_pre_hook
    register(Watching() if harmless else hook_of_its_own if own else hook)
    return model


def with_part_that_clamps():
    class Clamp(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.others = [other]

        def forward(self, x):
            self.others[0].weight.data.clamp_(min=0)
            return x

    conv = nn.Conv2d(3, 8, 3)
    return nn.Sequential(Clamp(conv), conv)


HOOKS = "not tried, though they may change weights of others or later: hooks of "
ELSEWHERE = {
    "before-relu": (lambda: with_hook(0), [HOOKS + "0"]),
    "before-conv": (lambda: with_hook(1), [HOOKS + "1"]),
    "after-conv": (lambda: with_hook(1, after=True), [HOOKS + "1"]),
    "after-own": (lambda: with_hook(1, after=True, own=True), [HOOKS + "1"]),
    "harmless": (lambda: with_hook(0, harmless=True), []),
    "harmless-after": (lambda: with_hook(1, after=True, harmless=True), []),
    "part": (with_part_that_clamps, ["not tried, though they may use other weights: the forward passes of 0"]),
}


@pytest.mark.parametrize("build", ELSEWHERE)
def test_changes_from_elsewhere_are_told(build):
    model, remarks = ELSEWHERE[build]
    assert ci.measure(model()).remarks == remarks


class Merged(nn.Module):
    """Two branches when it trains, one convolution when it does not."""

    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 16, 1)

    def merged(self):
        return self.large.weight + F.pad(self.small.weight, (1, 1, 1, 1))

    def forward(self, x):
        if self.training:
            return self.large(x) + self.small(x)
        return F.conv2d(x, self.merged(), self.large.bias + self.small.bias, padding=1)


def test_branches_that_are_merged_in_evaluation_mode_keep_the_norms_of_their_sum():
    model = Merged()
    before, small = model.merged().detach(), model.small.weight.detach().clone()
    large, other = ci.initialize_(model, settings=SETTINGS).layers
    after = model.merged().detach()
    torch.testing.assert_close(after.flatten(1).norm(dim=1), before.flatten(1).norm(dim=1))
    assert large.outcome is ci.Outcome.INITIALIZED
    assert large.after["normalized_similarity"] == similarity_of(after)
    assert "in evaluation mode, called no convolution with a weight of that shape" in other.reason
    assert torch.equal(model.small.weight, small)


class Shift(nn.Module):
    """A parametrization that adds another weight."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, weight):
        return weight + self.other


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return F.conv2d(x, self.b.weight) + F.conv2d(x, self.a.weight + self.b.weight)


def shifted_by_a_parametrization():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Shift(model[1].weight))
    return model


class ShiftByHeld(Shift):
    """Adds the weight of a convolution that a list of its own holds."""

    def forward(self, weight):
        return weight + self.other[0].weight


def shifted_by_what_is_held():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", ShiftByHeld([model[1]]))
    return model


@pytest.mark.parametrize(
    ("build", "first"), [(shifted_by_a_parametrization, 0), (shifted_by_what_is_held, 0), (Shifted, 1)]
)
def test_a_weight_within_another_one_that_is_treated_is_left_alone(build, first):
    model = build()
    assert [layer.outcome for layer in ci.measure(model).layers] == [ci.Outcome.MEASURED] * 2
    report = ci.initialize_(model, settings=SETTINGS)
    assert [layer.outcome.value for layer in report.layers] == ["initialized", "skipped"]
    assert report.layers[1].reason.endswith(f"used together with {report.layers[0].name}, as one weight")
    used = given(model.eval(), torch.randn(1, 8, 9, 9))[first]
    assert report.layers[0].after["normalized_similarity"] == similarity_of(used)


@pytest.mark.parametrize("alone", ["a single filter", "zeros"])
def test_what_will_not_be_treated_stands_in_no_ones_way(alone):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Conv2d(8, 1 if alone == "a single filter" else 8, 3, padding=1)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            if alone == "zeros":
                nn.init.zeros_(self.gate.weight)

        def forward(self, x):
            return self.gate(x) * F.conv2d(x, self.conv.weight + self.gate.weight, padding=1)

    gate, conv = ci.initialize_(Gated(), settings=SETTINGS).layers
    assert gate.outcome is ci.Outcome.SKIPPED
    assert conv.outcome is ci.Outcome.INITIALIZED


class Holding(nn.Module):
    """Holds a convolution that others hold too."""

    def __init__(self, conv):
        super().__init__()
        self.convs, self.mask = nn.ModuleList([conv]), torch.rand(conv.weight.shape) < 0.5

    def forward(self, x):
        return self.convs[0](x)


class HoldingMasked(Holding):
    def forward(self, x):
        return F.conv2d(x, self.convs[0].weight * self.mask)


class HoldingMaskedInPlace(Holding):
    def forward(self, x, scale):
        self.convs[0].weight.data *= self.mask
        return super().forward(x) * scale


KINDS = [(Holding, HoldingMasked), (HoldingMasked, Holding), (HoldingMasked, HoldingMasked)]


@pytest.mark.parametrize("kinds", [*KINDS, (Holding, HoldingMaskedInPlace), (Holding, Holding, HoldingMasked)])
def test_another_module_that_holds_a_convolution_too_may_use_another_weight_of_it(kinds):
    conv = nn.Conv2d(4, 8, 3)
    model = nn.Sequential(*(kind(conv) for kind in kinds))
    remark = "held by other modules too, which may use other weights, and those do not count: 0.convs.0 (in "
    for report in (ci.measure(model), ci.initialize_(model, settings=SETTINGS)):
        assert report.remarks == [f"{remark}{len(kinds) - 1})"]


def test_a_convolution_that_several_modules_hold_and_use_alike_is_no_trouble():
    conv = nn.Conv2d(4, 8, 3)
    masked = HoldingMasked(conv)
    further = HoldingMasked(conv)
    further.mask = masked.mask
    for parts in ((Holding(conv), Holding(conv), conv), (masked, nn.Sequential(masked), further)):
        assert ci.initialize_(nn.ModuleDict(dict(zip("abc", parts, strict=True))), settings=SETTINGS).remarks == []
