"""Models that are built in a context are treated once what draws their weights is over, and what is loaded stays."""

import concurrent.futures
import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import convsim_init as ci
from convsim_init import context
from convsim_init.initialize import plan

QUICK = ci.Settings(steps=3, channels="matched")


def network(*others):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), *others)


def draw_(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


def train(model, optimizer):
    """A step of a training."""
    model(torch.randn(2, 3, 9, 9)).square().sum().backward()
    optimizer.step()


def expected(build, seed=0, **options):
    """The state dict of what `initialize_` makes of the model."""
    torch.manual_seed(seed)
    model = build()
    ci.initialize_(model, settings=QUICK, **options)
    return model.state_dict()


def assert_equal(model, state):
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        # Memory that nothing was written to may hold NaN.
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True, msg=key)


def drawn_afterwards():
    model = network()
    draw_(model)
    return model


class Network(nn.Module):
    """A network that can be compiled in place: a sequence alone is not."""

    def __init__(self):
        super().__init__()
        self.parts = network()

    def forward(self, x):
        return self.parts(x)


class DrawsItself(nn.Module):
    def __init__(self, parts=()):
        super().__init__()
        self.parts = nn.Sequential(*parts)
        self.stem = nn.Conv2d(3, 8, 3)
        draw_(self)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(network, id="plain"),
        pytest.param(drawn_afterwards, id="drawn-after-its-constructor"),
        pytest.param(lambda: DrawsItself([nn.Conv2d(8, 8, 3)]), id="drawn-in-an-outer-constructor"),
        pytest.param(lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), id="parametrized"),
        pytest.param(lambda: nn.Sequential(nn.Sequential(), nn.Conv2d(3, 8, 3)), id="with-an-empty-part"),
    ],
)
def test_a_model_is_what_initialize_makes_of_it(build):
    torch.manual_seed(0)
    with ci.initializing(settings=QUICK) as reports:
        model = build()
        assert reports == []
    assert_equal(model, expected(build))
    assert [report.model for report in reports] == [type(model).__name__]
    assert [layer.outcome for layer in reports[0].layers] == [ci.Outcome.INITIALIZED] * len(reports[0].layers)
    again = copy.deepcopy(model)
    network()  # what is built later stays as it is drawn
    assert_equal(model, again.state_dict())
    assert not [key for module in model.modules() for key in vars(module) if "drawn" in key]


REPLACED = [(nn.Module, "__init__"), (nn.Module, "__setstate__"), (nn.Module, "_load_from_state_dict")]
REPLACED += [(nn.modules.conv._ConvNd, "__init__"), (nn.modules.conv._ConvNd, "reset_parameters")]
REPLACED += [(torch.optim.Optimizer, "__init__"), (torch.optim.Optimizer, "add_param_group")]
REPLACED += [(torch.autograd, "backward")]


def build_within(error=None, **options):
    with ci.initializing(settings=QUICK, **options):
        model = network()
        if error is not None:
            raise error(model)
    return model


def test_after_an_exception_nothing_is_treated_or_stays_replaced():
    before = [getattr(owner, name) for owner, name in REPLACED]
    torch.manual_seed(0)
    with pytest.raises(KeyError) as caught:
        build_within(KeyError)
    torch.manual_seed(0)
    assert_equal(caught.value.args[0], network().state_dict())
    assert [getattr(owner, name) for owner, name in REPLACED] == before
    assert nn.modules.module._global_forward_pre_hooks == {}
    with ci.initializing(settings=QUICK):  # another one, for which they were built elsewhere
        model = nn.Sequential(caught.value.args[0], nn.Conv2d(8, 8, 3))
    torch.manual_seed(0)
    assert_equal(model[0], network().state_dict())


def test_training_starts_from_treated_weights():
    torch.manual_seed(0)
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert_equal(model, expected(network))
        train(model, optimizer)
        trained = copy.deepcopy(model.state_dict())
        torch.optim.SGD(model.parameters(), lr=0.01)  # another phase of the training
        model(torch.randn(1, 3, 9, 9))
    assert_equal(model, trained)
    assert len(reports) == 1


def test_what_is_drawn_after_the_optimizer_is_treated_before_the_first_forward_pass():
    torch.manual_seed(0)
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(7)
        nn.init.kaiming_normal_(model[0].weight)
        drawn = model[0].weight.detach().clone()
        model(torch.randn(1, 3, 9, 9))
        assert torch.equal(model[0].weight, ci.convsim_(drawn, settings=QUICK))
    assert [report.totals["initialized"] for report in reports] == [2, 1]
    assert reports[1].layers[1].reason == "treated before, as 2 of Sequential"


def test_what_is_drawn_anew_for_another_training_is_treated_again():
    """As for the folds of a cross-validation."""
    with ci.initializing(settings=QUICK, exclude=["0"]) as reports:
        model = network(nn.BatchNorm2d(8))
        for fold in range(3):
            if fold:
                model.apply(lambda part: part.reset_parameters() if isinstance(part, nn.Conv2d) else None)
            drawn = copy.deepcopy(model.state_dict())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            assert not torch.equal(model[2].weight, drawn["2.weight"])
            assert torch.equal(model[0].weight, drawn["0.weight"])
            train(model, optimizer)
        model[2].reset_parameters()  # and trained by the same optimizer: none is made before
        train(model, optimizer)
        trained = copy.deepcopy(model.state_dict())
    assert_equal(model, trained)
    assert [report.totals["initialized"] for report in reports] == [1, 1, 1]


def test_what_is_set_after_the_optimizer_is_told_of():
    """It may have been trained, which cannot be told from drawn weights."""
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        model[0].weight.data = network()[0].weight.data
        model(torch.randn(1, 3, 9, 9))
    assert [report.remarks for report in reports] == [
        [],
        ["changed after the optimizer was made, and treated as if it was drawn anew: exclude it if it was trained"],
    ]


def test_what_changes_between_several_processes_is_left_alone_and_told(monkeypatch):
    """It may have come from another process, which treated it."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        nn.init.kaiming_normal_(model[0].weight)
        drawn = model[0].weight.detach().clone()
        model(torch.randn(1, 3, 9, 9))
    assert torch.equal(model[0].weight, drawn)
    first, second = (layer.reason for layer in reports[1].layers)
    assert first == "changed after the optimizer was made, in this process or by another one"
    assert second == "treated before, as 2 of Sequential"


def reset_(model):
    model.apply(lambda part: part.reset_parameters() if isinstance(part, nn.Conv2d) else None)


def in_backward(model):
    """Optimizers that step in the backward pass, after which no gradient is left, and a step of training by them."""
    optimizers = {one: torch.optim.SGD([one], lr=0.1) for one in model.parameters()}

    def step(one):
        optimizers[one].step()
        optimizers[one].zero_grad()

    for one in model.parameters():
        one.register_post_accumulate_grad_hook(step)
    return lambda: model(torch.randn(2, 3, 9, 9)).square().mean().backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_what_is_trained_by_steps_in_the_backward_pass_stays(compiled, reset):
    torch._dynamo.reset()
    with ci.initializing(settings=QUICK), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = network()
        if compiled:
            model.compile(backend="eager")
        train = in_backward(model)
        train()
        if reset:
            reset_(model)
        train()
        trained = copy.deepcopy(model.state_dict())
        torch.optim.SGD(nn.Conv2d(3, 3, 3).parameters(), lr=0.1)
    assert_equal(model, trained)


def test_what_was_frozen_while_the_rest_trained_stays():
    with ci.initializing(settings=QUICK):
        model = network(nn.BatchNorm2d(8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(2, 3, 9, 9))
        reset_(model)
        model[0].requires_grad_(False)
        train(model, optimizer)
        model[0].requires_grad_(True)
        trained = copy.deepcopy(model.state_dict())
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert_equal(model, trained)


class Grows(nn.Module):
    """A network that makes a layer in its first forward pass, and gives it to the optimizer then."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), None
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, x):
        if self.second is None:
            self.second = nn.Conv2d(8, 8, 3)
            self.drawn = self.second.weight.detach().clone()
            self.optimizer.add_param_group({"params": self.second.parameters()})
        return self.second(self.first(x))


def test_a_layer_that_is_given_to_an_optimizer_later_is_treated():
    with ci.initializing(settings=QUICK) as reports:
        model = Grows()
        train(model, model.optimizer)
    assert [report.totals["initialized"] for report in reports] == [1, 1]
    assert not torch.allclose(model.second.weight, model.drawn)


def test_to_draw_what_is_computed_changes_nothing():
    with ci.initializing(settings=QUICK):
        model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3, bias=False)), nn.BatchNorm2d(8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            train(model, optimizer)
            reset_(model)
        trained = copy.deepcopy(model.state_dict())
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert_equal(model, trained)


def test_a_copy_that_is_drawn_anew_for_each_training_is_treated():
    with ci.initializing(settings=QUICK) as reports:
        base = network()
        for _ in range(3):
            model = copy.deepcopy(base)
            reset_(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train(model, optimizer)
    assert [
        sum(bool(layer.after) for layer in report.layers) for report in reports if report.totals.get("initialized")
    ] == [2] * 4  # and the first one, which was never trained


def test_layers_that_cannot_be_treated_are_none_that_another_process_sent(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with ci.initializing(settings=QUICK) as reports:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 3), nn.Conv2d(1, 8, 1))
        nn.init.zeros_(model[3].weight)
        torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(1, 3, 9, 9))
    assert len(reports) == 1


def test_patches_of_others_stay(monkeypatch):
    calls = []
    with ci.initializing(settings=QUICK):
        init = nn.Module.__init__

        def patched(module, *args, **kwargs):
            calls.append(1)
            init(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "__init__", patched)
        with ci.initializing(settings=QUICK):
            nn.ReLU()
        nn.ReLU()
        assert nn.Module.__init__ is patched
        monkeypatch.undo()
    assert len(calls) == 2


@pytest.mark.parametrize("way", ["module", "function", "export", "trace"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_models_can_be_compiled_and_exported(way):
    torch._dynamo.reset()
    x = torch.randn(2, 3, 9, 9)
    with ci.initializing(settings=QUICK) as reports, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of hooks of all modules
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        if way == "export":
            found = torch.export.export(model, (x,)).module()(x)
        elif way == "trace":
            found = torch.jit.trace(model, x)(x)
        elif way == "module":
            found = torch.compile(model, backend="aot_eager")(x)
        else:
            found = torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True)(x)
    assert torch.allclose(found, model(x), atol=1e-6)
    assert [report.totals["initialized"] for report in reports] == [2]


@pytest.mark.parametrize("way", ["before", "in place before", "after", "in place after"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_compiled_model_is_compiled_once_and_without_a_warning(way):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    with ci.initializing(settings=QUICK) as reports:
        model = called = Network()
        for moment in ("before", "after"):
            if way == moment:
                called = torch.compile(model, backend=backend)
            if way == f"in place {moment}":
                model.compile(backend=backend)
            if moment == "before":
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            train(called, optimizer)
    assert len(compiled) == 1
    assert [report.totals["initialized"] for report in reports] == [2]


@pytest.mark.parametrize("what", ["a loss", "a part before", "a part"])
def test_what_is_drawn_anew_after_something_else_was_compiled_is_treated_again(what):
    torch._dynamo.reset()
    with ci.initializing(settings=QUICK) as reports:
        model = network(nn.Conv2d(8, 8, 1))
        if what == "a part before":
            model[2].compile(backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if what == "a loss":
            torch.compile(F.mse_loss, backend="eager")
        draw_(model)
        if what == "a part":
            model[2].compile(backend="eager")
        train(model, optimizer)
    assert [report.totals["initialized"] for report in reports] == [3, 3]


@pytest.mark.parametrize("change", [nn.Identity(), parametrizations.weight_norm], ids=["plain", "parametrized"])
def test_old_gradients_are_no_training(change):
    with ci.initializing(settings=QUICK) as reports:
        model, other = network(), nn.Sequential(change(nn.Conv2d(3, 8, 3)))
        other(torch.randn(2, 3, 9, 9)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1)
        draw_(model)
        nn.Linear(3, 3)(torch.ones(1, 3)).sum().backward()
        model(torch.randn(2, 3, 9, 9))
    assert [report.totals.get("initialized") for report in reports] == [2, None, 2]


def test_copies_in_the_window_have_no_hooks():
    with ci.initializing(settings=QUICK):
        compiled, model = torch.compile(network(), backend="eager"), network()
        torch.optim.SGD([*compiled.parameters(), *model.parameters()], lr=0.1)
        twin = copy.deepcopy(model)
        twins = pickle.loads(pickle.dumps(model))
        model(torch.randn(2, 3, 9, 9))
    assert not any(part._forward_pre_hooks for one in (model, twin, twins) for part in one.modules())


def test_what_is_drawn_anew_before_a_pass_that_is_not_seen_is_told():
    torch._dynamo.reset()

    with ci.initializing(settings=QUICK) as reports:
        model = Network()
        model.compile(backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        draw_(model)
        train(model, optimizer)
    assert [layer.reason for layer in reports[1].layers] == 2 * [
        "changed after the optimizer was made, in this process or by another one"
    ]


def test_what_is_received_is_told_even_where_a_note_precedes_the_reason(monkeypatch):
    class TwoWeights(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 8, 3)
            self.other = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight) + F.conv2d(x, self.other)

    monkeypatch.setattr(context, "of_several_processes", lambda: True)
    with ci.initializing(settings=QUICK) as reports:
        model = nn.Sequential(TwoWeights())
        torch.optim.SGD(model.parameters(), lr=0.1)
        nn.init.xavier_normal_(model[0].weight)
        model(torch.randn(2, 3, 9, 9))
    (layer,) = reports[1].layers
    assert layer.reason.startswith("one of several weights")
    assert layer.reason.endswith("in this process or by another one")


def first_passes():
    def gradient(model, x):
        parameters = dict(model.named_parameters())
        torch.func.grad(lambda some: torch.func.functional_call(model, some, (x,)).square().mean())(parameters)

    def fake(model, x):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))

    def counted(model, x):
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * (8 * 27 * 49 + 8 * 72 * 25)

    return {"torch.func": gradient, "fake": fake, "counted": counted, "traced": lambda m, x: make_fx(m)(x)}


@pytest.mark.parametrize("way", first_passes())
def test_the_first_pass_may_be_transformed_or_run_in_a_mode(way):
    with ci.initializing(settings=QUICK) as reports:
        model, x = network(), torch.randn(1, 3, 9, 9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first_passes()[way](model, x)
        model(x).sum().backward()
        optimizer.step()
    assert [report.totals["initialized"] for report in reports] == [2]


def test_the_optimizer_of_a_descent_begins_no_training():
    with ci.initializing(settings=ci.Settings.paper(steps=2)) as reports:
        models = [network(), DrawsItself()]
        before = [next(model.parameters()).detach().clone() for model in models]
        ci.initialize_(nn.Conv2d(3, 5, 3), settings=ci.Settings.paper(steps=2))
        assert [report.model for report in reports] == []
        for model in models:
            torch.optim.SGD(model.parameters(), lr=0.1)
    assert [report.model for report in reports[:2]] == ["Sequential", "DrawsItself"]
    assert all(report.totals["initialized"] for report in reports[:2])
    for model, old in zip(models, before, strict=True):
        assert not torch.equal(next(model.parameters()), old)


def test_a_pickled_model_of_another_context_was_built_elsewhere():
    file = io.BytesIO()
    with ci.initializing(settings=QUICK):
        torch.save(network(), file)
    file.seek(0)
    with ci.initializing(settings=QUICK) as reports:
        model = torch.load(file, weights_only=False)
        before = copy.deepcopy(model.state_dict())
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert_equal(model, before)
    assert {layer.reason for layer in reports[0].layers} == {
        "loaded, or built elsewhere: only what is drawn here is treated"
    }


def test_contexts_may_overlap():
    before = [getattr(owner, name) for owner, name in REPLACED]
    one, other = ci.initializing(settings=QUICK), ci.initializing(settings=QUICK)
    one.__enter__(), other.__enter__()
    one.__exit__(None, None, None)
    with torch.device("meta"):
        network()
    other.__exit__(None, None, None)
    assert [getattr(owner, name) for owner, name in REPLACED] == before


def test_patterns_may_name_models_that_are_built_after_the_first_optimizer():
    with ci.initializing(settings=QUICK, include=["last.*"]) as reports:
        for name in ("first", "last"):
            model = nn.ModuleDict({name: network()})
            torch.optim.SGD(model.parameters(), lr=0.1)
        model["last"](torch.randn(1, 3, 9, 9))
    assert [report.totals.get("initialized") for report in reports] == [None, 2]


def test_what_is_unfrozen_before_training_is_no_copy():
    with ci.initializing(settings=QUICK) as reports:
        model = network().requires_grad_(False)
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        model.requires_grad_(True)
        torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(1, 3, 9, 9))
    assert [report.remarks for report in reports] == [[], []]


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_loaded_stays(assign):
    state = network(nn.Conv2d(8, 4, 1)).state_dict()
    del state["3.weight"], state["3.bias"]
    with ci.initializing(settings=QUICK) as reports:
        backbone = network(nn.Conv2d(8, 4, 1))
        backbone.load_state_dict(state, strict=False, assign=assign)
        model = nn.ModuleDict({"backbone": backbone, "copied": copy.deepcopy(backbone), "head": nn.Conv2d(4, 4, 3)})
    for part in ("backbone", "copied"):
        for key, value in state.items():
            assert torch.equal(model[part].state_dict()[key], value)
    (report,) = reports
    treated = {layer.name for layer in report.layers if layer.outcome is ci.Outcome.INITIALIZED}
    assert treated == {"backbone.3", "copied.3", "head"}
    assert {layer.reason for layer in report.layers if layer.name not in treated} == {
        "loaded, or built elsewhere: only what is drawn here is treated"
    }


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_what_is_loaded_after_the_optimizer_stays_and_is_told(passes):
    """As by a script that resumes: what the first report says was treated is not what is trained."""
    state = network().state_dict()
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        model.load_state_dict(state)
        for _ in range(passes):
            model(torch.randn(1, 3, 9, 9))
    assert_equal(model, state)
    assert [report.totals.get("initialized") for report in reports] == [2, None]
    assert {layer.reason for layer in reports[1].layers} == {"loaded in place of what was drawn here"}


def test_what_is_put_back_as_it_was_drawn_is_treated_again():
    """As for the folds of a cross-validation; what was trained since stays."""
    with ci.initializing(settings=QUICK) as reports:
        model = network(nn.BatchNorm2d(8))
        start, starts = copy.deepcopy(model.state_dict()), []
        for fold in range(2):
            if fold:
                model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            starts.append(copy.deepcopy(model.state_dict()))
            train(model, optimizer)
            optimizer.zero_grad()
        trained = copy.deepcopy(model.state_dict())
        model.load_state_dict(trained)
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert_equal(model, trained)
    assert not torch.equal(starts[1]["0.weight"], start["0.weight"])
    assert torch.equal(starts[1]["0.weight"], starts[0]["0.weight"])
    assert [report.totals.get("initialized") for report in reports] == [2, 2, None]


def test_what_is_drawn_anew_after_it_was_loaded_is_treated():
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        model.load_state_dict(network().state_dict())
        model[0].reset_parameters()
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert [layer.reason for layer in reports[1].layers] == [None, "loaded in place of what was drawn here"]


def test_copies_of_what_is_drawn_anew_after_it_was_loaded_are_treated_alike():
    with ci.initializing(settings=QUICK):
        model = network()
        model.load_state_dict(network().state_dict())
        reset_(model)
        drawn = copy.deepcopy(model)
    for part, twin in zip((model[0], model[2]), (drawn[0], drawn[2]), strict=True):
        assert torch.equal(part.weight, twin.weight)


def test_a_copy_of_what_was_built_elsewhere_and_drawn_anew_is_left_as_that_is():
    outside = network()
    with ci.initializing(settings=QUICK):
        reset_(outside)
        averaged = torch.optim.swa_utils.AveragedModel(outside)
        torch.optim.SGD(outside.parameters(), lr=0.1)
    assert torch.equal(outside[0].weight, averaged.module[0].weight)


def test_what_was_built_elsewhere_and_drawn_anew_is_treated_in_a_model_that_is_built():
    outside = network()
    with ci.initializing(settings=QUICK) as reports:
        reset_(outside)
        _model = nn.Sequential(outside, nn.Conv2d(8, 4, 3))
    assert reports[0].totals["initialized"] == 3


def test_what_is_drawn_anew_after_a_gradient_without_an_optimizer_is_treated():
    """As after a trial step that shows whether the memory will do."""
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        model(torch.randn(1, 3, 9, 9)).sum().backward()
        reset_(model)
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert reports[0].totals["initialized"] == 2


def test_what_is_drawn_anew_while_the_optimizer_trains_another_model_is_treated():
    with ci.initializing(settings=QUICK) as reports:
        generator, other = network(), network()
        optimizer = torch.optim.SGD([*generator.parameters(), *other.parameters()], lr=0.1)
        train(other, optimizer)
        reset_(generator)
        train(other, optimizer)
    assert [report.totals.get("initialized") for report in reports] == [2, 2, 2]


def test_what_was_built_elsewhere_stays():
    outside, file = network(), io.BytesIO()
    torch.save(network(), file)
    file.seek(0)
    with ci.initializing(settings=QUICK) as reports:
        read = torch.load(file, weights_only=False)
        with torch.device("meta"):
            meta = network()
        meta.to_empty(device="cpu")
        draw_(meta)
        states = [copy.deepcopy(model.state_dict()) for model in (outside, read, meta)]
        model = nn.ModuleList([outside, read, meta, nn.Conv2d(3, 8, 3)])
    for part, state in zip(model, states, strict=False):
        assert_equal(part, state)
    assert reports[0].totals == reports[0].totals | {"initialized": 1, "skipped": 6}


def test_copies_are_treated_alike():
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        twin = copy.deepcopy(model)
    assert_equal(model, twin.state_dict())
    assert len(reports) == 2


def test_without_patterns_no_model_is_searched_for_their_matches(monkeypatch):
    searched = []
    find_layers = context.find_layers
    monkeypatch.setattr(
        context, "find_layers", lambda *args, **kwargs: searched.append(kwargs) or find_layers(*args, **kwargs)
    )
    build_within(include=[], exclude=[])
    assert [kwargs.keys() for kwargs in searched] == [{"obstacle"}]


@pytest.mark.parametrize("patterns", ["0", [0]])
def test_what_is_no_list_of_patterns_is_refused_before_anything_is_built(patterns):
    with pytest.raises(ci.InputError, match="exclude: expected a list of patterns"), ci.initializing(exclude=patterns):
        pytest.fail("the context was entered")


def test_arguments_of_a_constructor_may_have_any_names():
    class Named:
        def __init__(self, module):
            self.named = module

    class Net(nn.Module, Named):
        call_super_init = True

    with ci.initializing():
        assert Net(module="stem").named == "stem"


def test_patterns_and_several_models():
    torch.manual_seed(0)
    seen = []
    with ci.initializing(settings=QUICK, exclude=["generator.0"], on_report=seen.append) as reports:
        models = [nn.ModuleDict({"generator": network()}), network(), nn.Linear(2, 2)]
    assert seen == reports
    assert [[layer.reason for layer in report.layers] for report in reports] == [["excluded", None], [None, None]]
    assert len(models) == 3
    with pytest.raises(ci.InputError, match="include: no convolution matches 'stem'; the convolutions are '0', '2'"):
        build_within(include=["stem"])
    with ci.initializing(include=["stem"]) as reports:
        nn.Linear(2, 2)
    assert reports == []


def test_what_a_treatment_copies_and_runs_is_none_of_the_context():
    with ci.initializing() as reports:  # by default models are looked through on the meta device
        models = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)) for _ in range(2)]
        torch.optim.SGD(models[0].parameters(), lr=0.1)
        models.append(network())
        torch.optim.SGD(models[2].parameters(), lr=0.1)
        assert len(reports) == 3
        models[0](torch.randn(2, 3, 9, 9))
    assert len(reports) == 3


def test_an_optimizer_of_another_thread_counts():
    torch.manual_seed(0)
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        thread = threading.Thread(target=torch.optim.SGD, args=(model.parameters(), 0.1))
        thread.start()
        thread.join()
        assert len(reports) == 1


class Own(nn.Module):
    """A convolution that is none of PyTorch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize("others", [(), (nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))], ids=["alone", "beside-another"])
def test_a_convolution_of_a_class_of_ones_own_is_treated(others):
    with ci.initializing(settings=QUICK) as reports:
        model = nn.Sequential(Own(), *others)
    (report,) = reports
    assert (report.layers[0].kind, report.layers[0].outcome) == ("Own", ci.Outcome.INITIALIZED)
    assert model is not None


def without_data(model):
    with FakeTensorMode():
        return network()


@pytest.mark.parametrize(
    "also",
    [
        pytest.param(plan, id="copied-by-the-library"),
        pytest.param(lambda model: copy.deepcopy(model).to("meta"), id="copied-to-meta"),
        pytest.param(without_data, id="fake"),
        pytest.param(lambda _: build_within(), id="in-a-context-within"),
    ],
)
def test_models_without_data_and_other_contexts_do_not_disturb(also):
    torch.manual_seed(0)
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        other = also(model)
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert_equal(model, expected(network))
    assert [report.totals["initialized"] for report in reports if "initialized" in report.totals] == [2]
    assert other is not None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: nn.init.zeros_(model[0].bias), id="bias"),
        pytest.param(lambda model: model.bfloat16(), id="dtype"),
        pytest.param(lambda model: model.to(memory_format=torch.channels_last), id="memory-format"),
        pytest.param(lambda model: parametrizations.weight_norm(model[0]), id="parametrized"),
    ],
)
def test_treated_weights_are_recognized_however_they_are_stored(change):
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        change(model)
        model(torch.randn(1, 3, 9, 9, dtype=model[2].weight.dtype))
        assert len(reports) == 1


@pytest.mark.parametrize("share", [lambda layer: layer, copy.copy], ids=["module", "parameters"])
def test_a_weight_of_two_models_is_treated_once(share):
    torch.manual_seed(0)
    with ci.initializing(settings=QUICK) as reports:
        models = [network(), nn.Sequential(nn.Identity())]
        models[1].append(share(models[0][0]))
    assert_equal(models[0], expected(network))
    assert reports[1].layers[0].reason == "treated before, as 0 of Sequential"


def compiled_step(model, x):
    def step(x):
        return model(x).mean()

    torch.compile(step, backend="eager")(x).backward()


FIRST_USES = {
    "a part is called": lambda model, x: model[0](x),
    "a wrapper is called": lambda model, x: nn.Sequential(model)(x),
    "it is compiled in place": lambda model, x: model.compile(backend="eager"),
    "a step with it in a cell is compiled": compiled_step,
    "a step with it as a global is compiled": lambda model, x: torch.compile(
        eval("lambda x: model(x).mean()", {"model": model}), backend="eager"
    )(x),
}


@pytest.mark.parametrize("use", FIRST_USES)
def test_training_begins_when_the_model_is_used_first(use):
    torch._dynamo.reset()
    with ci.initializing(settings=QUICK) as reports:
        model, x = network(), torch.randn(2, 3, 9, 9)
        torch.optim.SGD(model.parameters(), lr=0.1)
        nn.ReLU()(torch.zeros(1))
        draw_(model)
        FIRST_USES[use](model, x)
        assert [report.totals["initialized"] for report in reports] == [2, 2]
        draw_(model)
        state = copy.deepcopy(model.state_dict())
        model(x)
    assert_equal(model, state)


def test_what_was_trained_without_an_optimizer_stays():
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        model(torch.randn(1, 3, 9, 9)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        trained = copy.deepcopy(model.state_dict())
        other = network()
        torch.optim.SGD(other.parameters(), lr=0.1)
    assert_equal(model, trained)
    reasons = {layer.reason for layer in reports[0].layers}
    assert reasons == {"trained already: it got a gradient before an optimizer was made"}
    assert reports[1].totals["initialized"] == 2


def loaded(model):
    other = network()
    other.load_state_dict(model.state_dict())
    return other


def frozen(model):
    return copy.deepcopy(model).requires_grad_(False)


@pytest.mark.parametrize("copied", [loaded, frozen])
@pytest.mark.parametrize("whole", [False, True], ids=["apart", "in-one-model"])
@pytest.mark.parametrize("first", [False, True], ids=["original-first", "copy-first"])
def test_a_copy_that_is_left_alone_is_told_of(copied, whole, first):
    with ci.initializing(settings=QUICK) as reports:
        online = network()
        target = copied(online)
        models = [nn.Sequential(target), online] if first else [online, nn.Sequential(target)]
        if whole:
            models = nn.Sequential(*models)
    remarks = [remark for report in reports for remark in report.remarks]
    (remark,) = remarks
    assert remark.startswith("copies that are no longer equal to what they were copied from: ")
    assert remark.endswith(": copy them again")
    assert models is not None


@pytest.mark.parametrize("options", [{"exclude": ["0"]}, {"include": ["2"]}], ids=["exclude", "include"])
def test_a_copy_that_is_selected_otherwise_is_told_of(options):
    """An average of weights holds the layers under other names."""
    with ci.initializing(settings=QUICK, **options) as reports:
        models = [model := network(), torch.optim.swa_utils.AveragedModel(model)]
    copied = "module.2 of AveragedModel (of 2 of Sequential)"
    remark = copied if "include" in options else "0 of Sequential (of module.0 of AveragedModel)"
    assert [remark for report in reports for remark in report.remarks] == [
        f"copies that are no longer equal to what they were copied from: {remark}: copy them again"
    ]
    assert len(models) == 2


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


OPTIMIZED = {
    "functional": lambda model: copies(model).values(),
    "masters": lambda model: [copy.float() for copy in copies(model.bfloat16()).values()],
    "groups": lambda model: [{"params": list(copies(model).values()), "lr": 0.1}],
    "named": lambda model: list(copies(model).items()),
}


@pytest.mark.parametrize("kind", OPTIMIZED)
def test_an_optimizer_of_copies_is_told_of(kind):
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(OPTIMIZED[kind](model), lr=0.1)
    (report,) = reports
    names = [f"parameter {index} of the optimizer (of {index} of Sequential)" for index in (0, 2)]  # biases between
    assert report.remarks == [
        f"copies that are no longer equal to what they were copied from: {', '.join(names)}: copy them again"
    ]


def test_an_optimizer_of_an_ensembles_stacked_weights_is_told_of():
    with ci.initializing(settings=QUICK) as reports:
        models = [network() for _ in range(2)]
        stacks, _ = torch.func.stack_module_state(models)
        torch.optim.SGD(stacks.values(), lr=0.1)
    names = [f"parameter {index} of the optimizer (of {index} of Sequential)" for index in (0, 2)]
    remark = f"copies that are no longer equal to what they were copied from: {', '.join(names)}: copy them again"
    assert [report.remarks for report in reports] == [[remark]] * len(models)


@pytest.mark.filterwarnings("error")
def test_a_model_may_hold_parameters_that_were_computed_from_others():
    """As after the inner steps of meta-learning, which derivatives pass through."""
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        inner = nn.Conv2d(3, 8, 3, bias=False)
        inner._parameters["weight"] = model[0].weight - 0.1 * model[0].weight.square()
        inner(torch.ones(2, 3, 8, 8)).sum().backward()
    assert model[0].weight.grad is not None
    assert "2 initialized" in str(reports[0])


def test_an_optimizer_may_be_given_a_tensor_whose_storage_is_freed():
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        freed = torch.ones(8, 3, 3, 3)
        freed.untyped_storage().resize_(0)
        torch.optim.SGD([*model.parameters(), freed], lr=0.1)
    assert [report.remarks for report in reports] == [[]]


@pytest.mark.parametrize("wrap", [lambda conv: conv, parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("handed", [list, iter, lambda parameters: [{"params": parameters}]])
def test_an_optimizer_of_the_parameters_themselves_trains_no_copies(wrap, handed):
    with ci.initializing(settings=QUICK) as reports:
        model = nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), wrap(nn.Conv2d(8, 8, 3)))
        optimizer = torch.optim.SGD(handed(model.parameters()), lr=0.1)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert [report.remarks for report in reports] == [[]]


def test_a_copy_within_a_model_that_is_excluded_is_told_of():
    model = nn.ModuleDict({"online": network()})
    model["target"] = copy.deepcopy(model["online"])
    report = ci.initialize_(model, settings=QUICK, exclude=["target.2"])
    assert report.remarks == [
        "copies that are no longer equal to what they were copied from: target.2 (of online.2): copy them again"
    ]


def nothing(model):
    pass


def scaled(model):
    assert len(ci.calibrate_(model, input_shape=(3, 16, 16))) == 2


@pytest.mark.parametrize("options", [{}, {"exclude": ["0"]}, {"include": ["2"]}], ids=["all", "exclude", "include"])
@pytest.mark.parametrize("then", [nothing, scaled, draw_])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_what_initialize_treated_or_left_within_stays_unless_it_is_drawn_anew(options, then, wrap):
    with ci.initializing() as reports:
        model = network()
        inner = ci.initialize_(wrap(model), settings=QUICK, **options)
        then(model)
        before = copy.deepcopy(model.state_dict())
    assert inner.totals["initialized"] == (1 if options else 2)
    assert len(reports) == 1
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == ({"0.weight", "2.weight"} if then is draw_ else set())
    if then is not draw_:
        how = "excluded" if "exclude" in options else "not included" if options else "treated"
        assert [layer.reason for layer in reports[0].layers] == [
            f"{how} before, as 0 of Sequential",
            "treated before, as 2 of Sequential",
        ]


@pytest.mark.parametrize("look", [ci.measure, lambda model: ci.calibrate_(model, input_shape=(3, 16, 16))])
def test_a_look_at_a_model_is_not_its_first_forward_pass(look):
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        torch.optim.SGD(model.parameters(), 0.1)
        look(model)
        draw_(model)
        drawn = copy.deepcopy(model.state_dict())
        model(torch.zeros(1, 3, 16, 16))
    assert len(reports) == 2
    assert not torch.equal(model.state_dict()["2.weight"], drawn["2.weight"])


def test_what_a_look_at_a_model_builds_or_copies_is_none_of_the_models():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.grown = network(), None

        def forward(self, x):
            if self.grown is None:
                self.grown = nn.Conv2d(8, 8, 3)
            return self.grown(self.body(x))

    held = []  # as what refers to itself is kept until it is collected
    with ci.initializing(settings=QUICK) as reports:
        model = Growing()
        model.body.register_forward_pre_hook(lambda module, _: held.append(module))
        ci.initialize_(model, settings=QUICK)
        ci.measure(model)
    assert [[layer.name for layer in report.layers] for report in reports] == [["body.0", "body.2"]]


def test_a_trial_pass_in_other_threads_is_none_either():
    pool = concurrent.futures.ThreadPoolExecutor(2)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return sum(branch.result() for branch in [pool.submit(part, x) for part in (self.a, self.b)])

    def look():
        with ci.initializing(settings=QUICK) as reports:
            model = Branches()
            torch.optim.SGD(model.parameters(), 0.1)
            ci.calibrate_(model, input_shape=(3, 16, 16))
            finished.append(len(reports))

    finished = []
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(60)
    assert finished == [1]


@pytest.mark.parametrize("draw", ["delta_orthogonal", "dirac"])
def test_a_sparse_weight_is_known_again(draw):
    with ci.initializing(settings=QUICK):
        model = network(nn.ReLU(), nn.Conv2d(8, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3))
        ci.draw_base_(model, "delta_orthogonal", seed=0)
        if draw == "dirac":
            nn.init.dirac_(model[6].weight)
        before = model[6].weight.clone()
        ci.initialize_(model, settings=QUICK, exclude=["6"])
    assert torch.equal(model[6].weight, before)


def test_small_weights_of_one_direction_are_no_copies():
    with ci.initializing(settings=QUICK) as reports:
        models = [nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3)) for _ in range(2)]
        with torch.no_grad():
            models[1][0].weight.copy_(2 * models[0][0].weight)
        ci.initialize_(models[0], settings=QUICK, exclude=["0"])
    (report,) = [report for report in reports if report.layers[1].after]
    assert report.layers[0].reason is None or "before" not in report.layers[0].reason


def test_to_read_a_parametrized_weight_is_not_its_first_forward_pass():
    with ci.initializing(settings=QUICK) as reports:
        model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8))
        torch.optim.SGD(model.parameters(), 0.1)
        assert model[0].weight.norm() > 0
        model[0].weight = nn.init.kaiming_normal_(torch.empty(8, 3, 3, 3))
        model(torch.zeros(1, 3, 8, 8))
    assert len(reports) == 2


def test_what_an_inner_context_treats_or_excludes_stays_in_the_outer_one():
    with ci.initializing(settings=QUICK) as outer:
        model = network()
        drawn = copy.deepcopy(model.state_dict())
        with ci.initializing(settings=QUICK, exclude=["0.0"]) as inner:
            wrapped = nn.Sequential(model, nn.Conv2d(8, 8, 3))
        before = copy.deepcopy(wrapped.state_dict())
    assert [layer.reason for layer in inner[0].layers] == ["excluded", None, None]
    assert_equal(wrapped, before)
    assert torch.equal(model[0].weight, drawn["0.weight"])
    assert all(layer.outcome.value == "skipped" for report in outer for layer in report.layers)


def test_a_copy_is_told_of_once_in_contexts_within_each_other():
    with ci.initializing(), ci.initializing():
        online = network()
        target = frozen(online)
        report = ci.initialize_(online, settings=QUICK)
        assert report.remarks == []
        (remark,) = ci.initialize_(target, settings=QUICK).remarks
    assert remark.startswith("copies that are no longer equal")
