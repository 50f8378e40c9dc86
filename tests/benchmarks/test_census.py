"""The census would see what it looks for."""

import argparse
from importlib import import_module

import pytest
import torch

import convsim_init as ci

pytest.importorskip("timm")
census = import_module("benchmarks.coverage.__main__")

OPTIONS = argparse.Namespace(largest=60, steps=2)


def spoiled(change):
    """`initialize_`, and something else that it should not do."""

    def initialize(model, **options):
        report = INITIALIZE(model, **options)
        with torch.no_grad():
            change(model)
        return report

    return initialize


INITIALIZE = ci.initialize_


@pytest.mark.parametrize("model", ["timm:test_resnet", "timm:test_convnext", "torchvision:squeezenet1_1"])
def test_a_model_passes(model):
    row = census.examine(model, OPTIONS)
    assert row["outcome"] == "passed", row["detail"]
    assert row["layers"] >= row["treated"] > 0


def test_models_that_are_left_out():
    assert census.examine("timm:test_resnet", argparse.Namespace(largest=0.01, steps=2))["outcome"] == "too large"


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda model: model.conv1[0].weight.mul_(1.01), "norms changed"),
        (lambda model: model.fc.weight.mul_(2), "other entries changed"),
        (lambda model: model.conv1[0].weight.fill_(float("nan")), "norms changed"),
        (lambda model: model.fc.bias.fill_(float("inf")), "other entries changed"),
    ],
    ids=["norms", "classifier", "nan", "infinite"],
)
def test_a_model_fails(monkeypatch, change, detail):
    monkeypatch.setattr(ci, "initialize_", spoiled(change))
    row = census.examine("timm:test_resnet", OPTIONS)
    assert row["outcome"] == "failed"
    assert detail in row["detail"]
