"""A trial pass sees what the convolution is given, and leaves no trace."""

import copy
import functools
import queue
import random
import threading
import types
from collections import Counter, OrderedDict
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convsim_init as ci
from convsim_init.initialize import plan
from convsim_init.layers.find import find_layers
from convsim_init.layers.forward import copies, isolation
from convsim_init.layers.forward.isolation import isolated, running
from convsim_init.layers.forward.trial import NoConvolutionError, convolution_calls, trial_pass
from convsim_init.layers.forward.weight import ForwardWeight
from convsim_init.layers.layer import Layers
from convsim_init.layers.remarks import model_remarks
from convsim_init.layers.stored import stored_weight
from convsim_init.tracking.copies import watch_copies


class Everything(nn.Conv2d):
    """Changes all that a forward pass can change."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.register_buffer("mask", torch.rand(4, 3, 3, 3).gt(0.5).float())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.calls, self.seen, self.cache = 0, [], {"last": None}
        self.plain = torch.ones(2)
        self.generator = torch.Generator().manual_seed(3)
        self.random = random.Random(3)
        self.child = nn.BatchNorm2d(3)

    def forward(self, x):
        self.weight.data *= self.mask
        self.weight.data += 1e-3 * torch.randn(4, 3, 3, 3) * self.mask
        self.count += 1
        self.calls += 1
        self.seen.append(x.shape)
        self.cache["last"] = x
        self.plain.mul_(2)
        self.noise = torch.rand(1, generator=self.generator) + self.random.random() + random.random() + np.random.rand()
        self.mask = self.mask.clone()
        self.child.train()
        self.child(torch.randn(4, 3, 2, 2))
        self.register_buffer("late", torch.ones(1))
        self.add_module("added", nn.Linear(1, 1))
        with torch.no_grad():
            self.bias.fill_(7)
        return F.conv2d(x, self.weight)


def used(module):
    """The weight of the first call in a trial pass."""
    calls, _ = trial_pass(module, torch.zeros(1, module.in_channels, 3, 3))
    return calls[0].weight


def traces(module):
    """All that a forward pass could leave behind."""
    return {
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "places": {key: value.data_ptr() for key, value in module.state_dict().items()},
        "attributes": {key: value for part in module.modules() for key, value in vars(part).items()},
        "contents": (list(module.seen), dict(module.cache), module.plain.clone(), module.calls),
        "generators": (module.generator.get_state(), module.random.getstate()),
        "states": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),
        "modes": [part.training for part in module.modules()],
        "modules": list(module.named_modules()),
    }


def same(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


def test_nothing_of_what_a_forward_pass_changes_remains():
    module = Everything()
    before = traces(module)
    used(module)
    after = traces(module)
    assert [name for name in before if not same(before[name], after[name])] == []
    module(torch.zeros(1, 3, 3, 3))  # the test can fail: a real pass changes nearly all of it
    changed = [name for name in before if not same(before[name], traces(module)[name])]
    assert changed == list(before)


def masked(hooked):
    """A convolution whose mask is imposed by a hook that knows the module, or only its parameter."""
    module, mask = nn.Conv2d(3, 4, 3), torch.rand(4, 3, 3, 3).gt(0.5)
    weight = module.weight

    def by_argument(m, inputs):
        m.weight.data *= mask

    def by_module(m, inputs):
        module.weight.data *= mask

    def by_tensor(m, inputs):
        weight.data *= mask

    module.register_forward_pre_hook({"argument": by_argument, "module": by_module, "tensor": by_tensor}[hooked])
    return module, mask


@pytest.mark.parametrize("hooked", ["argument", "module", "tensor"])
def test_it_sees_what_a_hook_does_to_the_weight(hooked):
    module, mask = masked(hooked)
    before = module.weight.detach().clone()
    found = used(module)
    torch.testing.assert_close(found, before * mask, rtol=0, atol=0)
    assert torch.equal(module.weight, before)


def test_hooks_that_follow_the_pass_do_not_fire():
    module, calls = nn.Conv2d(3, 4, 3), []
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    used(module)
    module(torch.zeros(1, 3, 3, 3))
    assert calls == ["after"]


def test_it_is_differentiable_by_the_parameters():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, 2 * self.weight)

    module = Doubled(3, 4, 3)
    found = used(module)
    (gradient,) = torch.autograd.grad(found.sum(), module.weight)
    assert gradient.eq(2).all()


def test_an_error_of_the_module_puts_all_back_too():
    class Broken(nn.Conv2d):
        def forward(self, x):
            self.weight.data.zero_()
            self.calls = 1
            raise LookupError("its own")

    module = Broken(3, 4, 3)
    before = module.weight.detach().clone()
    with pytest.raises(LookupError):
        used(module)
    assert torch.equal(module.weight, before)
    assert not hasattr(module, "calls")


def test_a_pass_without_a_convolution_says_so():
    class Linear(nn.Conv2d):
        def forward(self, x):
            return x

    module = Linear(3, 4, 3)
    with pytest.raises(NoConvolutionError):
        ForwardWeight(module, stored_weight(module)).compute()


def test_an_error_while_all_is_put_back_is_said(monkeypatch):
    def restore():
        raise RuntimeError("not put back")

    monkeypatch.setattr(isolation, "backup_tensor", lambda tensor, copy: restore)
    (layer,) = ci.measure(nn.Sequential(Centred(3, 4, 3))).layers
    assert layer.reason.endswith("a trial pass ended with RuntimeError: not put back")


@pytest.mark.parametrize("attribute", ["lock", "computed", "inference"])
def test_what_cannot_be_copied_is_no_obstacle(attribute):
    module = nn.Conv2d(3, 4, 3)
    if attribute == "inference":
        with torch.inference_mode():
            value = torch.ones(3)
    else:
        value = threading.Lock() if attribute == "lock" else [module.weight * 2]
    module.extra = value
    with isolated(module):
        assert module(torch.zeros(1, 3, 3, 3)).shape == (1, 4, 1, 1)
    assert module.extra is value


class Counting(nn.Conv2d):
    """Counts in what cannot be copied whole, or with a plain copy."""

    def __init__(self):
        super().__init__(3, 4, 3)
        held = types.SimpleNamespace(
            lock=threading.Lock(), seen=[], cache=(self.weight * 2).sum(0), queue=queue.Queue()
        )
        self.held, self.pair, self.values = (
            Held(held),
            (threading.Lock(), []),
            {"computed": self.weight * 2, "seen": []},
        )
        self.held.itself = self.held

    def forward(self, x):
        self.held.count += 1
        self.held.itself.seen.append(1)
        self.held.cache.data.add_(1)
        self.pair[1].append(1)
        self.values["seen"].append(1)
        self.values["computed"].data.zero_()
        assert self.held.queue.get(timeout=10) == 0
        return F.conv2d(x, self.weight)


class Held:
    def __init__(self, attributes):
        self.count = 0
        vars(self).update(vars(attributes))


def test_what_stands_beside_a_lock_is_left_as_it_was_and_a_queue_is_the_same():
    module = Counting()
    computed, cache = module.values["computed"].detach().clone(), module.held.cache.detach().clone()
    module.held.queue.put(0)
    used(module)
    assert (module.held.count, module.held.seen, module.pair[1], module.values["seen"]) == (0, [], [], [])
    assert torch.equal(module.values["computed"], computed)
    assert torch.equal(module.held.cache, cache)
    assert module.held.queue.empty()


def test_copies_are_still_equal():
    module = Everything()
    clone = copy.deepcopy(module)
    with isolated(module):
        pass
    assert same(module.state_dict(), clone.state_dict())


def test_closures_over_live_memory_and_hooks_that_remove_themselves_leave_no_trace():
    module = nn.Conv2d(3, 4, 3)
    memory, mask = module.weight.data, torch.rand(4, 3, 3, 3) < 0.5
    before = memory.clone()
    module.register_forward_pre_hook(lambda *_: (memory.mul_(mask), None)[1])
    handle = module.register_forward_pre_hook(lambda *_: handle.remove())
    found = used(module)
    assert torch.equal(found, before * mask)
    assert torch.equal(module.weight, before)
    assert len(module._forward_pre_hooks) == 2


def test_gradients_flags_and_containers_that_cannot_be_copied_whole_are_put_back():
    class Module(nn.Conv2d):
        def forward(self, x):
            self.weight.grad = None
            self.weight.register_hook(lambda gradient: gradient)
            self.weight.register_post_accumulate_grad_hook(lambda weight: None)
            self.weight.requires_grad_(False)
            self.notes["calls"] += 1
            return super().forward(x)

    module = Module(3, 4, 3)
    module.weight.grad = gradient = torch.ones_like(module.weight)
    module.notes = {"calls": torch.zeros(1), "computed": module.weight * 2}
    used(module)
    assert module.weight.grad is gradient
    assert not module.weight._backward_hooks
    assert not module.weight._post_accumulate_grad_hooks
    assert module.weight.requires_grad
    assert module.notes["calls"] == 0


def test_an_expanded_buffer_is_put_back():
    class Module(nn.Conv2d):
        def forward(self, x):
            self.gain[:, 0, 0, 0] += 1
            return self._conv_forward(x, self.weight * self.gain, self.bias)

    module = Module(3, 4, 3)
    module.register_buffer("gain", torch.ones(4, 1, 1, 1).expand_as(module.weight))
    gain, place = module.gain, module.gain.data_ptr()
    (layer,) = ci.initialize_(module, settings=ci.Settings(steps=2)).layers
    assert layer.outcome is ci.Outcome.INITIALIZED
    assert module.gain is gain
    assert gain.data_ptr() == place
    assert (gain == 1).all()


@pytest.mark.parametrize("knows", ["closure", "arguments", "dictionary", "patch"])
def test_what_a_hook_or_a_patch_changes_elsewhere_is_put_back(knows):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    masks = {model[2].weight: torch.zeros(4, 4, 3, 3)}

    def change(other, *_):
        other[2].weight.data.mul_(0.5)
        other[1].running_mean.add_(1)

    def mask(*_):
        for weight, zeros in masks.items():
            weight.data.mul_(zeros)

    hooks = {"closure": lambda *_: change(model), "arguments": functools.partial(change, model), "dictionary": mask}
    if knows == "patch":
        forward = model[0].forward
        model[0].forward = lambda x: (change(model), forward(x))[1]
    else:
        model[0].register_forward_pre_hook(hooks[knows])
    before = copy.deepcopy(model.state_dict())
    for call in (ci.measure, plan):
        assert knows == "patch" or "hooks of 0" in call(model).remarks[0]
        assert len(call(model).layers) == 2
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = ci.initialize_(model, settings=ci.Settings(steps=2))
    assert [layer.outcome for layer in report.layers] == [ci.Outcome.INITIALIZED] * 2
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


class Centred(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_hooks_on_gradients_that_a_pass_takes_off_are_put_back():
    class Bare(nn.Conv2d):
        def forward(self, x):
            self.weight._backward_hooks.clear()
            return super().forward(x)

    module = Bare(3, 4, 3)
    handle = module.weight.register_hook(lambda gradient: gradient)
    ci.measure(module)
    assert list(module.weight._backward_hooks) == [handle.id]


def test_what_a_pass_does_not_change_may_be_read_and_added_to_meanwhile():
    model = nn.Sequential(Centred(3, 4, 3), nn.BatchNorm2d(4))
    seen = model[0].seen = []
    model[0].stages = OrderedDict(a=1, b=2)
    for _ in model[0].stages:
        ci.measure(model)
    for _ in range(2):
        model[0].register_load_state_dict_post_hook(lambda *_: seen.append(len(ci.measure(model).layers)))
    model.load_state_dict(model.state_dict())
    assert seen == [1, 1]


def test_a_counter_is_put_back_as_one():
    module = Centred(3, 4, 3)
    module.hooks_fired = counter = Counter(pre=1)
    module.register_forward_pre_hook(lambda *_: counter.update(pre=1))
    ci.measure(nn.Sequential(module))
    assert counter == Counter(pre=1)


def test_hooks_in_a_registry_of_any_kind_are_put_back():
    class Registry(OrderedDict):
        pass

    module = Centred(3, 4, 3)
    module._forward_pre_hooks = Registry()
    handle = module.register_forward_pre_hook(lambda *_: handle.remove())
    ci.measure(nn.Sequential(module))
    assert len(module._forward_pre_hooks) == 1


def test_a_hook_of_a_part_of_the_module_counts():
    class Gate(nn.Module):
        def forward(self, weight):
            return weight

    class Module(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 3)
            self.gate = Gate()

        def forward(self, x):
            return F.conv2d(x, self.gate(self.weight))

    module = Module()
    module.gate.register_forward_hook(lambda _, __, output: output * 3)
    found = used(module)
    torch.testing.assert_close(found, 3 * module.weight)


def test_code_that_catches_everything_does_not_hide_the_weight():
    class Module(nn.Conv2d):
        def forward(self, x):
            try:
                return F.conv2d(x, 2 * self.weight)
            except:  # noqa: E722
                return F.conv2d(x, self.weight.sign())

    module = Module(3, 4, 3)
    found = used(module)
    torch.testing.assert_close(found, 2 * module.weight)


def test_a_convolution_inside_of_the_same_shape_is_not_taken_for_it():
    class Module(nn.Conv2d):
        def __init__(self):
            super().__init__(4, 4, 3, padding=1)
            self.first = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return super().forward(self.first(x))

    module = Module()
    calls, _ = convolution_calls(module, torch.zeros(1, 4, 3, 3), {module.first.weight.data_ptr()})
    (found,) = (call.weight for call in calls)
    torch.testing.assert_close(found, module.weight)
    (layer,) = [layer for layer in find_layers(module) if not layer.name]
    assert (layer.obstacle, layer.weight.note) == (None, None)
    torch.testing.assert_close(layer.weight.read(), module.weight.detach())


def test_compilation_goes_on_after_threads_in_which_nothing_was_compiled():
    torch._dynamo.reset()
    entered, ended, compiled = threading.Event(), threading.Event(), []

    def look_on():
        with running(()):
            entered.set()
            ended.wait()

    thread = threading.Thread(target=look_on)
    with running(()):
        thread.start()
        entered.wait()
    step = torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph)
    step(torch.ones(2))
    assert compiled == []  # the other thread is in there still
    ended.set()
    thread.join()
    step(torch.ones(2))
    assert len(compiled) == 1


def test_a_pass_within_a_pass_leaves_how_compiled_code_was_set_to_run():
    torch._dynamo.reset()
    compiled = []
    add = torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph)
    with running(()), torch.compiler.set_stance("default"):  # as code of the user's may set it
        with running(()):
            pass
        add(torch.ones(2))
    assert len(compiled) == 1


REFUSING = {
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "out": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "deep copy": copy.deepcopy,
    "flag": lambda x: x.requires_grad_(False),
}


@pytest.mark.parametrize("name", REFUSING)
def test_code_that_refuses_an_input_with_a_gradient_is_tried_without(name):
    class Refusing(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(REFUSING[name](x), self.weight - self.weight.mean((1, 2, 3), keepdim=True))

    model = nn.Sequential(Refusing(3, 4, 3))
    (layer,) = find_layers(model)
    assert layer.obstacle is None
    weight = model[0].weight
    torch.testing.assert_close(layer.weight.read(), weight.detach() - weight.detach().mean((1, 2, 3), keepdim=True))


def test_code_that_ends_the_program_ends_the_trial_alone():
    class Ending(nn.Conv2d):
        def forward(self, x):
            raise SystemExit(1)

    (layer,) = find_layers(nn.Sequential(Ending(3, 4, 3)))
    assert layer.obstacle.text == (
        "which weight Ending uses is not known: a trial pass ended with RuntimeError: its own code ended the program"
    )


def test_code_that_refuses_a_gradient_after_a_first_call_is_tried_without():
    class Estimating(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            norm = F.conv2d(torch.ones(1, 3, 5, 5), self.weight).norm().item()
            return F.conv2d(torch.from_numpy(x.numpy()), self.weight / norm)

    (layer,) = find_layers(nn.Sequential(Estimating()))
    assert layer.weight.note.startswith("one of several weights")


def test_a_pass_goes_no_further_than_the_call_that_counts():
    ends = list[str]()

    class Slow(nn.Conv2d):
        def forward(self, x):
            output = self._conv_forward(x, 2 * self.weight, self.bias)
            ends.append("of a pass")  # what follows may take long
            return output

    (layer,) = find_layers(nn.Sequential(Slow(3, 4, 3)))
    ends.clear()
    torch.testing.assert_close(layer.weight.read(), 2 * layer.weight.module.weight.detach())
    assert not ends


def test_what_a_hook_may_change_is_restored_and_not_copied():
    class Pruner:
        def __init__(self, model):
            self.model, self.counts = model, []

        def __call__(self, module, _):
            self.counts.append(module)
            self.model[1].weight.data.clamp_(-1e-3, 1e-3)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    pruner = Pruner(model)
    model[0].register_forward_pre_hook(pruner.__call__)
    before = copy.deepcopy(model.state_dict())
    with isolation.isolated(model[0]):
        (hook,) = model[0]._forward_pre_hooks.values()
        assert hook.__self__ is not pruner
        assert hook.__self__.model is model
        model[0](torch.zeros(1, 3, 3, 3))
    assert not pruner.counts
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_a_hook_that_changes_no_weight_notes_elsewhere_is_put_back():
    model, shapes, largest = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), [], {"x": 0.0}
    model.register_buffer("passes", torch.zeros(()))
    passes, parameter = model.passes, model[0].weight.detach().clone()

    def note(module, inputs):
        model.passes += 1
        model[1].running_var += 1
        shapes.append(inputs[0].shape)
        largest["x"] = inputs[0].abs().max()

    model[0].register_forward_pre_hook(note)
    (layer,) = ci.measure(model).layers
    assert layer.outcome is ci.Outcome.MEASURED
    assert (model.passes is passes, passes.item(), shapes, largest) == (True, 0, [], {"x": 0.0})
    assert (model[1].running_var == 1).all()
    assert torch.equal(model[0].weight, parameter)


class Unreadable(dict):
    """A dict that loads its values, which is no longer possible."""

    def __len__(self):
        raise RuntimeError("closed")


def freed():
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(0)
    return tensor


UNUSUAL = {
    "unreadable": lambda: Unreadable(a=1),
    "freed": freed,
    "fake": lambda: torch._subclasses.FakeTensorMode().from_tensor(torch.ones(3)),
    "large": lambda: torch.ones(10**6),
    "mock": lambda: Mock(spec=torch.Tensor),
    "mock of a module": lambda: Mock(spec=nn.Module),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_a_hook_that_changes_no_weight_names_may_be_anything(kind, monkeypatch):
    value, model, copied = UNUSUAL[kind](), nn.Conv2d(3, 4, 3), []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **options: copied.append(x.numel()) or clone(x, **options))

    def hook(*_):
        assert value is not None

    model.register_forward_pre_hook(hook)
    (layer,) = ci.measure(model).layers
    assert layer.outcome is ci.Outcome.MEASURED
    assert max(copied) < 10**6  # in each pass


def test_what_is_far_from_a_hook_that_changes_no_weight_stays_as_other_threads_leave_it():
    fetched, model = [], nn.Conv2d(3, 4, 3)
    trainer = types.SimpleNamespace(loader=types.SimpleNamespace(state={"fetched": fetched}))

    def fetch(*_):
        thread = threading.Thread(target=trainer.loader.state["fetched"].append, args=(1,))
        thread.start()
        thread.join()

    model.register_forward_pre_hook(fetch)
    ci.measure(model)
    assert fetched


def test_a_large_table_of_a_hook_is_not_searched():
    def make_hook(table):
        return lambda module, _: module.weight.data.clamp_(-1, 1) if table else None

    module, table = nn.Conv2d(3, 4, 3), {index: [index] for index in range(10**5)}
    module.register_forward_pre_hook(make_hook(table))
    assert not any(value is table[0] for value in isolation.known_to_functions([module]))


def test_most_attributes_are_copied_without_a_deep_copy(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.sizes, model.held, model.nested = (1, "a"), [model[0], 2], [[model[0].weight], {"a": [1]}]
    calls, deepcopy = list[object](), copies.copy.deepcopy
    monkeypatch.setattr(copies.copy, "deepcopy", lambda value, memo: calls.append(value) or deepcopy(value, memo))
    held, nested, parameters = model.held, model.nested, model[0]._parameters
    with isolation.isolated(model):
        assert calls == [nested]
        assert (model.held, model.held is held, model[0]._parameters is parameters) == (held, False, False)
        assert model.nested[0][0] is model[0].weight
        assert model.nested[1]["a"] is not nested[1]["a"]
        model.held.append(3)
    assert (model.held, model.nested, len(held)) == (held, nested, 2)


def test_a_convolution_is_fed_by_whatever_way_from_the_input():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=index > 0) for index in range(4))
            self.start = nn.Parameter(torch.zeros(1, 3, 2, 2))

        def forward(self, x):
            own = self.convs[0](self.start)  # of no input
            left = self.convs[1](own + x)
            return self.convs[2](left.relu() * own) + self.convs[3](own.detach())

    calls, to_the_end = convolution_calls(Branches(), torch.zeros(1, 3, 2, 2))
    assert to_the_end
    assert [call.fed for call in calls] == [False, True, True, False]


LOOKS = {
    "find": lambda model: find_layers(model),
    "remark": lambda model: model_remarks(model, Layers()),
    "copies": lambda model: watch_copies(model, []),
    "term": ci.ConvolutionalSimilarity,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_no_thread_looks_at_a_model_while_another_tries_it(look):
    model, done = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), threading.Event()
    thread = threading.Thread(target=lambda: (look(model), done.set()))
    with isolation.isolated(model):  # where attributes are others for a while
        thread.start()
        assert not done.wait(0.2)
    thread.join()
    assert done.is_set()


def test_a_model_runs_in_one_thread_at_a_time():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            begun.set()
            assert go_on.wait(60)
            return self.conv(x)

    def try_it() -> None:
        with isolation.isolated(model.conv):
            tried.set()

    model, begun, go_on, tried = Slow(), threading.Event(), threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=lambda: ci.measure_feature_correlation(model, torch.randn(2, 3, 8, 8))),
        threading.Thread(target=try_it),
    ]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    assert not tried.wait(0.2)
    go_on.set()
    for thread in threads:
        thread.join()
    assert tried.is_set()


@pytest.mark.parametrize("state", [types.SimpleNamespace(scale=1.0), {"scale": 1.0}], ids=["object", "dict"])
def test_what_two_attributes_hold_is_one_object_in_a_trial_too(state):
    class Scaled(nn.Conv2d):
        def forward(self, x):
            kept = self.state if isinstance(self.state, dict) else vars(self.state)
            kept["scale"] = 2.0
            read = self.config if isinstance(self.config, dict) else vars(self.config)
            return F.conv2d(x, self.weight * read["scale"])

    model = Scaled(3, 4, 3, bias=False)
    model.state = model.config = state
    (layer,) = find_layers(model)
    torch.testing.assert_close(layer.weight.read(), 2 * model.weight.detach())
    assert model.state is model.config is state
    assert (state if isinstance(state, dict) else vars(state)) == {"scale": 1.0}
