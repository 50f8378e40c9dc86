"""What `convsim-init verify` says of damaged files, and whether the strict loaders of others say the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor
from words import MISSING

from convsim_init import build_model, save_checkpoint

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return build_model("resnet18", seed=1).state_dict()


@pytest.fixture(scope="module")
def networks() -> list[torch.nn.Module]:
    return [torchvision.models.resnet18(), timm.create_model("resnet18")]


def strictly(networks: list[torch.nn.Module], state: State) -> list[bool]:
    """Whether each network takes the state dict."""
    taken = []
    for network in networks:
        try:
            network.load_state_dict(state, strict=True)
            taken.append(True)
        except RuntimeError:
            taken.append(False)
    return taken


def write(state: State, name: str) -> None:
    if name.endswith(".pt"):
        torch.save(state, name)
    else:
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, name)


# What is in order


@pytest.mark.parametrize("name", ["init.safetensors", "init.pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_we_write_loads_strictly(name, dtype, command, networks):
    save_checkpoint(build_model("resnet18"), name, dtype=dtype)
    status, out, err = command("verify", name, "resnet18")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"ok: {name} into resnet18: 122 of 122 keys matched"
    if dtype == torch.float64:
        assert lines[1].startswith("dtype narrowed, 102: conv1.weight (file float64, model float32), ")
    assert len(lines) == 1 + (dtype == torch.float64)
    loaded = safetensors.torch.load_file(name) if name != "init.pt" else torch.load(name)
    assert strictly(networks, loaded) == [True, True]


def test_a_wrapped_state_dict_is_said_to_be_one(state, command):
    torch.save({"epoch": 1, "state_dict": state}, "a.pt")
    status, out, _ = command("verify", "a.pt", "resnet18")
    assert status == 0
    assert "the file's tensors are under 'state_dict'" in out


def test_options_shape_the_model(command):
    save_checkpoint(build_model("cifar_resnet18", num_classes=100, in_chans=1), "a.pt")
    assert command("verify", "a.pt", "cifar_resnet18")[0] == 3
    assert command("verify", "a.pt", "cifar_resnet18", "--num-classes", "100", "--in-chans", "1")[0] == 0


# What is damaged


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {new if key == old else key: value for key, value in state.items()}


def dropped(*keys: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def prefixed(prefix: str, *parts: str) -> Callable[[State], State]:
    return lambda state: {(prefix if key.startswith(parts or "") else "") + key: value for key, value in state.items()}


def changed(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: state | {key: change(state[key])}


def spoiled(key: str, value: float) -> Callable[[State], State]:
    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return changed(key, spoil)


def swapped(a: str, b: str) -> Callable[[State], State]:
    return lambda state: state | {a: state[b], b: state[a]}


def other(name: str, **arguments: int) -> Callable[[State], State]:
    return lambda state: build_model(name, **arguments).state_dict()


DAMAGES = [
    pytest.param(
        renamed("layer1.0.conv1.weight", "layer1.0.convolution1.weight"),
        [
            "121 of 122",
            "missing in the file, 1: layer1.0.conv1.weight\n",
            "unexpected, not in the model, 1: layer1.0.convolution1.weight\n",
            "perhaps renamed, 1: layer1.0.convolution1.weight for layer1.0.conv1.weight\n",
        ],
        id="renamed",
    ),
    pytest.param(
        renamed("conv1.weight", "x"),
        ["missing in the file, 1: conv1.weight", "x for conv1.weight"],
        id="renamed-wholly",
    ),
    pytest.param(renamed("fc.bias", "fc.Bias"), ["1: fc.bias\n", "1: fc.Bias\n"], id="renamed-by-case"),
    pytest.param(renamed("fc.bias", "fc.bias "), ["1: fc.bias\n", "fc.bias  for fc.bias"], id="renamed-by-a-space"),
    pytest.param(renamed("fc.bias", "fc.b\n\x1b[2J"), ["1: fc.b\\n\\x1b[2J\n"], id="renamed-to-control-characters"),
    pytest.param(dropped("layer4.1.conv2.weight"), ["121 of 122", "1: layer4.1.conv2.weight\n"], id="dropped"),
    pytest.param(dropped("fc.weight", "fc.bias"), ["120 of 122", "2: fc.weight, fc.bias\n"], id="dropped-head"),
    pytest.param(
        lambda state: {key: state[key] for key in state if key.startswith("layer1.")},
        ["24 of 122", "missing in the file, 82: conv1.weight, bn1.weight, bn1.bias, bn1.running_mean and 78 more\n"],
        id="dropped-most",
    ),
    pytest.param(
        lambda state: state | {"extra": torch.ones(2)}, ["122 of 122", "not in the model, 1: extra\n"], id="added"
    ),
    pytest.param(
        lambda state: {key: state[key] for key in state if state[key].dim() == 4}, ["20 of 122"], id="convolutions-only"
    ),
    pytest.param(
        changed("conv1.weight", lambda weight: weight[..., :5, :5]),
        ["121 of 122", "other shape, 1: conv1.weight (file 64x3x5x5, model 64x3x7x7)"],
        id="shape",
    ),
    pytest.param(changed("fc.weight", torch.t), ["fc.weight (file 512x1000, model 1000x512)"], id="transposed"),
    pytest.param(changed("conv1.weight", torch.flatten), ["conv1.weight (file 9408, model 64x3x7x7)"], id="flattened"),
    pytest.param(
        changed("fc.bias", lambda bias: bias[:0]), ["fc.bias (file 0, model 1000)"], id="nothing-left-of-a-tensor"
    ),
    pytest.param(
        swapped("conv1.weight", "fc.bias"),
        ["120 of 122", "conv1.weight (file 1000, model 64x3x7x7)", "fc.bias (file 64x3x7x7, model 1000)"],
        id="swapped",
    ),
    *(
        pytest.param(
            prefixed(prefix), ["122 of 122", f"prefix: the file's keys have '{prefix}'"], id=f"prefix-{prefix}"
        )
        for prefix in ("model.", "module.", "_orig_mod.", "backbone.", "0.model.", "net_1.")
    ),
    pytest.param(
        prefixed("_orig_mod.", "layer1", "layer2"),
        ["122 of 122", "keys have '_orig_mod.'"],
        id="prefix-of-compiled-parts",
    ),
    pytest.param(
        prefixed("model.", "layer"),
        ["122 of 122", "keys have 'model.'"],
        id="prefix-of-some-keys",
    ),
    pytest.param(prefixed("module.", "fc"), ["120 of 122", "module.fc.weight for fc.weight"], id="prefix-of-two-keys"),
    pytest.param(
        lambda state: prefixed("model.")(dropped("fc.bias")(state)),
        ["121 of 122", "keys have 'model.'", "missing in the file, 1: fc.bias\n"],
        id="prefix-and-dropped",
    ),
    pytest.param(
        other("cifar_vgg19"),
        ["0 of 122", "looks like another model's", "unexpected, not in the model, 114: "],
        id="another-model",
    ),
    pytest.param(other("resnet34"), ["122 of 122", "model, 96: "], id="a-deeper-model"),
    pytest.param(other("resnext50_32x4d"), ["looks like another model's", "other shape"], id="a-wider-model"),
    pytest.param(
        other("resnet18", num_classes=10),
        ["120 of 122", "other shape, 2: fc.weight (file 10x512, model 1000x512), fc.bias (file 10, model 1000)"],
        id="other-classes",
    ),
    pytest.param(other("resnet18", in_chans=1), ["conv1.weight (file 64x1x7x7, model 64x3x7x7)"], id="other-channels"),
]
UNSEEN_BY_OTHERS = [
    pytest.param(spoiled("layer2.0.conv1.weight", float("nan")), ["NaN, 1: layer2.0.conv1.weight\n"], id="nan"),
    pytest.param(spoiled("bn1.running_var", float("inf")), ["infinities or NaN, 1: bn1.running_var\n"], id="infinity"),
    pytest.param(
        changed("bn1.weight", lambda weight: weight.double() * 1e300),
        ["NaN, 1: bn1.weight\n"],
        id="infinity-once-loaded",
    ),
    pytest.param(
        changed("conv1.weight", lambda weight: (weight * 99).to(torch.int8)),
        ["other kind of dtype, 1: conv1.weight (file int8, model float32)"],
        id="integers-for-floats",
    ),
    pytest.param(
        changed("bn1.num_batches_tracked", Tensor.float),
        ["other kind of dtype, 1: bn1.num_batches_tracked (file float32, model int64)"],
        id="floats-for-integers",
    ),
    pytest.param(changed("fc.bias", Tensor.bool), ["fc.bias (file bool, model float32)"], id="booleans"),
]


@pytest.mark.parametrize(
    ("damage", "words", "taken"),
    [
        *(pytest.param(*case.values, False, id=case.id) for case in DAMAGES),
        *(pytest.param(*case.values, True, id=case.id) for case in UNSEEN_BY_OTHERS),
    ],
)
def test_damage_is_named(damage, words, taken, state, command, networks):
    damaged = damage(state)
    write(damaged, "a.safetensors")
    status, out, err = command("verify", "a.safetensors", "resnet18")
    assert (status, err) == (3, "")
    assert out.startswith("mismatch: a.safetensors into resnet18: ")
    assert all(word in out for word in words), out
    assert max(map(len, out.splitlines())) < 700
    assert (", but for a prefix\n" in out) == ("\nprefix: " in out)
    if any(character in key for key in damaged for character in "\n\x1b"):
        assert "\x1b" not in out
    assert strictly(networks, damaged) == [taken, taken]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(dropped("layer3.1.bn2.num_batches_tracked"), id="dropped-count-of-batches"),
        pytest.param(changed("layer3.1.bn2.num_batches_tracked", lambda x: x[None]), id="scalar-as-vector"),
    ],
)
def test_what_the_models_own_loading_sets_right_is_no_damage(damage, state, command, networks):
    damaged = damage(state)
    write(damaged, "a.safetensors")
    status, out, err = command("verify", "a.safetensors", "resnet18")
    assert (status, err) == (0, "")
    told = "not in the file, or of another shape there, and set by the model's own loading, 1: "
    assert f"121 of 122 keys matched\n{told}layer3.1.bn2.num_batches_tracked\n" in out
    assert strictly(networks, damaged) == [True, True]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_cannot_be_read_is_told_from_a_mismatch(name, command):
    write({"fc.bias": torch.ones(9000)}, name)
    path = Path(name)
    path.write_bytes(path.read_bytes()[:-1])
    status, out, err = command("verify", name, "resnet18")
    assert (status, out) == (2, "")
    assert "is damaged or of another kind" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["none.pt", "resnet18"], MISSING, id="file"),
        pytest.param(["a.txt", "resnet18"], "got 'a.txt': if it is a checkpoint, rename it", id="suffix"),
        pytest.param(["resnet18", "a.pt"], "got MODEL FILE: write verify a.pt resnet18", id="swapped"),
        pytest.param(["resnet18", "gone.pt"], "got MODEL FILE: write verify gone.pt resnet18", id="swapped-missing"),
        pytest.param(["a.pt", "b.pt"], "expected a model to build, got the checkpoint", id="two-files"),
        pytest.param(["a.pt", "resnet19"], "resnet18", id="model"),
        pytest.param(["a.pt"], "MODEL", id="no-model"),
        pytest.param(["a.pt", "resnet18", "--num-classes", "0"], "--num-classes", id="classes"),
    ],
)
def test_wrong_usage_is_refused(arguments, words, command):
    Path("a.pt").write_bytes(b"")
    status, out, err = command("verify", *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


# What is shown


def test_json_holds_every_key(state, command):
    write(prefixed("model.")(dropped("fc.weight", "conv1.weight")(state)) | {"fc": torch.ones(2, 3)}, "a.pt")
    status, out, err = command("verify", "a.pt", "resnet18", "--json")
    assert (status, err) == (3, "")
    data = json.loads(out)
    assert (data["complete"], data["exact"], data["expected"]) == (False, False, 122)
    assert (data["file"], data["model"], data["removed"], data["added"]) == ("a.pt", "resnet18", ["model."], "")
    assert data["missing"] == ["conv1.weight", "fc.weight"]
    assert data["unexpected"] == ["fc"]
    assert data["matched"] == {key: f"model.{key}" for key in state if key not in data["missing"]}


def test_json_names_both_shapes_and_dtypes(state, command):
    write(state | {"fc.bias": torch.ones(3), "bn1.bias": torch.ones(64, dtype=torch.int32)}, "a.pt")
    data = json.loads(command("verify", "a.pt", "resnet18", "--json")[1])
    assert data["mismatched"] == {"fc.bias": {"file": [3], "model": [1000]}}
    assert data["retyped"] == {"bn1.bias": {"file": "int32", "model": "float32"}}


@pytest.mark.parametrize(("damage", "status"), [(dict, 0), (dropped("fc.bias"), 3)], ids=["ok", "mismatch"])
def test_quiet_prints_nothing(damage, status, state, command):
    write(damage(state), "a.pt")
    assert command("verify", "a.pt", "resnet18", "--quiet") == (status, "", "")


def test_quiet_and_json_are_refused_together(state, command):
    write(state, "a.pt")
    message = "Error: --json and --quiet: choose one (see 'convsim-init verify --help')\n"
    assert command("verify", "a.pt", "resnet18", "--quiet", "--json") == (2, "", message)
