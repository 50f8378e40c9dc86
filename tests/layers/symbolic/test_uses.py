"""What code names: functions that convolve however they are held, and no attributes of the same name."""

import copy
import gc
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convsim_init as ci
from convsim_init.layers.symbolic.follow import follow
from convsim_init.layers.symbolic.uses import find_uses

TABLE = {1: F.conv1d, 2: F.conv2d}


def convolve(x, kernel):
    return TABLE[kernel.dim() - 2](x, kernel)


class Operator:
    """No module, but what one may hold; its methods have the names of a module's."""

    def __call__(self, x, kernel):
        return F.conv2d(x, kernel)

    def apply(self, x, kernel):
        return self(x, kernel)


OPERATOR = Operator()


class Held(nn.Module):
    """Calls what it holds, or what its code names, in some way."""

    by_class = staticmethod(F.conv2d)

    def __init__(self, way=None):
        super().__init__()
        self.kernel, self.way = nn.Parameter(torch.randn(8, 3, 3, 3)), way
        self.function, self.partial, self.table = F.conv2d, partial(F.conv2d, padding=1), [F.conv2d]
        self.held, self.library, self.operator = convolve, F, Operator()
        self.operators = {"plain": [partial(Operator(), kernel=self.kernel)]}

    def forward(self, x):
        return self.way(self, x)


class ByCall(Held):
    def __call__(self, x):
        return F.conv2d(super().__call__(x), self.kernel)

    def forward(self, x):
        return x


def by_local_import(m, x):
    from torch.nn import functional

    return functional.conv2d(x, m.kernel)


WAYS = {
    "name": lambda m, x: torch.nn.functional.conv2d(x, m.kernel),
    "attribute": lambda m, x: m.function(x, m.kernel),
    "partial": lambda m, x: m.partial(x, m.kernel),
    "list": lambda m, x: m.table[0](x, m.kernel),
    "table": lambda m, x: TABLE[x.dim() - 2](x, m.kernel),
    "class": lambda m, x: m.by_class(x, m.kernel),
    "made name": lambda m, x: getattr(F, f"conv{x.dim() - 2}d")(x, m.kernel),
    "function": lambda m, x: m.held(x, m.kernel),
    "library": lambda m, x: m.library.conv2d(x, m.kernel),
    "local import": by_local_import,
    "object": lambda m, x: m.operator.apply(x, m.kernel),
    "nested objects": lambda m, x: m.operators["plain"][0](x),
    "global object": lambda m, x: OPERATOR(x, m.kernel),
}
HOLDING = {name: partial(Held, way) for name, way in WAYS.items()} | {"call": ByCall}


@pytest.mark.parametrize("build", HOLDING.values(), ids=HOLDING.keys())
def test_a_function_that_convolves_is_found_however_it_is_held(build):
    held = build()
    held(torch.zeros(1, 3, 4, 4))
    model = nn.Sequential(held, nn.BatchNorm2d(8), nn.Conv2d(8, 19, 3))
    remark = f"not looked at, though they may convolve: 1 {type(held).__name__}, with "
    (found,) = ci.initialize_(model, settings=ci.Settings(steps=1)).remarks
    assert found.startswith(remark)
    with pytest.raises(ci.InputError, match=f"the code of {type(held).__name__} seems to call some"):
        ci.initialize_(nn.Sequential(build()))


class Attributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1d, self.lstm = nn.Conv1d(4, 8, 3), nn.LSTM(8, 1)
        self.parts = nn.ModuleDict({"conv2d": nn.Linear(4, 4)})

    def forward(self, x, sizes=()):
        x = F.relu(self.conv1d(x)) + sum(self.conv1d(x) for _ in range(2)) + getattr(self, f"conv{1}d")(x)
        return self.lstm(x.permute(2, 0, 1))[0], self.parts["conv2d"]


class Variables(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs, self.fc = nn.ModuleList([nn.Conv1d(4, 8, 3)]), nn.Linear(8, 2)
        self.conv0 = nn.Identity()

    def forward(self, x):
        for conv1d in self.convs:
            x = conv1d(x)
        for conv in self.convs:
            name = f"conv{0}"
            x = getattr(self, name)(x) + getattr(conv, f"conv{0}", nn.Identity())(x)
        return self.fc(torch.cat([conv1d(x) for conv1d in self.convs]))


def named():
    return F.conv1d


class NamedAsFunctions(nn.Module):
    """Has attributes of the names of functions of this file that convolve."""

    def __init__(self):
        super().__init__()
        self.named, self.convolve = nn.Conv1d(4, 8, 3), nn.Identity()

    def forward(self, x):
        return self.convolve(self.named(x))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3)
        self.weight = self.conv.weight

    def forward(self, x):
        return self.conv(F.pad(x, (1, 1)))


@pytest.mark.parametrize("kind", [Attributes, Variables, NamedAsFunctions, Wrapper])
def test_attributes_of_such_a_name_say_nothing(kind):
    report = ci.initialize_(nn.Sequential(kind()), settings=ci.Settings(steps=1))
    assert not report.remarks
    assert [layer.outcome for layer in report.layers] == [ci.Outcome.INITIALIZED]


def test_no_cache_keeps_a_model_alive_by_its_functions():
    def function(x):
        return x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Wrapper())
    model[1].held, function.owner = function, model
    model[1].other = lambda x, model=model: model(x)
    ci.initialize_(model, settings=ci.Settings(steps=1))
    alive = weakref.ref(model)
    del model, function
    gc.collect()
    assert alive() is None


def hidden(way):
    """A convolution that is no part of the module that uses it."""
    conv = nn.Conv2d(8, 8, 3)
    return {
        "list": [conv],
        "dict": {"a": [nn.Sequential(conv)]},
        "function": lambda x: conv(x),
        "method": conv.forward,
    }[way]


class Hiding(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.held, self.way = nn.Conv2d(3, 8, 3), hidden(way), way
        self.parts, self.unused = (lambda: [self.conv]), hidden("list")

    def forward(self, x):
        apply = {"list": lambda: self.held[0], "dict": lambda: self.held["a"][0]}.get(self.way, lambda: self.held)()
        return apply(self.parts()[0](x))


@pytest.mark.parametrize("way", ["list", "dict", "function", "method"])
def test_convolutions_that_are_no_parts_of_the_model_are_told(way):
    remark = "not looked at, for they are no parts of the model: convolutions that 0 calls"
    model = nn.Sequential(Hiding(way))
    assert ci.measure(model).remarks == [remark]
    model[0].conv = nn.Identity()
    with pytest.raises(ci.InputError, match="the code of Hiding seems to call some"):
        ci.measure(model)


class Strict:
    """Refuses to tell anything of itself."""

    @property
    def __dict__(self):
        raise RuntimeError

    def __getattr__(self, name):
        raise KeyError(name)

    def __call__(self, *_):
        return None


class Computing(list):
    def __iter__(self):
        raise RuntimeError


class Circle:
    def __init__(self):
        self.itself, self.many = self, [[self], {"a": (self,)}]
        self.many.append(self.many)


@pytest.mark.parametrize(
    "value", [Strict(), Computing([1]), Circle(), [list(range(10**5))] * 3], ids=lambda value: type(value)
)
def test_objects_of_any_kind_are_no_obstacle(value):
    model = nn.Sequential(Wrapper())
    model[0].held, model[0].conv.held = value, [value]
    if callable(value):
        model[0].register_forward_pre_hook(value)
        model[0].conv.register_forward_hook(value)
    assert [layer.reason for layer in ci.measure(model).layers] == [None]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_hooks_are_followed_and_nothing_that_they_know_is_touched():
    model, teacher, features, counts = nn.Sequential(Two()), Two(), [], {"calls": 0}

    class Recorder:
        def __init__(self):
            self.shapes, self.model = [], model

        def __call__(self, module, inputs, output, *, scale=1):
            self.shapes.append(output.shape)
            self.model[0].calls = getattr(self.model[0], "calls", 0) + scale

    def note(module, inputs, *outputs, step=1):
        features.extend(outputs)
        counts["calls"] += step
        model[0].seen = teacher(inputs[0])

    recorder = Recorder()
    model.register_forward_hook(note)
    model[0].register_forward_pre_hook(note)
    model[0].conv.register_forward_hook(recorder)
    report = ci.initialize_(model, settings=ci.Settings(steps=1))
    assert (report.layers[0].channels, report.layers[0].reason) == ("matched", None)
    assert "teacher" not in str(report.remarks)
    assert (features, counts, recorder.shapes) == ([], {"calls": 0}, [])
    assert not hasattr(model[0], "calls")
    assert not hasattr(model[0], "seen")


SEEN = []


def see(value):
    SEEN.append(value)


def by_global(module, inputs, output):
    SEEN.append(output)


def by_function_of_global(module, inputs, output):
    see(output)


def by_closure(held):
    def note():
        held.append(1)

    @torch.no_grad()
    def hook(module, inputs, output):
        note()

    return hook


def by_large_object(held):
    store = SimpleNamespace(features=torch.empty(2**26, device="meta"), outputs=held)
    return lambda module, inputs, output: store.outputs.append(output)


def by_array(held):
    store = SimpleNamespace(features=np.empty(2**25), outputs=held)
    return lambda module, inputs, output: store.outputs.append(output)


def by_teacher(held):
    teacher = Two()
    teacher.outputs = held

    def hook(module, inputs, output):
        teacher.outputs.append(teacher(inputs[0]))
        teacher.conv.calls = 1
        held.extend(vars(teacher.conv).get("calls", []))

    return hook


HOOKS = {
    "global": lambda held: by_global,
    "function of global": lambda held: by_function_of_global,
    "partial": lambda held: partial(by_global),
    **{hook.__name__: hook for hook in (by_closure, by_large_object, by_array, by_teacher)},
}


@pytest.mark.parametrize("kind", HOOKS)
def test_what_hooks_change_is_a_copy(kind):
    model, held = nn.Sequential(Two()), []
    model[0].register_forward_hook(HOOKS[kind](held))
    ci.initialize_(model, settings=ci.Settings(steps=1))
    assert held == SEEN == []


def test_hooks_may_know_the_model_within_another_module():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3))
    wrapper, weight = nn.Sequential(model), model[1].weight
    model[0].register_forward_pre_hook(lambda *_: wrapper[0].eval() and None)
    model[0].register_forward_hook(lambda *_: weight.data.clamp_(min=0) and None)
    followed = follow(model)
    assert find_uses(followed).changed == {id(weight)}


def test_copies_of_what_hooks_know_have_no_data():
    teacher = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Linear(2, 2**10))
    model, store = nn.Sequential(Two()), SimpleNamespace(teacher=teacher, more=[torch.zeros(2)])

    def hook(module, inputs, output):
        assert store.teacher[0].weight.is_meta
        assert store.more[0].is_meta

    model.register_forward_hook(hook)
    assert not follow(model).failed


def test_hooks_are_given_arguments_as_they_usually_are():
    model, teacher = nn.Sequential(Two()), Two()
    model.register_forward_hook(lambda module, inputs, output: (teacher(inputs[0]), output)[1])
    model[0].register_forward_pre_hook(lambda module, inputs, kwargs: ((inputs[0] * 2,), {}), with_kwargs=True)
    model[0].conv.register_forward_pre_hook(lambda module, inputs: inputs[0] * 2)
    assert not follow(model).failed
    assert not follow(model[0]).failed


def test_a_hook_may_look_at_the_model_itself():
    model = nn.Sequential(Two(), nn.Conv2d(8, 8, 3))
    model[0].register_forward_hook(lambda *_: print(ci.measure(model)))
    assert [layer.reason for layer in ci.measure(model).layers] == [None, None]


class Failing(Two):
    def forward(self, x, y):
        raise ValueError


class Stubborn(Failing):
    def __deepcopy__(self, memo):
        raise TypeError


@pytest.mark.parametrize("kind", [Failing, Stubborn])
def test_what_a_forward_pass_that_cannot_be_followed_does_is_not_known(kind):
    failing, other = ci.measure(nn.ModuleList([kind(), Two()])).layers
    assert failing.reason == f"whether {kind.__name__} uses another weight of it could not be told"
    assert other.reason is None
    failing = kind()
    failing.conv = None
    with pytest.raises(ci.InputError, match=f"none that is known: the code of {kind.__name__} could not be followed"):
        ci.measure(failing)


class Proxy:
    """Stands for a module, whose class it says to have, as wrappers of bitorch and wrapt do."""

    def __init__(self, module):
        vars(self)["module"] = module

    __class__ = property(lambda self: type(self.module))

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, x):
        return self.module(x)


def test_what_only_says_that_it_is_a_module_may_be_part_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.add_module("last", Proxy(nn.Conv2d(8, 8, 3)))
    for layer in ci.initialize_(model, settings=ci.Settings(steps=1)).layers:
        assert layer.outcome is ci.Outcome.INITIALIZED


class ByNumpy(nn.Module):
    """Leaves PyTorch on the way, so that it cannot be followed, and cannot be given the input of the last."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Conv2d(3, 8, 3), nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.last, self.mask = nn.Conv2d(8, 16, 3), torch.rand(16, 8, 3, 3) < 0.5

    def forward(self, x):
        x = self.first(x)
        x = x + torch.from_numpy(x.detach().numpy())
        for block in self.blocks:
            x = block(x)
        return self.last(F.conv2d(x, self.last.weight * self.mask, padding=1)[:, :8])


def test_one_that_cannot_be_followed_is_tried_with_the_input_of_others():
    settings = ci.Settings(steps=1, channels="matched")
    *plain, last = ci.initialize_(nn.ModuleList([ByNumpy()]), settings=settings).layers
    assert [layer.reason for layer in plain] == [None] * 3
    assert "within its mask" in last.reason


def test_what_a_hook_that_cannot_be_followed_does_is_tried():
    model, mask = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.rand(8, 3, 3, 3) < 0.5

    def hook(module, inputs):
        assert float(inputs[0].numpy().max()) < 100
        assert isinstance(inputs[0].tolist(), list)
        module[0].weight.data.mul_(mask)

    model.register_forward_pre_hook(hook)
    (layer,) = ci.initialize_(model, settings=ci.Settings(steps=1)).layers
    assert "within its mask, " in layer.reason


class Unfolding(nn.Module):
    """Has a weight that no convolution of torch.nn.functional is given, but what does the same."""

    def __init__(self, way=None):
        super().__init__()
        self.conv, self.mask, self.other = nn.Conv2d(3, 8, 3), torch.rand(8, 3, 3, 3) < 0.5, [nn.Conv2d(3, 8, 3)]
        self.way = way

    def kernel(self):
        return self.conv.weight * self.mask

    def convolve(self, x):
        return F.conv2d(x, self.kernel())

    def forward(self, x):
        return self.way(self, x)


def by_fourier(m, x):
    kernel = torch.fft.rfft2(m.kernel(), s=x.shape[-2:])
    return torch.fft.irfft2((torch.fft.rfft2(x)[:, None] * kernel.conj()).sum(2))


def by_another(m, x):
    m.other[0].weight.data.copy_(m.kernel())
    return m.other[0](x)


def by_copy(m, x):
    conv = copy.deepcopy(m.conv)
    conv.weight.data *= m.mask
    return conv(x)


MEANS = {
    "einsum": lambda m, x: torch.einsum("of,bfl->bol", m.kernel().flatten(1), F.unfold(x, 3)),
    "product": lambda m, x: m.kernel().flatten(1) @ F.unfold(x, 3),
    "linear": lambda m, x: F.linear(F.unfold(x, 3).transpose(1, 2), m.kernel().flatten(1)),
    "operator": lambda m, x: torch.ops.aten.thnn_conv2d(x, m.kernel(), [3, 3]),
    "condition": lambda m, x: torch.cond(x.sum() > 0, m.convolve, m.convolve, (x,)),
    "fourier": by_fourier,
    "another": by_another,
    "copy": by_copy,
}


@pytest.mark.parametrize("means", MEANS)
def test_a_weight_that_is_multiplied_with_by_other_means_is_not_known(means):
    (layer,) = ci.initialize_(nn.Sequential(Unfolding(MEANS[means])), settings=ci.Settings(steps=1)).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert layer.reason.startswith("which weight Unfolding uses is not known: ")


class Merging(nn.Module):
    """Keeps the sum of its two weights from the first pass in evaluation mode on, and blurs."""

    def __init__(self):
        super().__init__()
        self.large, self.small, self.merged = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 1), None
        self.aux, self.filters = nn.Conv2d(8, 4, 3), torch.ones(8, 1, 3, 3)

    def forward(self, x):
        if self.merged is None:
            self.merged = (self.large.weight + F.pad(self.small.weight, (1, 1, 1, 1))).detach()
        x = F.conv2d(F.conv2d(x, self.merged), self.filters, groups=8)
        return self.aux(x) if self.training else x


def test_a_weight_that_is_kept_from_an_earlier_pass_may_be_of_layers_that_are_not_called():
    model = nn.Sequential(Merging())
    model(torch.zeros(1, 3, 8, 8))
    *merged, aux = ci.measure(model).layers
    reason = "whether Merging uses another weight of it could not be told"
    assert [layer.reason for layer in (*merged, aux)] == [reason, reason, None]


def test_the_constant_weight_of_a_call_may_be_lazy():
    (layer,) = ci.measure(nn.LazyConv2d(8, 3)).layers
    assert layer.reason == "lazy, without a weight yet: run a forward pass first"


class CopyingItself(Two):
    def forward(self, x, copied=False):
        return super().forward(x) if copied else copy.deepcopy(self)(x, copied=True)


class ByStorage(Two):
    def forward(self, x):
        self.conv.weight.data.untyped_storage().fill_(0)
        return super().forward(x)


def test_copies_and_memory_are_those_of_their_originals():
    (copying,) = ci.initialize_(nn.Sequential(CopyingItself()), settings=ci.Settings(steps=1)).layers
    assert copying.outcome is ci.Outcome.INITIALIZED
    assert copying.reason is None
    (zero,) = ci.initialize_(nn.Sequential(ByStorage()), settings=ci.Settings(steps=1)).layers
    assert zero.reason.startswith("all weights are zero that ByStorage makes of its parameter")


class Tied(Unfolding):
    def __init__(self):
        super().__init__()
        self.weight = self.conv.weight

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask)


def test_a_parameter_that_others_hold_too_is_that_of_its_convolution():
    (layer,) = ci.initialize_(nn.Sequential(Tied()), settings=ci.Settings(steps=1)).layers
    assert "within its mask, " in layer.reason


def test_a_weight_that_convolutions_share_is_that_of_the_first():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model[1].weight = model[0].weight
    assert follow(model).names[id(model[0].weight)] == "0"


class Swapping(Unfolding):
    def forward(self, x, scale):
        other = nn.Parameter(self.kernel().detach())
        torch.utils.swap_tensors(self.conv.weight, other)
        x = self.conv(x) * scale
        torch.utils.swap_tensors(self.conv.weight, other)
        return x


def test_a_weight_that_is_swapped_is_told():
    (layer,) = ci.measure(nn.Sequential(Swapping())).layers
    assert layer.reason == "Swapping may change it in its forward pass, which could not be tried"


LOGGED = []


def test_hooks_that_only_log_or_keep_what_comes_out_are_not_run():
    def log(module, inputs, output):
        LOGGED.append(type(output))

    model = nn.Sequential(Two())
    model.register_forward_hook(log)
    model[0].register_forward_hook(partial(lambda kept, *_: kept(None, None, 1), log))
    ci.measure(model)
    assert LOGGED == []
