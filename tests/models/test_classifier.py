"""The classifier of a model is what depends on the number of classes."""

import pytest
from torch import nn

import convsim_init as ci
from convsim_init.models.classifier import TRIED_CLASSES, classifier_keys, pointwise_convolutions

FACTORY = """
from torch import nn

def network(num_classes=11, width=4, model="small", spec="flat"):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, num_classes, 1, bias=False))

def fixed():
    return network()
"""


@pytest.mark.parametrize(
    ("spec", "keys"),
    [
        ("cifar_resnet18", ["fc.weight", "fc.bias"]),
        ("timm:resnet18", ["fc.weight", "fc.bias"]),
        ("torchvision:squeezenet1_1", ["classifier.1.weight", "classifier.1.bias"]),
        ("timm:deit_tiny_distilled_patch16_224", ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]),
    ],
)
def test_it_is_found(spec, keys):
    if ":" in spec:
        pytest.importorskip(spec.partition(":")[0])
    assert classifier_keys(ci.build_model(spec), spec) == keys


@pytest.mark.parametrize("num_classes", [None, *TRIED_CLASSES])
def test_it_is_found_whatever_the_number_of_classes_is(num_classes, tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY)
    options = {"num_classes": num_classes, "width": 6, "model": "large", "spec": "round"}  # named as parameters of ours
    spec = f"{tmp_path}/nets.py:network"
    assert classifier_keys(ci.build_model(spec, **options), spec, **options) == ["1.weight"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("fixed", "expected arguments that fit"), ("broken", "expected a model with outputs for a number of classes")],
)
def test_a_model_without_a_choice_of_classes_is_refused(name, message, tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY + "\ndef broken(num_classes=3):\n    return network()\n")
    spec = f"{tmp_path}/nets.py:{name}"
    with pytest.raises(ci.InputError, match=message):
        classifier_keys(ci.build_model(spec), spec)


def test_a_kernel_size_may_be_set_to_one_number():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    for convolution in model:
        convolution.kernel_size = convolution.kernel_size[0]
    assert pointwise_convolutions(model) == {"1"}
