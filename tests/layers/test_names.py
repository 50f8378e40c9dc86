"""Names are bare: without what torch.compile, activation checkpointing and FSDP put into them."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import convsim_init as ci
from convsim_init.checkpoint.load import verify_checkpoint
from convsim_init.layers.names import WRAPPER_PARTS

QUICK = ci.Settings(steps=2)


class Wrapped(nn.Module):
    """Holds a module as wrappers do, under a name of theirs that its state dict shows."""

    def __init__(self, part: str, module: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.add_module(part, module)

    def forward(self, x):
        return self._modules[self.part](x)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Conv2d(8, 8, 3))


def wrapped(wrap) -> nn.Sequential:
    model = plain()
    model[0], model[1] = wrap(model[0]), wrap(model[1])
    return model


WRAPS = {
    **{part: lambda module, part=part: Wrapped(part, module) for part in WRAPPER_PARTS},
    "two": lambda module: Wrapped("_fsdp_wrapped_module", Wrapped("_checkpoint_wrapped_module", module)),
    "checkpoint_wrapper": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_reports_files_and_loading_have_bare_names(wrap, tmp_path):
    model, expected = wrapped(WRAPS[wrap]), plain()
    report = ci.initialize_(model, include=["0.0", "1"], settings=QUICK)
    ci.initialize_(expected, settings=QUICK)
    assert [layer.name for layer in report.layers] == ["0.0", "1"]
    assert [layer.name for layer in ci.measure(model.state_dict()).layers] == ["0.0", "1"]
    assert list(ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))) == ["0.0", "1"]

    convolutions = ci.save_checkpoint(model, tmp_path / "c.safetensors", report=report, convs_only=True)
    assert set(safetensors.torch.load_file(convolutions)) == {"0.0.weight", "1.weight"}
    whole = ci.save_checkpoint(model, tmp_path / "a.safetensors", report=report)
    state = safetensors.torch.load_file(whole)
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in state.items())
    assert verify_checkpoint(plain(), whole).exact

    again = wrapped(WRAPS[wrap])
    assert ci.load_checkpoint(again, whole).complete
    assert torch.equal(next(again.parameters()), expected[0][0].weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_fabric_has_set_up_is_looked_through(compiled, tmp_path):
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(torch.compile(plain()) if compiled else plain())
    report = ci.initialize_(model, include=["0.0", "1"], settings=QUICK)
    assert [layer.name for layer in report.layers] == ["0.0", "1"]
    path = ci.save_checkpoint(model, tmp_path / "a.safetensors", report=report)
    assert ci.load_checkpoint(plain(), path).exact
    assert ci.load_checkpoint(model, path).exact
    assert list(ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))) == ["0.0", "1"]
    assert ci.ConvolutionalSimilarity(model, include=["0.0"])().requires_grad


def test_a_model_with_the_names_of_a_wrapper_s_children_keeps_both():
    model = nn.Module()
    model._forward_module, model._original_module = plain(), plain()
    report = ci.measure(model)
    assert [layer.name for layer in report.layers] == [
        "_forward_module.0.0",
        "_forward_module.1",
        "_original_module.0.0",
        "_original_module.1",
    ]


@pytest.mark.parametrize("part", WRAPPER_PARTS)
def test_what_wrappers_put_into_a_file_is_taken_off_and_told(part, tmp_path):
    state = {key.replace("0.0.", f"0.{part}.0."): value for key, value in plain().state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    report = ci.load_checkpoint(plain(), tmp_path / "a.pt")
    assert (report.complete, report.exact, report.removed) == (True, False, [f"{part}."])


def test_a_state_dict_with_two_keys_of_one_bare_name_is_refused():
    weight = torch.randn(4, 3, 3, 3)
    with pytest.raises(ci.InputError, match="differ in more than '_orig_mod', got 2 keys for 1 tensors"):
        ci.measure({"a.weight": weight, "_orig_mod.a.weight": weight})


@pytest.mark.parametrize("beside", [nn.Conv2d(8, 8, 3), nn.Parameter(torch.ones(1))], ids=["module", "parameter"])
def test_a_child_of_a_wrappers_name_beside_others_is_no_wrapper(beside, tmp_path):
    model = nn.ModuleDict({"_orig_mod": plain()})
    model.beside = beside
    layers = {layer.name for layer in ci.measure(model).layers}
    assert ("beside" in layers) == isinstance(beside, nn.Module)
    path, before = ci.save_checkpoint(model, tmp_path / "a.pt"), copy.deepcopy(model.state_dict())
    assert len(torch.load(path)) == len(before)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert ci.load_checkpoint(model, path).complete
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_part_of_a_name_that_looks_alike_stays():
    assert [layer.name for layer in ci.measure({"_orig_model.weight": torch.randn(4, 3, 3, 3)}).layers] == [
        "_orig_model"
    ]


class Shadowing(nn.Module):
    """Holds attributes of the names of methods of every module, and answers to no other name than its parts'."""

    def __init__(self):
        super().__init__()
        self.body, self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Conv2d(8, 8, 3)
        self.modules, self.children, self.parameters, self.buffers = [], {}, (), None

    def __getattr__(self, name):
        return vars(self)["_modules"][name]

    def forward(self, x):
        return self.conv(self.body(x)) + self.conv.weight.mean()


class Answering(nn.Module):
    """Has a module for every name."""

    def __init__(self):
        super().__init__()
        self.inside = Shadowing()

    def __getattr__(self, name):
        return vars(self)["_modules"]["inside"]

    def forward(self, x):
        return self.inside(x)


@pytest.mark.parametrize("build", [Shadowing, Answering])
def test_what_a_model_calls_its_own_attributes_stands_in_no_ones_way(build, tmp_path):
    model = nn.Sequential(build())
    names = [f"0.{name}" for name in ("body.0", "conv")]
    names = names if build is Shadowing else [name.replace("0.", "0.inside.", 1) for name in names]
    report = ci.initialize_(model, settings=QUICK)
    assert {layer.name: layer.outcome for layer in report.layers} == dict.fromkeys(names, ci.Outcome.INITIALIZED)
    assert [layer.name for layer in ci.measure(model[0]).layers] == [name[2:] for name in names]
    images = torch.randn(2, 3, 9, 9)
    assert ci.measure_feature_correlation(model[0], images).keys() == {name[2:] for name in names}
    assert ci.calibrate_(model[0], images).keys() == {name[2:] for name in names}
    assert ci.load_checkpoint(model, ci.save_checkpoint(model, tmp_path / "a.safetensors", report=report)).exact
