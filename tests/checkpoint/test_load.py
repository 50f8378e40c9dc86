"""Loading checkpoints: what matches under which prefixes, what is told of the rest, and what stays as it was."""

import gc
import json
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import convsim_init as ci
from convsim_init.checkpoint import load
from convsim_init.checkpoint.load import verify_checkpoint
from convsim_init.checkpoint.match import find_prefixes
from convsim_init.metrics.compare import compare

State = dict[str, Tensor]


class Wrapper(nn.Module):
    """Holds a network under a dotted name, as trainers do, and what else they hold."""

    def __init__(self, name: str, network: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        first, _, rest = name.partition(".")
        self.add_module(first, Wrapper(rest, network) if rest else network)
        for other, module in others.items():
            self.add_module(other, module)


def small(seed: int = 0, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, classes))


def saved(state: State | nn.Module, name: str = "a.pt") -> str:
    torch.save(state.state_dict() if isinstance(state, nn.Module) else state, name)
    return name


def values(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(model: nn.Module, expected: State) -> None:
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Everything matches


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth"])
def test_a_whole_file_is_loaded(name):
    ci.save_checkpoint(small(1), name)
    model = small(2)
    report = ci.load_checkpoint(model, Path(name))
    assert_equal(model, values(small(1)))
    assert (report.complete, report.exact, report.expected) == (True, True, 11)
    assert list(report.matched) == list(model.state_dict())
    assert str(report) == f"{name} into Sequential: 11 of 11 keys matched"


@pytest.mark.parametrize(
    "build", [torchvision.models.resnet18, lambda: timm.create_model("resnet18")], ids=["tv", "timm"]
)
def test_networks_of_others_get_every_value(build):
    source = ci.build_model("resnet18", seed=7)
    ci.save_checkpoint(source, "a.safetensors")
    model = build()
    assert ci.load_checkpoint(model, "a.safetensors").exact
    assert_equal(model, source.state_dict())


# Prefixes

PREFIXES = ["", "model.", "backbone.", "0.model.", "0.0.", "timm_model.", "resnet.", "module.", "a.b.c.d."]


@pytest.mark.parametrize("inside", PREFIXES, ids="model={}".format)
@pytest.mark.parametrize("written", PREFIXES, ids="file={}".format)
def test_prefixes_are_taken_off_and_put_before(written, inside):
    network = small(2)
    model = Wrapper(inside[:-1], network) if inside else network
    saved({written + key: value for key, value in small(1).state_dict().items()})
    report = ci.load_checkpoint(model, "a.pt")
    assert_equal(network, values(small(1)))
    assert report.complete
    assert report.exact == (written == inside)
    assert report.matched == {inside + key: written + key for key in network.state_dict()}
    if written == inside:
        assert (report.removed, report.added) == ([], "")
    elif {written, inside} != {"0.model.", "model."}:  # which have a part in common
        assert (report.removed, report.added) == ([written] if written else [], inside)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model._orig_mod."])
def test_what_compiling_adds_is_taken_off_wherever_it_stands(prefix):
    saved({prefix + key: value for key, value in small(1).state_dict().items()})
    model = small(2)
    report = ci.load_checkpoint(model, "a.pt")
    assert_equal(model, values(small(1)))
    assert "".join(sorted(report.removed)) == "".join(sorted(filter(None, ["_orig_mod.", prefix[:-10]])))
    assert "'_orig_mod.'" in str(report)
    assert not report.exact


def test_a_prefix_on_some_keys_is_taken_off_these():
    state = small(1).state_dict()
    saved({("model." if key < "4" else "") + key: value for key, value in state.items()})
    model = small(2)
    report = ci.load_checkpoint(model, "a.pt")
    assert_equal(model, state)
    assert (report.removed, report.complete, report.exact) == (["model."], True, False)


def test_of_two_copies_in_a_file_the_one_without_a_prefix_is_taken():
    state, average = small(1).state_dict(), small(3).state_dict()
    saved({f"ema.{key}": value for key, value in average.items()} | state)
    model = small(2)
    report = ci.load_checkpoint(model, "a.pt")
    assert_equal(model, state)
    assert report.removed == []
    assert report.unexpected == [f"ema.{key}" for key in average]


def test_a_backbone_is_found_in_a_larger_model_and_in_a_larger_file():
    detector = Wrapper("backbone", small(1), neck=nn.Linear(3, 3), head=nn.Linear(2, 2))
    model = small(2)
    report = ci.load_checkpoint(model, saved(detector))
    assert_equal(model, values(small(1)))
    assert report.unexpected == ["neck.weight", "neck.bias", "head.weight", "head.bias"]
    other = Wrapper("backbone", small(3), neck=nn.Linear(3, 3), head=nn.Linear(2, 2))
    report = ci.load_checkpoint(other, saved(small(1)))
    assert_equal(other.backbone, values(small(1)))
    assert (report.added, report.missing) == ("backbone.", ["neck.weight", "neck.bias", "head.weight", "head.bias"])
    assert "--prefix backbone." in str(report)


class Explaining(nn.Sequential):
    """Says in words of its own what its loading did not like."""

    def load_state_dict(self, *arguments, **options):
        try:
            return super().load_state_dict(*arguments, **options)
        except RuntimeError as error:
            raise ValueError("not mine") from error


@pytest.mark.parametrize("kind", [nn.Sequential, Explaining])
def test_nothing_holds_the_file_once_it_is_loaded(kind, monkeypatch):
    """On Windows a file that is mapped can be neither replaced nor removed."""
    held = []
    read = load.read_checkpoint

    def watched(*arguments):
        found = read(*arguments)
        held.extend(map(weakref.ref, found.tensors.values()))
        return found

    monkeypatch.setattr(load, "read_checkpoint", watched)
    path = saved(Wrapper("backbone", small(1), head=nn.Linear(2, 2)))
    gc.disable()
    try:
        ci.load_checkpoint(kind(*small(2)), path)
        assert held
        assert not any(one() is not None for one in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("classes", [5, 7])
def test_what_has_the_prefix_goes_before_what_has_none(classes):
    """As in a LightningModule with the network as ``model`` and a probe of its own by the name of a layer in it."""
    network, probe = small(1), nn.Linear(4, classes)
    theirs = {f"model.{key}": value for key, value in network.state_dict().items()}
    path = saved(theirs | {f"4.{key}": value for key, value in probe.state_dict().items()})
    model = small(2, classes)
    head = values(model)["4.weight"]
    report = ci.load_checkpoint(model, path)
    assert torch.equal(model[0].weight, network[0].weight)
    assert torch.equal(model[4].weight, network[4].weight if classes == 5 else head)
    assert report.unexpected == ["4.weight", "4.bias"]
    assert list(report.mismatched) == ([] if classes == 5 else ["4.weight", "4.bias"])
    copies = saved(network.state_dict() | {f"_orig_mod.{key}": value for key, value in small(3).state_dict().items()})
    report = ci.load_checkpoint(model := small(2), copies)
    assert_equal(model, values(network))
    assert len(report.unexpected) == len(network.state_dict())


def test_what_is_saved_by_another_name_than_it_is_loaded_by_is_missing():
    def module() -> nn.Conv2d:
        conv = nn.Conv2d(3, 8, 3)
        conv.register_state_dict_post_hook(lambda _, state, *__: state.__setitem__("kernel", state.pop("weight")))
        return conv

    model, path = module(), saved(module())
    with pytest.raises(ci.InputError, match=r"1 of 2 keys matched; .*missing .*: weight; unexpected.*: kernel"):
        ci.load_checkpoint(model, path, strict=True)
    report = ci.load_checkpoint(model, path)
    assert (report.missing, report.unexpected, report.complete) == (["weight"], ["kernel"], False)


def test_a_model_made_under_inference_mode_is_loaded_there():
    path = saved(small(1))
    with torch.inference_mode():
        model = small(2)
    before = values(model)
    with pytest.raises(ci.InputError, match="expected a tensor that can be written"):
        ci.load_checkpoint(model, path)
    assert_equal(model, before)
    with torch.inference_mode():
        assert ci.load_checkpoint(model, path).complete
    assert_equal(model, values(small(1)))


def test_a_path_is_expected():
    with pytest.raises(ci.InputError, match="expected the path of a checkpoint, got OrderedDict"):
        ci.load_checkpoint(small(), small().state_dict())


def test_a_file_that_fits_two_parts_of_a_model_names_them():
    file, model = saved(small(1)), nn.ModuleDict({"student": small(2), "teacher": small(3)})
    before = values(model)
    expected = r"part of the model, got 'a.pt', which fits 2: student, teacher; .*get_submodule\('student'\), \.\.\.\)"
    for act in (ci.load_checkpoint, verify_checkpoint):
        with pytest.raises(ci.InputError, match=expected):
            act(model, file)
    assert_equal(model, before)
    shared = small(2)
    twice = nn.ModuleDict({"student": shared, "teacher": shared})
    report = ci.load_checkpoint(twice, file)
    assert_equal(twice["teacher"], values(small(1)))
    assert (report.complete, report.exact, report.tied["teacher.0.weight"]) == (True, False, "student.0.weight")


@pytest.mark.parametrize(
    ("file", "model", "expected"),
    [
        pytest.param("a.w a.b", "a.w a.b", [("", "")], id="equal"),
        pytest.param("x.a.w x.a.b", "a.w a.b", [("x.", "")], id="off"),
        pytest.param("a.w a.b", "x.y.a.w x.y.a.b", [("", "x.y.")], id="before"),
        pytest.param("x.a.w x.a.b", "y.a.w y.a.b", [("x.", "y.")], id="both"),
        pytest.param("x.z.a.w x.z.a.b", "y.z.a.w y.z.a.b", [("x.", "y.")], id="common-parts-stay"),
        pytest.param("x.a.w x.a.b", "b.w b.b", [("", "")], id="only-the-last-part-in-common"),
        pytest.param("w b", "f.w f.b g.w g.b", [("", "f."), ("", "g.")], id="two-places"),
        pytest.param("p.a p.b q.c q.d", "a b c d", [("", "")], id="half-is-not-enough"),
        pytest.param("p.a p.b p.c q.d", "a b c d", [("p.", "")], id="more-than-half"),
        pytest.param("a b p.a p.b", "a b", [("", "")], id="no-change-where-equal"),
        pytest.param("q.a q.b p.a p.b", "a b", [("q.", ""), ("p.", "")], id="two-copies"),
        pytest.param("q.p.a q.p.b p.a p.b", "a b", [("p.", "")], id="fewest-parts"),
        pytest.param("xa.w xa.b", "a.w a.b", [("", "")], id="whole-parts-only"),
        pytest.param("", "a", [("", "")], id="empty-file"),
        pytest.param("a", "", [("", "")], id="empty-model"),
        pytest.param("m.w", "w", [("m.", "")], id="one-key"),
    ],
)
def test_find_prefixes(file, model, expected):
    assert find_prefixes({key: [1] for key in file.split()}, {key: [1] for key in model.split()}) == expected


def test_shapes_tell_copies_with_the_same_names_apart():
    file = {"0.w": [3], "0.b": [3], "1.w": [5], "1.b": [5]}
    assert find_prefixes(file, {"w": [5], "b": [5]}) == [("1.", "")]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([f"{i}.a.b.w" for i in range(20_000)], id="many"),
        pytest.param(["." * 100_000] * 2 + ["." * 99_999], id="dots"),
    ],
)
def test_odd_keys_cost_no_more_than_their_number(keys):
    steps = 0

    class Counting(dict):
        def __getitem__(self, key):
            nonlocal steps
            steps += 1
            return super().__getitem__(key)

        def __contains__(self, key):
            nonlocal steps
            steps += 1
            return super().__contains__(key)

    file = Counting.fromkeys(keys, [1])
    find_prefixes(file, Counting.fromkeys(["0.a.b.w", "x.w", "v", "."], [1]))
    assert steps < 1000 + 40 * len(file)


# What does not match


def test_a_head_of_another_size_stays_the_models():
    model = small(2, classes=3)
    head = values(model[4])
    report = ci.load_checkpoint(model, saved(small(1)))
    assert_equal(model, values(small(1)) | {f"4.{key}": value for key, value in head.items()})
    assert report.mismatched == {"4.weight": ([5, 4], [3, 4]), "4.bias": ([5], [3])}
    assert "9 of 11 keys matched" in str(report)
    assert "other shape, 2: 4.weight (file 5x4, model 3x4), 4.bias (file 5, model 3)" in str(report)
    assert (report.complete, report.exact) == (False, False)


def test_missing_and_unexpected_keys_are_told_and_guessed_to_be_renamed():
    state = small(1).state_dict()
    state["2.wait"] = state.pop("2.weight")
    state["more"] = torch.ones(3)
    model = small(2)
    kept = model[2].weight.clone()
    report = ci.load_checkpoint(model, saved(state))
    assert torch.equal(model[2].weight, kept)
    assert (report.missing, report.unexpected) == (["2.weight"], ["2.wait", "more"])
    assert report.renamed == {"2.wait": "2.weight"}
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["missing"], data["unexpected"], data["complete"]) == (["2.weight"], ["2.wait", "more"], False)


def test_long_lists_are_shortened_in_text_alone():
    report = ci.load_checkpoint(ci.build_model("resnet18"), saved({"fc.bias": torch.ones(1000)}))
    assert "missing in the file, 101: conv1.weight, bn1.weight, bn1.bias, bn1.running_mean and 97 more" in str(report)
    assert len(report.missing) == len(report.to_dict()["missing"]) == 101
    assert repr(report) == str(report)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        pytest.param(
            {"features.0.kernel": torch.ones(2, 3)}, ["'features.0.kernel' (2x3)", "'0.weight' (6x3x3x3)"], id="names"
        ),
        pytest.param({"0.weight": torch.ones(2, 3)}, ["'0.weight' (2x3)", "'0.weight' (6x3x3x3)"], id="shapes"),
        pytest.param({"x" * 9999: torch.ones(())}, ["xxx' (scalar)", "none of which fits"], id="long"),
    ],
)
def test_nothing_that_matches_is_an_error_with_examples(state, words):
    model = small(2)
    with pytest.raises(ci.InputError) as caught:
        ci.load_checkpoint(model, saved(state))
    assert all(word in str(caught.value) for word in [*words, "Sequential", "'a.pt'"]), caught.value
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert_equal(model, values(small(2)))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda state: {key: state[key] for key in state if key != "0.bias"}, id="missing"),
        pytest.param(lambda state: state | {"more": torch.ones(1)}, id="unexpected"),
        pytest.param(lambda state: state | {"0.bias": torch.ones(1)}, id="mismatched"),
        pytest.param(lambda state: state | {"0.bias": state["0.bias"] * float("nan")}, id="nan"),
    ],
)
def test_strict_refuses_what_is_not_complete(damage: Callable[[State], State]):
    model = small(2)
    saved(damage(small(1).state_dict()))
    with pytest.raises(
        ci.InputError, match=r"complete for the model, got a\.pt into Sequential: 1[01] of 11 keys .*; "
    ):
        ci.load_checkpoint(model, "a.pt", strict=True)
    assert_equal(model, values(small(2)))
    assert not ci.load_checkpoint(model, "a.pt").complete


def test_strict_takes_a_complete_file_under_a_prefix():
    saved({f"model.{key}": value for key, value in small(1).state_dict().items()})
    model = small(2)
    assert ci.load_checkpoint(model, "a.pt", strict=True).complete
    assert_equal(model, values(small(1)))


# Dtypes and values


def test_filters_that_the_models_dtype_rounds_away_are_told(tmp_path):
    state = {f"{index}.weight": torch.randn(4, 3, 3, 3) for index in range(2)}
    state |= {"0.weight": state["0.weight"] * 1e-9, "steps.weight": torch.ones(2, 2, 2, dtype=torch.int64)}
    path = ci.save_checkpoint(state, tmp_path / "a.safetensors")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3, bias=False))
    model.add_module("steps", nn.Module())
    model.steps.register_buffer("weight", torch.zeros(2, 2, 2, dtype=torch.int32))
    assert ci.load_checkpoint(model, path).faded == []
    report = ci.load_checkpoint(model.half(), path)
    assert report.faded == ["0.weight"]
    assert "filters so small that the model's dtype rounds them away, 1: 0.weight" in str(report)


@pytest.mark.parametrize(
    ("written", "own", "narrowed"),
    [
        (torch.float32, torch.float32, False),
        (torch.float16, torch.float32, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float64, False),
        (torch.float8_e4m3fn, torch.float16, False),
        (torch.float64, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.complex128, torch.complex64, True),
        (torch.int32, torch.int64, False),
        (torch.int64, torch.int32, True),
        (torch.uint8, torch.int8, True),
        (torch.bool, torch.bool, False),
    ],
    ids=str,
)
def test_the_models_dtype_is_kept_and_loss_is_told(written, own, narrowed):
    model = nn.Module()
    model.register_buffer("x", torch.zeros(4, dtype=own))
    state = {"x": torch.tensor([0, 1, 1, 0]).to(written)}
    report = ci.load_checkpoint(model, saved(state))
    assert model.x.dtype == own
    assert torch.equal(model.x, state["x"].to(own))
    name = [str(dtype).removeprefix("torch.") for dtype in (written, own)]
    assert report.narrowed == ({"x": tuple(name)} if narrowed else {})
    assert (report.retyped, report.exact) == ({}, True)
    assert (f"dtype narrowed, 1: x (file {name[0]}, model {name[1]})" in str(report)) == narrowed


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", ["complex32", "float4_e2m1fn_x2"])
def test_dtypes_that_torch_hardly_computes_with_are_loaded_and_written_as_they_are(name, tmp_path):
    dtype = getattr(torch, name, None) or pytest.skip("a dtype of newer versions of PyTorch")
    numbers = torch.randint(1, 60, (2, 4, 3, 8), dtype=torch.uint8).view(dtype)
    path = ci.save_checkpoint({"0.weight": numbers[0], "1.x": numbers[1]}, tmp_path / "init.pt")
    model = nn.Sequential(nn.Module(), nn.Module())
    model[0].weight = nn.Parameter(torch.zeros_like(numbers[0]), requires_grad=False)
    model[1].register_buffer("x", torch.zeros_like(numbers[1]))
    assert ci.load_checkpoint(model, path).exact
    for one, given in zip(model.state_dict().values(), numbers, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one.view(torch.uint8), given.view(torch.uint8))
    assert compare([("file", torch.load(path)), ("model", model.state_dict())]).entries[0].weights == "identical"


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_a_quantized_tensor_of_a_model_is_set_by_its_own_loading(tmp_path):
    model = nn.Conv2d(3, 4, 3)
    model.register_buffer("x", torch.quantize_per_tensor(torch.zeros(3), 0.5, 0, torch.qint8))
    path = ci.save_checkpoint(nn.Conv2d(3, 4, 3).state_dict() | {"x": torch.tensor([1, 0.5, -1])}, tmp_path / "a.pt")
    assert len(ci.load_checkpoint(model, path).matched) == 3
    assert model.x.dequantize().tolist() == [1, 0.5, -1]


def test_numbers_that_torch_cannot_convert_are_refused_in_one_line(tmp_path):
    dtype = getattr(torch, "float4_e2m1fn_x2", None) or pytest.skip("a dtype of newer versions of PyTorch")
    state = small(1).state_dict()
    packed = state | {"0.weight": torch.ones_like(state["0.weight"], dtype=torch.uint8).view(dtype)}
    path, model = ci.save_checkpoint(packed, tmp_path / "init.pt"), small()
    with pytest.raises(ci.RunError, match=r"^the model's tensors cannot be written, it is as it was: .*0\.weight"):
        ci.load_checkpoint(model, path)
    assert "RuntimeError" in verify_checkpoint(model, path).refused
    assert torch.equal(model[0].weight, small()[0].weight)
    assert compare([("file", packed), ("model", model)]).entries[0].weights == "different"


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("written", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_another_kind_of_dtype_is_told(written):
    report = ci.load_checkpoint(small(), saved(small(1).state_dict() | {"0.bias": torch.ones(6, dtype=written)}))
    assert report.retyped == {"0.bias": (str(written).removeprefix("torch."), "float32")}
    assert "other kind of dtype, 1: 0.bias" in str(report)
    assert (report.complete, report.exact) == (True, False)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("-inf"), torch.float32),
        (float("nan"), torch.float16),
        (1e30, torch.float16),
    ],
    ids=str,
)
def test_what_is_not_finite_once_loaded_is_told(value, dtype):
    state = small(1).state_dict()
    state["2.weight"][1, 2] = value
    report = ci.load_checkpoint(small().to(dtype), saved(state))
    assert report.non_finite == ["2.weight"]
    assert "infinities or NaN, 1: 2.weight" in str(report)
    assert not report.complete


# Models of every kind


def test_a_compiled_model_is_looked_through():
    network = small(2)
    assert ci.load_checkpoint(torch.compile(network), saved(small(1))).exact
    assert_equal(network, values(small(1)))


def test_a_compiled_part_is_looked_through():
    model = Wrapper("model", torch.compile(small(2)), head=nn.Linear(2, 2))
    report = ci.load_checkpoint(model, saved(Wrapper("model", small(1), head=nn.Linear(2, 2))))
    assert_equal(model.model._orig_mod, values(small(1)))
    assert report.complete
    assert "model.0.weight" in report.matched


def test_models_in_parallel_are_looked_through(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = [nn.DataParallel(small(2)), nn.parallel.DistributedDataParallel(small(2))]
        for model in [*wrapped, torch.compile(wrapped[1])]:
            assert ci.load_checkpoint(model, saved(small(1))).exact
        for model in wrapped:
            assert_equal(model.module, values(small(1)))
            assert ci.load_checkpoint(small(), saved(model)).removed == ["module."]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm]
)
def test_parametrized_convolutions_get_what_they_are_computed_from(wrap):
    models = [small(1), small(2)]
    for model in models:
        wrap(model[0])
    report = ci.load_checkpoint(models[1], saved(models[0]))
    assert report.exact
    assert_equal(models[1], values(models[0]))
    models[0].eval(), models[1].eval()
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    report = ci.load_checkpoint(models[1], saved(small(3)))
    assert "0.weight" in report.unexpected
    assert [key for key in report.missing if key.startswith("0.parametrizations.weight.")]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("absent", ["first.weight", "second.weight"])
def test_a_tied_weight_is_loaded_under_either_name(absent):
    state, model = values(Tied()), Tied()
    other = ({"first.weight", "second.weight"} - {absent}).pop()
    report = ci.load_checkpoint(model, saved({key: state[key] for key in state if key != absent}))
    assert_equal(model, state)
    assert model.first.weight is model.second.weight
    assert (report.tied, report.missing) == ({absent: other}, [])
    assert (report.complete, report.exact) == (True, False)
    assert f"missing, but tied, 1: {absent} to {other}" in str(report)


def test_tied_weights_that_differ_in_the_file_are_told():
    state = values(Tied())
    assert ci.load_checkpoint(Tied(), saved(state)).exact
    state["second.weight"] = state["second.weight"] + 1
    report = ci.load_checkpoint(Tied(), saved(state))
    assert report.conflicting == {"second.weight": "first.weight"}
    assert not report.complete
    assert "tied in the model, different in the file, 1: second.weight and first.weight" in str(report)


def test_of_several_tied_weights_that_differ_each_is_told_of_with_the_one_before():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(8)))
    for layer in model:
        layer.weight = model[0].weight
    state = {f"{place}.weight": torch.full((3, 3), float(place)) for place in range(8)}
    report = ci.load_checkpoint(model, saved(state))
    assert report.conflicting == {f"{place}.weight": f"{place - 1}.weight" for place in range(1, 8)}


def test_a_model_on_the_meta_device_is_refused_but_can_be_verified():
    with torch.device("meta"):
        model = small()
    with pytest.raises(ci.InputError, match=r"0\.weight: expected a tensor with data, got one on the meta device"):
        ci.load_checkpoint(model, saved(small(1)))
    assert verify_checkpoint(model, "a.pt").exact


def test_a_model_partly_on_the_meta_device_is_left_as_it_was():
    model = small(2)
    model[4].to("meta")
    before = values(model[:4])
    with pytest.raises(ci.InputError, match=r"4\.weight"):
        ci.load_checkpoint(model, saved(small(1)))
    assert_equal(model[:4], before)


def test_a_lazy_model_is_refused_and_stays_lazy():
    model = nn.Sequential(nn.LazyConv2d(6, 3))
    with pytest.raises(ci.InputError, match=r"lazy '0\.weight': run a forward pass first"):
        ci.load_checkpoint(model, saved(small(1)))
    assert isinstance(model[0], nn.LazyConv2d)


def test_extra_state_counts_as_a_key():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            raise AssertionError

    report = ci.load_checkpoint(Extra(2, 2), saved(nn.Linear(2, 2)))
    assert (report.missing, report.expected, report.complete) == (["_extra_state"], 3, False)


class Noted(nn.Sequential):
    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state):
        self.note = state


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize(("note", "plain"), [({"scale": [1, 2.5, None]}, True), ({"seen": {1, 2}}, False)])
def test_extra_state_of_plain_data_is_loaded_and_other_is_named(note, plain, prefix, command):
    model, other = Noted(*small(1)), Noted(*small(2))
    model.note, other.note = note, "before"
    path = saved({f"{prefix}{key}": value for key, value in model.state_dict().items()})
    report = ci.load_checkpoint(other, path)
    assert other.note == (note if plain else "before")
    assert torch.equal(other[0].weight, model[0].weight)
    assert (report.unread, report.complete) == ([] if plain else [f"{prefix}_extra_state"], plain)
    assert ("extra state of modules, no plain data and not read, 1: " in str(report)) is not plain
    assert not verify_checkpoint(small(2), path).exact  # which has none
    out = command(path, "--out", "b.pt", "--steps", "1")[1]
    assert "left out, for it is no tensor: " in out
    torch.save({"_extra_state": [note]}, "c.pt")
    with pytest.raises(ci.InputError, match=r"expected weights in .*, got extra states of modules alone"):
        ci.load_checkpoint(other, "c.pt")


def test_what_is_not_a_value_stays_as_it_was():
    model = small(2).to(memory_format=torch.channels_last).eval()
    model[0].weight.requires_grad_(False)
    parameters = list(model.parameters())
    ci.load_checkpoint(model, saved(small(1)))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[0].weight.requires_grad
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.training


def test_a_load_that_fails_half_way_changes_nothing():
    model = small(2)
    model[4].weight = nn.Parameter(torch.ones(1, 4).expand(5, 4))  # many numbers in one place: cannot be written
    before = values(model)
    with pytest.raises(ci.RunError, match="cannot be written"):
        ci.load_checkpoint(model, saved(small(1)))
    assert_equal(model, before)


def test_an_interrupt_changes_nothing(monkeypatch):
    model = small(2)
    load = nn.Linear._load_from_state_dict

    def interrupted(self, *arguments):
        load(self, *arguments)
        if self is model[4]:
            assert torch.equal(self.weight, small(1)[4].weight)
            raise KeyboardInterrupt

    monkeypatch.setattr(nn.Linear, "_load_from_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ci.load_checkpoint(model, saved(small(1)))
    assert_equal(model, values(small(2)))


@pytest.mark.parametrize("model", [None, {}, "resnet18", small().state_dict()], ids=lambda x: type(x).__name__)
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ci.InputError, match="expected a module to load into, got "):
        ci.load_checkpoint(model, saved(small()))


def test_a_module_without_tensors_is_refused():
    with pytest.raises(ci.InputError, match=r"such as none, got 'a\.pt'"):
        ci.load_checkpoint(nn.ReLU(), saved(small()))


def test_wrappers_in_a_file_are_opened_and_named():
    torch.save({"epoch": 3, "model": {f"module.{key}": value for key, value in small(1).state_dict().items()}}, "a.pt")
    model = small(2)
    report = ci.load_checkpoint(model, "a.pt")
    assert_equal(model, values(small(1)))
    assert (report.wrapper, report.removed) == ("model", ["module."])


# Modules that want to know the version of a state dict


class Versioned(nn.Sequential):
    """As torchvision's MNASNet: it refuses a state dict that does not say by which version it was written."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be set to 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_versions_travel_in_files_of_torch_save(tmp_path, prefix):
    model = Versioned(nn.Conv2d(3, 4, 3))
    outer = nn.ModuleDict({"model": Versioned(nn.Conv2d(3, 4, 3))}) if prefix else Versioned(nn.Conv2d(3, 4, 3))
    path = ci.save_checkpoint(model, tmp_path / "init.pt", prefix=prefix)
    outer.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert verify_checkpoint(outer, path).exact


def test_a_file_without_versions_is_loaded_here_and_verify_says_that_others_refuse_it(tmp_path):
    model, fresh = Versioned(nn.Conv2d(3, 4, 3)), Versioned(nn.Conv2d(3, 4, 3))
    path = ci.save_checkpoint(model, tmp_path / "init.safetensors")
    assert ci.load_checkpoint(fresh, path).complete
    assert torch.equal(fresh[0].weight, model[0].weight)
    report = verify_checkpoint(model, path)
    assert not report.exact
    assert "strict loading raised ValueError: version should be set to 2" in str(report)
    with pytest.raises(ValueError, match="version should be set"):
        fresh.load_state_dict(safetensors.torch.load_file(path))


# The model's own strict loading has the last word, in both directions


def test_a_file_from_before_batch_norm_counted_batches_is_complete(command):
    state = {key: value for key, value in ci.build_model("resnet18").state_dict().items() if "num_batches" not in key}
    ci.build_model("resnet18").load_state_dict(state, strict=True)
    saved(state, "old.pth")
    status, out, _ = command("verify", "old.pth", "resnet18")
    assert status == 0
    assert out.startswith("ok: old.pth into resnet18: 102 of 122")
    assert "set by the model's own loading, 20: bn1.num_batches_tracked" in out
    assert command("old.pth", "--like", "resnet18", "--out", "new.safetensors", "--steps", "1")[0] == 0
    report = ci.load_checkpoint(ci.build_model("resnet18", seed=1), "old.pth", strict=True)
    assert (report.exact, report.missing, len(report.supplied)) == (True, [], 20)


def test_a_new_file_that_lacks_it_is_refused_as_torch_refuses_it():
    state = small(1).state_dict()
    del state["1.num_batches_tracked"]  # its versions say that it should be there
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        small().load_state_dict(state, strict=True)
    path = saved(state)
    assert verify_checkpoint(small(), path).missing == ["1.num_batches_tracked"]
    with pytest.raises(ci.InputError, match=r"missing in the file, 1: 1\.num_batches_tracked"):
        ci.load_checkpoint(small(), path, strict=True)


@pytest.mark.parametrize("written", ["", "model."])
@pytest.mark.parametrize("inside", ["", "net."])
def test_old_batch_norm_under_prefixes(written, inside):
    state = {f"{written}{key}": value for key, value in small(1).state_dict().items() if "num_batches" not in key}
    model = Wrapper(inside[:-1], small(2)) if inside else small(2)
    report = ci.load_checkpoint(model, saved(state), strict=True)
    assert report.supplied == [f"{inside}1.num_batches_tracked"]
    assert report.exact == (written == inside)
    assert torch.equal(next(model.parameters()), small(1)[0].weight)


class Renamed(nn.Module):
    """Its files once called the convolution `stem`, and stored its weight flat."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_load_state_dict_pre_hook(self._convert)

    @staticmethod
    def _convert(module, state, prefix, *_):
        for name in ("weight", "bias"):
            if f"{prefix}stem.{name}" in state:
                state[f"{prefix}conv.{name}"] = state.pop(f"{prefix}stem.{name}").view(getattr(module.conv, name).shape)


@pytest.mark.parametrize("inside", ["", "net."])
def test_what_the_models_hooks_convert_is_loaded(inside):
    torch.manual_seed(1)
    weight, bias = torch.randn(108), torch.randn(4)
    inner = Renamed()
    model = Wrapper(inside[:-1], inner) if inside else inner
    report = ci.load_checkpoint(model, saved({f"{inside}stem.weight": weight, f"{inside}stem.bias": bias}), strict=True)
    assert torch.equal(inner.conv.weight.flatten(), weight)
    assert report.exact
    assert [key.split(".")[-2] for key in report.converted] == ["stem", "stem"]
    assert "converted by the model's own loading, 2" in str(report)
    assert "not in the file, or of another shape there, and set by the model's own loading, 2" in str(report)


class Resized(nn.Module):
    """Interpolates the positions of a file for images of another size."""

    def __init__(self, length: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.positions = nn.Parameter(torch.zeros(1, 4, length))

    def _load_from_state_dict(self, state, prefix, *others):
        if (key := f"{prefix}positions") in state:
            state[key] = nn.functional.interpolate(state[key], self.positions.shape[-1])
        super()._load_from_state_dict(state, prefix, *others)


@pytest.mark.parametrize("written", ["", "backbone."])
@pytest.mark.parametrize("fits", [True, False])
def test_what_the_models_own_loading_resizes_is_loaded_under_a_prefix_too(written, fits):
    old, new = Resized(8), Resized()
    nn.init.normal_(old.positions)
    state = {f"{written}{key}": value for key, value in old.state_dict().items()}
    state |= {} if fits else {f"{written}conv.bias": torch.zeros(5)}
    report = ci.load_checkpoint(new, saved(state), strict=fits)
    resized = nn.functional.interpolate(old.positions, 16)
    # A shape that cannot be resized takes the others with it.
    assert torch.equal(new.positions, resized if fits else torch.zeros(1, 4, 16))
    assert (report.supplied, list(report.mismatched)) == (
        (["positions"], []) if fits else ([], ["positions", "conv.bias"])
    )


def test_old_weight_norm_files_load_into_the_new_one():
    old, new = small(1), small(2)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(old[0])
    parametrizations.weight_norm(new[0])
    report = ci.load_checkpoint(new, saved({f"model.{key}": value for key, value in old.state_dict().items()}))
    assert (report.complete, report.removed) == (True, ["model."])
    assert report.converted == ["model.0.weight_g", "model.0.weight_v"]
    torch.testing.assert_close(new[0].weight, old[0].weight)


def test_a_model_that_refuses_keys_of_its_own_is_believed():
    class Strict(nn.Sequential):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            raise RuntimeError("no, thank you")

    model = Strict(nn.Conv2d(3, 4, 3))
    report = verify_checkpoint(model, saved(nn.Sequential(nn.Conv2d(3, 4, 3))))
    assert (report.complete, report.exact) == (True, False)
    assert "RuntimeError: no, thank you" in report.refused
    with pytest.raises(ci.RunError, match="no, thank you"):
        ci.load_checkpoint(model, "a.pt")


class Strict(nn.Sequential):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)


class Lenient(nn.Sequential):
    def load_state_dict(self, state_dict, **options):
        return super().load_state_dict(state_dict, strict=False)


class Silent(nn.Sequential):
    """It takes what it knows, but for its classifier, and says nothing."""

    def load_state_dict(self, state):
        own = self.state_dict()
        for key in own.keys() & state.keys():
            if not key.startswith("4."):
                own[key].copy_(state[key])


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("kind", [Strict, Lenient, Silent])
def test_a_loading_of_its_own_need_neither_know_strict_nor_say_what_it_does(kind, prefix):
    model, before = kind(*small(2)), values(small(2))
    path = saved({f"{prefix}{key}": value for key, value in small(1).state_dict().items()})
    left = ["4.weight", "4.bias"] if kind is Silent else []
    for act in (verify_checkpoint, ci.load_checkpoint):
        report = act(model, path)
        assert report.missing == left
        assert (report.complete, report.exact) == (not left, not (left or prefix))
        assert report.removed == ([prefix] if prefix else [])
    assert_equal(model, values(small(1)) | {key: before[key] for key in left})


def test_a_strict_loading_that_keeps_a_tensor_of_its_own_means_to():
    class Gridded(nn.Sequential):
        def _load_from_state_dict(self, state, *others):
            if "grid" in state:
                state["grid"] = self.grid
            super()._load_from_state_dict(state, *others)

    def gridded(seed):
        model = Gridded(*small(seed))
        model.register_buffer("grid", torch.full((3,), float(seed)))
        return model

    path = saved(gridded(1))
    for act in (verify_checkpoint, partial(ci.load_checkpoint, strict=True)):
        report = act(gridded(2), path)
        assert (report.supplied, report.converted, report.exact) == (["grid"], ["grid"], True)


def test_a_silent_loading_that_renames_keys_is_told_by_what_it_changed():
    class Renaming(nn.Sequential):
        def load_state_dict(self, state, strict=True):
            super().load_state_dict({key.replace("x", ""): value for key, value in state.items()}, strict=False)

    state = {key: value + 1 for key, value in small(1).state_dict().items()}
    path = saved({f"{key[0]}x{key[1:]}": value for key, value in state.items() if key != "4.bias"})
    model, before = Renaming(*small(2)), values(small(2))
    report = ci.load_checkpoint(model, path)
    assert report.missing == ["4.bias"]
    assert report.supplied == [key for key in state if key != "4.bias"]
    assert not report.unexpected
    assert_equal(model, state | {"4.bias": before["4.bias"]})


def test_a_loading_that_wants_something_else_ends_in_one_line_and_changes_nothing():
    class Staged(nn.Sequential):
        def load_state_dict(self, state, stage):
            raise AssertionError

    model = Staged(*small(2))
    assert "missing 1 required positional argument: 'stage'" in verify_checkpoint(model, saved(small(1))).refused
    with pytest.raises(ci.RunError, match=r"it is as it was: its own loading raised TypeError: .* argument: 'stage'"):
        ci.load_checkpoint(model, "a.pt")
    assert_equal(model, values(small(2)))


def test_a_loading_that_fails_half_way_puts_an_expanded_buffer_back():
    class Failing(nn.Conv2d):
        def _load_from_state_dict(self, state, prefix, *_):
            self.mean[0].copy_(state[prefix + "mean"][0])
            raise ValueError("half-way")

    model = Failing(3, 4, 3)
    model.register_buffer("mean", torch.zeros(3).expand(4, 3))
    state = {key: torch.ones(value.shape) for key, value in model.state_dict().items()}
    with pytest.raises(ci.RunError, match="it is as it was: its own loading raised ValueError: half-way"):
        ci.load_checkpoint(model, saved(state))
    assert not model.mean.any()


def test_a_model_that_cannot_be_copied_is_tried_itself_and_put_back():
    model = small(2)
    model.lock = threading.Lock()
    state = {key: value for key, value in small(1).state_dict().items() if "num_batches" not in key}
    assert verify_checkpoint(model, saved(state)).supplied == ["1.num_batches_tracked"]
    assert not verify_checkpoint(model, saved(small(1, classes=3), "b.pt")).exact
    assert_equal(model, values(small(2)))
    assert ci.load_checkpoint(model, "a.pt", strict=True).exact
    assert_equal(model, values(small(1)))


def test_verifying_changes_neither_the_model_nor_what_hooks_left_on_it():
    model = small(2)
    nn.utils.spectral_norm(model[0])
    before, attribute = values(model), model[0].weight
    assert verify_checkpoint(model, saved(model)).exact
    assert not verify_checkpoint(model, saved(small(1), "b.pt")).exact
    assert_equal(model, before)
    assert model[0].weight is attribute
