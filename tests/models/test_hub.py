"""Models that a config of Hugging Face describes are built from it, and described again."""

import json

import pytest
import torch

import convsim_init as ci
from convsim_init.models.hub import describe

RESNET = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic"}
CLASS = "transformers:ResNetForImageClassification"


@pytest.fixture
def transformers_folder(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(describe(ci.build_model(CLASS, num_classes=5, **RESNET)))
    return tmp_path


@pytest.fixture
def timm_folder(tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "config.json").write_text(describe(ci.build_model("timm:resnet10t", num_classes=5, in_chans=1)))
    return tmp_path


def assert_equal(one, other):
    assert type(one) is type(other)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_class_of_transformers_is_built_by_its_config():
    pytest.importorskip("transformers")
    model = ci.build_model(CLASS, num_classes=5, in_chans=1, **RESNET)
    assert model.config.num_labels == model.classifier[1].out_features == 5
    assert model.config.num_channels == 1
    assert model.training
    assert_equal(model, ci.build_model(CLASS, num_classes=5, in_chans=1, **RESNET))


def test_a_folder_of_transformers(transformers_folder):
    assert_equal(ci.build_model(str(transformers_folder)), ci.build_model(CLASS, num_classes=5, **RESNET))
    other = ci.build_model(str(transformers_folder), num_classes=3, hidden_act="gelu")
    assert (other.config.num_labels, other.config.hidden_act, other.config.depths) == (3, "gelu", [1, 1])


def test_a_folder_of_timm(timm_folder):
    model = ci.build_model("timm:resnet10t", num_classes=5, in_chans=1)
    assert_equal(ci.build_model(str(timm_folder)), model)
    assert ci.build_model(str(timm_folder), num_classes=3).num_classes == 3
    described = json.loads((timm_folder / "config.json").read_text())
    assert not {"tag", "license"} & described["pretrained_cfg"].keys()  # of weights that these are not


def test_a_config_in_the_cache(timm_folder, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "cache" / "models--me--net" / "snapshots" / "a1"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "models--me--net" / "refs").mkdir()
    (tmp_path / "cache" / "models--me--net" / "refs" / "main").write_text("a1")
    (timm_folder / "config.json").rename(snapshot / "config.json")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_equal(ci.build_model("hf-hub:me/net"), ci.build_model("timm:resnet10t", num_classes=5, in_chans=1))
    with pytest.raises(ci.InputError, match=r"run `hf download me/other config\.json` first"):
        ci.build_model("hf-hub:me/other")


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (CLASS, {"width": 3}, "expected an entry of its config, got width: leave it out"),
        (CLASS, {"depths": "two"}, "depths"),
        ("transformers:Trainer", {}, "of transformers with a config, such as ResNetModel, got 'Trainer'"),
        ("transformers:ResNetModl", {}, "got 'ResNetModl': did you mean ResNetModel"),
        ("transformers:resnet", {}, "got 'resnet': did you mean ResNetModel or ResNetBackbone"),
        ("transformers:me/net", {}, "got 'me/net': did you mean hf-hub:me/net"),
        ("transformers:", {}, "name a model"),
    ],
)
def test_what_describes_no_model_is_refused(spec, arguments, message):
    pytest.importorskip("transformers")
    with pytest.raises(ci.InputError, match=message):
        ci.build_model(spec, **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "expected the config of a model of transformers or timm"),
        ('{"name": "net"}', "expected the config of a model of transformers or timm"),
        ('{"model_type": "resnet"}', """got '': write it into config.json, such as "architectures": """),
        ('{"model_type": "resnet", "architectures": ["Own"]}', "names a class of transformers, got 'Own'"),
        ('{"model_type": "of my own", "architectures": ["Own"]}', "raised ValueError"),
        ('{"architecture": "of my own", "pretrained_cfg": {}}', "raised RuntimeError: Unknown model"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(content, message, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ci.InputError, match=message):
        ci.build_model(str(tmp_path))


def test_a_model_of_another_library_is_not_described():
    with pytest.raises(ci.InputError, match="expected a model of timm or transformers for a folder, got ResNet"):
        describe(ci.build_model("cifar_resnet18"))


def test_a_model_that_its_library_cannot_describe_is_refused_before_the_work(command):
    pytest.importorskip("timm")
    status, _, err = command("timm:resnet10t", "--model-arg", "features_only=True", "--out", "net/")
    assert (status, "got FeatureListNet, which cannot be described: AttributeError: " in err) == (2, True)


def test_a_models_folder_may_be_called_like_a_file(timm_folder):
    folder = timm_folder.rename(timm_folder.with_suffix(".ckpt"))
    assert type(ci.build_model(str(folder))).__name__ == "ResNet"
