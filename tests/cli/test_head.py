"""Files without the classifier, and classifiers that are convolutions."""

import json

import pytest
import torch
from safetensors.torch import load_file

import convsim_init as ci

QUICK = ["--steps", "2"]


def test_the_classifier_is_left_out_of_the_file(command, tmp_path):
    status, out, err = command("cifar_resnet18", *QUICK, "--head", "drop", "--out", "init.pt")
    assert (status, err) == (0, "")
    assert "left out of the file, for they depend on the number of classes: fc.weight, fc.bias" in out
    assert out.count("left out of the file") == 1
    state = torch.load(tmp_path / "init.pt", weights_only=True)
    model = ci.build_model("cifar_resnet18", num_classes=7)
    assert model.state_dict().keys() - state.keys() == {"fc.weight", "fc.bias"}
    loaded = ci.load_checkpoint(model, tmp_path / "init.pt")
    assert len(loaded.matched) == len(state)


def test_a_convolution_that_is_the_classifier_is_left_alone(command, tmp_path):
    pytest.importorskip("torchvision")
    status, out, err = command("torchvision:squeezenet1_1", *QUICK, "--json", "--out", "init.safetensors")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert [layer["name"] for layer in report["layers"] if layer["reason"] == "excluded"] == ["classifier.1"]
    assert "left alone, as linear classifiers are: classifier.1" in report["remarks"]
    own, written = ci.build_model("torchvision:squeezenet1_1").state_dict(), load_file(tmp_path / "init.safetensors")
    assert torch.equal(own["classifier.1.weight"], written["classifier.1.weight"])


def test_a_head_that_cannot_be_found_is_named_by_the_user(command, tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))\n"
    )
    status, _, err = command("nets.py:net", "--head", "drop", "--out", "init.pt")
    assert status == 2
    assert err.startswith("Error: --head drop: nets.py:net: expected arguments that fit ()")
    assert err.endswith(": name the entries, as --without 'fc.*' does\n")
    status, out, err = command("nets.py:net", *QUICK, "--without", "1.*", "--out", "init.pt")
    assert (status, err) == (0, "")
    assert "\nleft out of the file: 1.weight, 1.bias\n" in out
    assert torch.load(tmp_path / "init.pt", weights_only=True).keys() == {"0.weight", "0.bias"}
    (tmp_path / "two.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))\n"
    )
    left_out = ["--prefix", "m.", "--convs-only", "--without", "0.*"]
    status, out, err = command("two.py:net", *QUICK, *left_out, "--out", "convs.pt")
    assert (status, err) == (0, "")
    assert "\nleft out of the file: m.0.weight, m.0.bias, m.1.bias\n" in out
    assert torch.load(tmp_path / "convs.pt", weights_only=True).keys() == {"m.1.weight"}
    status, _, err = command("init.pt", "--head", "drop", "--out", "again.pt")
    assert (status, "a file alone does not say which entries are its classifier" in err) == (2, True)
    status, _, err = command("nets.py:net", "--without", "2.*", "--out", "again.pt")
    assert status == 2
    assert "expected a pattern that a key matches, got '2.*'; the keys are '0.weight', '0.bias'" in err
