"""What a module is made of, also where its class calls something else by the names of PyTorch's methods."""

import pytest
import torch
from torch import nn

import convsim_init as ci
from convsim_init.initialize import plan
from convsim_init.layers import tree
from convsim_init.metrics.compare import compare

NAMES = ("named_modules", "modules", "named_parameters", "parameters", "named_buffers", "buffers", "named_children")
TWICE = ("named_modules", "named_parameters", "named_buffers")  # can name what has several names


def network(kind: type[nn.Module] = nn.Module) -> nn.Module:
    """A network with modules, parameters and buffers that have several names, and a child that is None."""
    torch.manual_seed(0)
    model = kind()
    model.stem, model.none = nn.Conv2d(3, 8, 3, padding=1), None
    model.body = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    model.again, model.twin = model.body[1], nn.Conv2d(8, 8, 3, padding=1)
    model.twin.weight, model.body[2].running_mean = model.body[1].weight, model.body[0].running_mean
    model.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    return model


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in NAMES), *((name, {"remove_duplicate": False}) for name in TWICE)]
)
def test_it_is_what_torch_says(name, options):
    model = network()
    found, expected = list(getattr(tree, name)(model, **options)), list(getattr(model, name)(**options))
    assert len(found) == len(expected) > 0
    if isinstance(found[0], tuple):
        assert [key for key, _ in found] == [key for key, _ in expected]
        found, expected = ([value for _, value in each] for each in (found, expected))
    assert all(a is b for a, b in zip(found, expected, strict=True))


def forward(self, x):
    return self.normed(self.twin(self.again(self.body(self.stem(x)))))


@pytest.mark.parametrize(
    ("inside", "value"),
    [(False, ["conv"]), (True, lambda self, width, depth: 1 / 0)],
    ids=["a list", "inside a method"],
)
@pytest.mark.parametrize("name", [*NAMES, "children"])
def test_a_class_may_call_something_else_like_that(name, value, inside, tmp_path):
    def build(**names):
        model = network(type("Net", (nn.Module,), {"forward": forward} | names))
        return nn.Sequential(model, nn.Conv2d(8, 4, 3)) if inside else model

    model, path, batch = build(**{name: value}), tmp_path / "a.safetensors", torch.randn(2, 3, 8, 8)
    for report in (plan, ci.measure, ci.initialize_):
        found, expected = report(model), report(build())
        assert [(layer.name, layer.outcome, layer.reason) for layer in found.layers] == [
            (layer.name, layer.outcome, layer.reason) for layer in expected.layers
        ]
        assert found.remarks == expected.remarks
    ci.ConvolutionalSimilarity(model)().backward()
    ci.calibrate_(model, batch)
    assert "stem" in str(ci.measure_feature_correlation(model, batch))
    ci.save_checkpoint(model, path)
    assert ci.load_checkpoint(build(**{name: value}), path).exact
    assert compare([("a", model), ("b", build(**{name: value}))]).layers
    with ci.initializing():
        build(**{name: value})(batch)
