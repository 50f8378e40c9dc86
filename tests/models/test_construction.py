"""Models that are built in a context are treated once what draws their weights is over, and what is loaded stays."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import convsim_init as ci

QUICK = ci.Settings(steps=3, channels="matched")


def network(*others):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), *others)


def draw_(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


def expected(build, seed=0, **options):
    """The state dict of what `initialize_` makes of the model."""
    torch.manual_seed(seed)
    model = build()
    ci.initialize_(model, settings=QUICK, **options)
    return model.state_dict()


def assert_equal(model, state):
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def drawn_afterwards():
    model = network()
    draw_(model)
    return model


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
REPLACED += [(nn.modules.conv._ConvNd, "__init__"), (torch.optim.Optimizer, "__init__")]


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


def test_training_starts_from_treated_weights():
    torch.manual_seed(0)
    with ci.initializing(settings=QUICK) as reports:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert_equal(model, expected(network))
        model(torch.randn(1, 3, 9, 9)).sum().backward()
        optimizer.step()
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
    assert reports[1].layers[1].reason == "treated before"


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


def test_what_is_loaded_after_the_optimizer_stays():
    state = network().state_dict()
    with ci.initializing(settings=QUICK):
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
        model.load_state_dict(state)
        model(torch.randn(1, 3, 9, 9))
    assert_equal(model, state)


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


def test_patterns_and_several_models():
    torch.manual_seed(0)
    seen = []
    with ci.initializing(settings=QUICK, exclude=["generator.0"], on_report=seen.append) as reports:
        models = [nn.ModuleDict({"generator": network()}), network(), nn.Linear(2, 2)]
    assert seen == reports
    assert [[layer.reason for layer in report.layers] for report in reports] == [["excluded", None], [None, None]]
    assert len(models) == 3
    with pytest.raises(ci.InputError, match="include: no convolution matches 'stem'; there are 0, 2"):
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
