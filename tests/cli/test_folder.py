"""Folders for the libraries of Hugging Face: written whole or not at all, and loaded by them."""

import re

import pytest
import torch
from safetensors.torch import load_file

from convsim_init.checkpoint import folder as source

QUICK = ["--steps", "2"]
SMALL = ["--model-arg", "depths=[1, 1]", "--model-arg", "hidden_sizes=[8, 16]", "--model-arg", "embedding_size=8"]
CLASS = ["transformers:ResNetForImageClassification", "--num-classes", "3", *SMALL]


def matched(model, file, prefix=""):
    weights = load_file(file)
    state = {key.removeprefix(prefix): value for key, value in model.state_dict().items()}
    return sum(torch.equal(value, weights[key]) for key, value in state.items()), len(state), len(weights)


def test_timm_and_transformers_load_a_folder_of_timm(command, tmp_path):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    arguments = ["--num-classes", "7", "--in-chans", "1", "--plot", "change.png"]
    status, out, err = command("timm:resnet10t", *arguments, *QUICK, "--out", "net/")
    assert (status, err) == (0, "")
    assert ", net (" in out.splitlines()[-1]
    folder = tmp_path / "net"
    names = {"README.md", "config.json", "model.safetensors", "plot.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "plot.png").read_bytes() == (tmp_path / "change.png").read_bytes()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    same, entries, _ = matched(model, folder / "model.safetensors")
    assert (same, model.num_classes) == (entries, 7)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert matched(model, folder / "model.safetensors", "timm_model.") == (entries, entries, entries)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: timm\ntags:\n- convsim-init\n---\n")
    for text in (
        "**not trained**",
        "| steps | 2 |",
        "![Similarity of the filters before and after](plot.png)",
        "conv1",
    ):
        assert text in card


def test_what_a_models_own_code_loaded_is_told(command, tmp_path):
    """Filters that have learned something lose it."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "trained.pt")
    (tmp_path / "own.py").write_text(
        "import timm, torch\n"
        "def network(load=True):\n"
        "    model = timm.create_model('resnet10t')\n"
        "    if load:\n"
        "        state = {k: v for k, v in torch.load('trained.pt').items() if not k.startswith('layer4.')}\n"
        "        model.load_state_dict(state, strict=False)\n"
        "    return model\n"
    )
    told = "filled by the model's own code: conv1.0, conv1.3, conv1.6, layer1.0.conv1 and 7 more; if they are trained"
    status, out, _ = command("own.py:network", *QUICK, "--out", "net/")
    assert (status, told in out) == (0, True)
    assert "These weights were read from own.py:network" in (tmp_path / "net" / "README.md").read_text(encoding="utf-8")
    for apart in (["--model-arg", "load=False"], ["--base", "orthogonal"], ["--include", "layer4.*"]):
        status, out, _ = command("own.py:network", *apart, *QUICK)
        assert (status, "own code" in out) == (0, False)
    status, out, _ = command("own.py:network", "--dry-run")
    assert (status, told in out) == (0, True)


def test_what_a_models_own_code_loads_by_transformers_is_told(command, tmp_path):
    """It builds the model without data and sets the parameters, with no ``load_state_dict``."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "saved")
    (tmp_path / "own.py").write_text(
        "import torch, transformers\n"
        "def network(load=True):\n"
        "    cls = transformers.ResNetModel\n"
        "    body = cls.from_pretrained('saved') if load else cls(transformers.AutoConfig.from_pretrained('saved'))\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), body)\n"
    )
    status, out, _ = command("own.py:network", "--dry-run")
    assert (status, "own code: 1.embedder.embedder.convolution, " in out, "and 4 more; if they are" in out) == (0, 1, 1)
    status, out, _ = command("own.py:network", "--model-arg", "load=False", "--dry-run")
    assert (status, "own code" in out) == (0, False)


def test_transformers_loads_a_folder_of_its_own(command, tmp_path):
    transformers = pytest.importorskip("transformers")
    status, _, err = command(*CLASS, *QUICK, "--out", "net/")
    assert (status, err) == (0, "")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "net")
    assert matched(model, tmp_path / "net" / "model.safetensors") == (50, 50, 50)
    assert model.config.num_labels == 3
    assert command("net", "--like", "net", *QUICK, "--out", "again/")[0] == 0  # from those weights
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "These weights were read from net" in card
    assert "trained" not in card.replace("from_pretrained", "")
    assert command("net", "--like", "net", "--base", "orthogonal", *QUICK, "--out", "drawn/")[0] == 0
    card = (tmp_path / "drawn" / "README.md").read_text(encoding="utf-8")
    assert "read from net, whose convolutions, drawn anew by orthogonal with seed 0, were\ndecorrelated" in card
    assert "**not trained**" not in card  # the rest of them may be
    status, _, err = command("net", *QUICK, "--out", "third/")
    assert (status, "expected a model for a folder, got the weights 'net': --like" in err) == (2, True)


def test_a_folder_that_is_there_is_not_replaced(command, tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "net").mkdir()
    for options, advice in (([], "choose another name"), (["--force"], "a whole folder is not replaced")):
        status, _, err = command("timm:resnet10t", *QUICK, *options, "--out", "net/")
        assert (status, advice in err) == (2, True)
    sweep = ["timm:resnet10t", "--seeds", "0:2", "--steps", "1", "--out", "net{seed}/"]
    (tmp_path / "net1").mkdir()
    status, out, _ = command(*sweep)
    assert (status, out.splitlines()[-1]) == (0, "2 runs: 1 done, 1 kept")  # --force would not redo it
    assert (tmp_path / "net0" / "config.json").is_file()
    status, _, err = command("cifar_resnet18", *QUICK, "--out", "other/")
    assert (status, "expected a model of timm or transformers" in err) == (2, True)
    status, _, err = command("timm:resnet10t", *QUICK, "--out", "missing/net/")
    assert (status, "expected an existing folder to write to" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--prefix", "p."], "name a file"),
        (["--convs-only"], "name a file"),
        (["--without", "fc.*"], "name a file"),
        (["--head", "drop"], "--num-classes N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_folder_that_would_not_load_whole_is_refused(options, advice, command, tmp_path):
    (tmp_path / "net.py").write_text("raise SystemExit('it runs the code')\n")
    status, out, err = command("net.py:net", *options, "--out", "net/")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"Error: {options[0]}")
    assert f": expected a folder of all weights, for from_pretrained: {advice}" in err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_command_writes_the_same_folder(suffix, command, tmp_path):
    pytest.importorskip("timm")
    for name in ("one", "two"):
        arguments = ["--out", f"{name}/", "--plot", f"{name}.{suffix}"]
        assert command("timm:resnet10t", "--include", "conv1.*", *QUICK, *arguments)[0] == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert b"no checkpoint written" not in one["README.md"]
    assert not re.search(rb"[0-9] s\b", one["README.md"])


def test_a_built_in_model_is_not_its_folder(command, tmp_path):
    pytest.importorskip("timm")
    assert command("timm:resnet18", *QUICK, "--out", "resnet18/")[0] == 0
    status, _, err = command("resnet18", "--num-classes", "7", "--dry-run")
    assert (status, err) == (0, "")
    status, _, err = command("./resnet18", "--num-classes", "7", "--dry-run")
    assert (status, "a file has its weights already" in err) == (2, True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_is_whole_or_not_there(error, command, tmp_path, monkeypatch):
    pytest.importorskip("timm")

    def fail(*_):
        raise error

    monkeypatch.setattr(source, "_card", fail)
    status, _, err = command("timm:resnet10t", *QUICK, "--out", "net/")
    assert status == (1 if isinstance(error, OSError) else 130)
    assert "nothing changed there" in err or "no partial file is left" in err
    assert list(tmp_path.iterdir()) == []


def test_what_appears_during_the_run_is_kept(command, tmp_path, monkeypatch):
    pytest.importorskip("timm")

    def appear(*_):
        (tmp_path / "net").mkdir()
        (tmp_path / "net" / "file").touch()
        return ""

    monkeypatch.setattr(source, "_card", appear)
    status, _, err = command("timm:resnet10t", *QUICK, "--out", "net/")
    assert (status, "'net' exists already" in err) == (2, True)
    assert [path.name for path in (tmp_path / "net").iterdir()] == ["file"]
