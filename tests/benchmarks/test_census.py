"""The census would see what it looks for."""

import argparse
from importlib import import_module

import naive
import pytest
import torch
from torch import nn

import convsim_init as ci
from benchmarks.coverage import normalizations, outside
from benchmarks.coverage.sources import SOURCES
from benchmarks.coverage.sources.architecture import Architecture, noise

pytest.importorskip("timm")
pytest.importorskip("transformers")
census = import_module("benchmarks.coverage.__main__")

OPTIONS = argparse.Namespace(largest=60, steps=2)
INITIALIZE = ci.initialize_


def named(name):
    library = name.partition(":")[0]
    return next(one for one in SOURCES[library]() if one.name == name)


def spoiled(change):
    """`initialize_`, and something else that it should not do."""

    def initialize(model, **options):
        report = INITIALIZE(model, **options)
        with torch.no_grad():
            change(model)
        return report

    return initialize


@pytest.mark.parametrize(
    "name",
    [
        *("timm:test_resnet", "timm:test_convnext", "torchvision:squeezenet1_1"),
        *("torchvision-tasks:lraspp_mobilenet_v3_large", "transformers:PPLCNetBackbone", "cleanrl:impala"),
    ],
)
def test_a_model_passes(name):
    row = census.examine(named(name), OPTIONS)
    assert row["outcome"] == "passed", row["detail"]
    assert row["layers"] >= row["treated"] > 0
    assert row["seen"] > 0


def test_models_that_are_left_out():
    small = argparse.Namespace(largest=0.01, steps=2)
    assert census.examine(named("timm:test_resnet"), small)["outcome"] == "too large"
    plain = Architecture("own:linear", lambda: nn.Linear(2, 2), lambda model: [(noise(1, 2),)])
    assert census.examine(plain, OPTIONS)["outcome"] == "no convolution"


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda model: model.conv1[0].weight.mul_(1.01), "norms of conv1.0 changed"),
        (lambda model: model.fc.weight.mul_(2), "other entries changed"),
        (lambda model: model.conv1[0].weight.fill_(float("nan")), "the forward pass is not finite"),
        (lambda model: model.fc.bias.fill_(float("inf")), "other entries changed"),
        (lambda model: nn.init.orthogonal_(model.conv1[0].weight), "conv1.0: the convolution was given a weight of"),
    ],
    ids=["norms", "classifier", "nan", "infinite", "another weight"],
)
def test_a_model_fails(monkeypatch, change, detail):
    monkeypatch.setattr(ci, "initialize_", spoiled(change))
    row = census.examine(named("timm:test_resnet"), OPTIONS)
    assert row["outcome"] == "failed"
    assert detail in row["detail"]


def test_a_report_that_lies(monkeypatch):
    def initialize(model, **options):
        report = INITIALIZE(model, **options)
        report.layers[3].after["normalized_similarity"] *= 1.02
        return report

    monkeypatch.setattr(ci, "initialize_", initialize)
    row = census.examine(named("timm:test_resnet"), OPTIONS)
    assert row["outcome"] == "failed"
    assert "the convolution was given a weight of similarity" in row["detail"]


@pytest.mark.parametrize(
    ("shape", "groups", "transposed"),
    [
        ((4, 3, 3, 2), 1, False),
        ((4, 3, 3, 3), 2, False),
        ((4, 3, 5), 2, True),
        ((6, 2, 2, 1, 3), 3, False),
        ((5, 3, 1, 1), 1, False),
    ],
)
def test_the_measure_from_outside(shape, groups, transposed):
    weight = torch.randn(shape, dtype=torch.float64)
    weight[0] = 0
    seen = outside.look_at(weight, groups=groups, transposed=transposed)
    for channels in ("matched", "all"):
        expected = naive.convolutional_similarity(
            weight, groups=groups, transposed=transposed, normalized=True, channels=channels
        )
        assert seen.similarity[channels] == pytest.approx(float(expected), rel=1e-12)


def test_every_convolution_is_seen():
    """In a module that runs, in TorchScript, and where another module takes its weight."""

    class Borrowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.lent = nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 3)
            self.traced = torch.jit.script(nn.Conv1d(2, 2, 1))

        def forward(self, x):
            return self.traced(nn.functional.conv_transpose1d(self.own(x), self.lent.weight))

    model, watch = Borrowing(), outside.Watch()
    with torch.no_grad(), watch.over(model, ["own", "lent", "traced"]):
        model(noise(1, 2, 9))
    assert watch.seen.keys() == {"own", "lent", "traced"}
    assert watch.seen["lent"].norms.shape == (1, 2)


def test_tables_are_kept(tmp_path):
    table = tmp_path / "census" / "own.csv"
    row = dict.fromkeys(census.FIELDS, "") | {"model": "own:a", "outcome": "too large", "parameters": 70_000_000}
    census.write(table, [row])
    [kept] = census.read(table)
    assert kept["model"] == "own:a"
    assert not census.to_do_again(kept, argparse.Namespace(largest=60, again=False))
    assert census.to_do_again(kept, argparse.Namespace(largest=80, again=False))


class Branching(nn.Module):
    """Two convolutions, a normalization behind one of them, and a shape that decides."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError("three channels")
        y = torch.zeros_like(x[:, :1]).expand(-1, 4, -1, -1)[:, :, 2:, 2:].clone()
        y += self.first(x)
        return self.last(self.norm(y))


def test_what_is_told_of_normalizations_is_held_to_a_real_pass(monkeypatch):
    network = Architecture("own:branching", Branching, lambda model: [(noise(1, 2, 8, 8),), (noise(1, 3, 8, 8),)])
    assert normalizations.examine(network, 1e6) == ({"right": 2}, [])
    monkeypatch.setattr(normalizations, "normalization_follows", lambda model: {"first": False})
    counts, lines = normalizations.examine(network, 1e6)
    assert counts == {"wrong": 1, "unknown": 1}
    assert sorted(lines) == ["first is wrong: False, really True", "last is unknown: None, really False"]
    with pytest.raises(ValueError, match="too large"):
        normalizations.examine(network, 1)
