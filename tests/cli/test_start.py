"""The command starts from a file of weights, alone or like a model, and draws base weights anew."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import convsim_init as ci
from convsim_init.layers.inferred import BY_SHAPE

GROUPED = "cifar_grouped.py:build"


class Grouped(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(
            nn.Conv2d(3, width, 3),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 3, groups=2),
            nn.ConvTranspose2d(width, width, 2, bias=False),
        )


@pytest.fixture
def weights(tmp_path):
    """A grouped and a transposed layer, as a trainer leaves them, and the code of the model they belong to."""
    torch.manual_seed(3)
    model = Grouped()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "cifar_grouped.py").write_text(
        "from torch import nn\n\n"
        "def build(width=8):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width),\n"
        "        nn.Conv2d(width, width, 3, groups=2), nn.ConvTranspose2d(width, width, 2, bias=False))\n"
    )
    return model


def test_start_from_a_bare_file(command, tmp_path, weights):
    status, out, err = command("weights.safetensors", "--out", "init.safetensors")
    assert (status, err) == (0, "")
    assert "--like MODEL settles which are grouped or transposed" in out
    assert f"each layer: {BY_SHAPE}" in out
    state = weights.state_dict()
    ci.initialize_(state)
    written = load_file(tmp_path / "init.safetensors")
    assert written.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(written[key], value), key


def test_start_like_a_model(command, tmp_path, weights):
    status, out, err = command("weights.safetensors", "--like", GROUPED, "--out", "init.safetensors", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["model"] == "weights.safetensors"
    assert report["seed"] is None
    assert [layer["kind"] for layer in report["layers"]] == ["Conv2d", "Conv2d", "ConvTranspose2d"]
    assert any("10 of 10 keys matched" in remark for remark in report["remarks"])
    ci.initialize_(weights)
    written = load_file(tmp_path / "init.safetensors")
    for key, value in weights.state_dict().items():
        assert torch.equal(written[key], value), key


def test_inspect_and_compare_like_a_model(command, weights):
    status, out, _ = command("inspect", "weights.safetensors", "--like", GROUPED, "--json")
    assert status == 0
    expected = ci.measure(weights).layers
    assert [layer["before"] for layer in json.loads(out)["layers"]] == [layer.before for layer in expected]
    status, out, _ = command("compare", "weights.safetensors", "weights.safetensors", "--like", GROUPED, "--json")
    assert status == 0
    status, out, err = command("inspect", "weights.safetensors", "--like", GROUPED, "--model-arg", "width=16")
    assert (status, out) == (2, "")
    assert "expected a file with all convolutions of the model" in err
    assert "0.weight (file 8x3x3x3, model 16x3x3x3)" in err


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "state_dict", "model", "module.", "_orig_mod.", "Lightning", "Lightning compiled"],
)
@pytest.mark.parametrize("like", [[], ["--like", GROUPED]], ids=["alone", "like"])
def test_wrappers_and_prefixes_come_off(command, tmp_path, weights, wrap, like):
    torch.save(wrap(weights.state_dict()), tmp_path / "trained.pt")
    status, out, err = command("trained.pt", *like, "--out", "init.safetensors")
    assert (status, err) == (0, "")
    assert load_file(tmp_path / "init.safetensors").keys() == weights.state_dict().keys()
    content = wrap(weights.state_dict())
    prefix = next(iter(content.get("state_dict", content.get("model", content)))).removesuffix("0.weight")
    told = f"'{prefix}' was taken off every key of trained.pt; --prefix {prefix} puts it back"
    assert (told in out) == bool(prefix and not like)


def test_the_file_that_was_read_is_as_it_was(command, tmp_path, weights):
    before = (tmp_path / "weights.safetensors").read_bytes()
    torch.save(weights.state_dict(), tmp_path / "weights.pt")
    pickled = (tmp_path / "weights.pt").read_bytes()
    assert command("weights.safetensors")[0] == command("weights.pt")[0] == 0
    assert (tmp_path / "weights.safetensors").read_bytes() == before
    assert (tmp_path / "weights.pt").read_bytes() == pickled
    status, _, err = command("weights.safetensors", "--out", "weights.safetensors", "--force")
    assert (status, err) == (0, "")
    state = weights.state_dict()
    ci.initialize_(state)
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["2.weight"], state["2.weight"])


def test_the_picture_shows_the_weights_from_before(command, tmp_path, weights):
    pytest.importorskip("matplotlib")
    status, _, err = command("weights.safetensors", "--report", "run.json", "--plot", "run.png")
    assert (status, err) == (0, "")
    record = json.loads((tmp_path / "run.json").read_text())
    expected = ci.measure(weights.state_dict()).layers[0].before
    assert record["layers"][0]["before"]["feature_correlation_natural"] == pytest.approx(
        expected["feature_correlation_natural"], rel=1e-5
    )


# Base weights


def test_base_weights_are_drawn_anew(command, tmp_path):
    arguments = ("cifar_resnet18", "--base", "orthogonal", "--seed", "7", "--steps", "2", "--exclude", "layer[34]*")
    status, out, err = command(*arguments, "--out", "init.safetensors", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["base"] == "orthogonal"
    model = ci.build_model("cifar_resnet18", seed=7)
    own = model.state_dict()["layer4.0.conv1.weight"].clone()
    ci.draw_base_(model, "orthogonal", seed=7, exclude=["layer[34]*"])
    ci.initialize_(model, settings=ci.Settings(steps=2), exclude=["layer[34]*"])
    written = load_file(tmp_path / "init.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(written[key], value), key
    assert torch.equal(written["layer4.0.conv1.weight"], own)
    with safe_open(tmp_path / "init.safetensors", "pt") as file:
        about = json.loads(file.metadata()["convsim_init"])
    assert (about["base"], about["seed"]) == ("orthogonal", 7)


def test_base_weights_for_a_file_take_a_seed(command, weights):
    status, out, err = command("weights.safetensors", "--base", "kaiming_normal", "--seed", "5", "--json")
    assert (status, err) == (0, "")
    assert (json.loads(out)["seed"], json.loads(out)["base"]) == (5, "kaiming_normal")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights.safetensors", "--seed", "1"], "--seed: a file has its weights already"),
        (["weights.safetensors", "--num-classes", "3"], "--num-classes: a file has its weights already; --like names"),
        (["weights.safetensors", "--like", GROUPED, "--seed", "1"], "--seed: a file has its weights already"),
        (["weights.safetensors", "--like", "weights.safetensors"], "expected a model to build, got the checkpoint"),
        (["weights.safetensors", "--like", "resnet18"], "none of which fits"),
        (["weights.safetensors", "--like", "nothing_like_it"], "expected the name of a model"),
        (["resnet18", "--like", "resnet18"], "--like: expected a FILE that is like that model"),
        (["inspect", "resnet18", "--like", "resnet18"], "--like: expected a FILE"),
        (["resnet18", "--base", "he"], "'--base': expected base to be model or one of kaiming_normal"),
        (["missing.safetensors"], "cannot read 'missing.safetensors'"),
        (["truncated.safetensors"], "damaged or of another kind"),
        (["linear.safetensors"], "expected a file with convolution weights, of rank 3 to 5, got 'linear.safetensors'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_starts(command, tmp_path, weights, arguments, message):
    data = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(data[: len(data) // 2])
    save_file(nn.Linear(3, 3).state_dict(), tmp_path / "linear.safetensors")
    files = set(tmp_path.iterdir())
    status, out, err = command(*arguments, *([] if arguments[0] == "inspect" else ["--out", "init.safetensors"]))
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert {path for path in tmp_path.iterdir() if path.name != "__pycache__"} == files


def test_a_run_that_treats_nothing_says_so(command, tmp_path, weights):
    status, out, err = command("weights.safetensors", "--include", "3", "--exclude", "3", "--out", "same.safetensors")
    assert (status, err) == (0, "")
    assert "no convolution was treated: the weights are as they were" in out
    assert torch.equal(load_file(tmp_path / "same.safetensors")["0.weight"], weights[0].weight)


def test_float64_that_is_rounded_is_told(command, tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def network():\n"
        "    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))\n"
        "    model.register_buffer('grid', torch.arange(3).double() / 3)\n"
        "    return model\n"
    )
    status, out, _ = command("own.py:network", "--out", "one.safetensors", "--prefix", "p.")
    assert (status, "float64 in the model, float32 in the file: p.grid; --dtype float64 keeps them" in out) == (0, True)
    for apart in (["--dtype", "float64"], ["--without", "grid"]):
        status, out, _ = command("own.py:network", "--out", "two.safetensors", "--force", *apart)
        assert (status, "float64 in the model" in out) == (0, False)


def test_entries_that_no_file_holds_are_refused_before_the_work(command, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Network(torch.nn.Conv2d):\n"
        "    def get_extra_state(self):\n"
        "        return 3\n"
        "    def set_extra_state(self, state):\n"
        "        pass\n"
        "def network():\n"
        "    return torch.nn.Sequential(Network(3, 8, 3))\n"
    )
    monkeypatch.setattr("convsim_init.initialize.initialize_layers", None)  # not to be called
    status, _, err = command("own.py:network", "--out", "init.safetensors")
    assert (status, "leave it out with exclude (--without in the shell)" in err) == (2, True)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert command("own.py:network", "--out", "init.safetensors", "--without", "*_extra_state")[0] == 0
