"""Convolutions that are calls in a graph, of TorchScript and of exported programs, are treated as modules are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convsim_init as ci

pytestmark = [  # TorchScript is deprecated, and torch calls something deprecated of its own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QUICK = ci.Settings(steps=4, channels="matched")
INPUT = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))


class Centred(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.ones(4, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel, groups=4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.ConvTranspose2d(8, 4, 3, groups=2), Blur(), nn.BatchNorm2d(4))
    circular = nn.Conv2d(4, 6, (3, 1), padding=1, padding_mode="circular")
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), inner, Centred(4, 4, 3), circular).eval()


def reloaded(model, tmp_path):
    torch.jit.script(model).save(tmp_path / "a.pt")
    return torch.jit.load(tmp_path / "a.pt")


GRAPHS = {
    "script": lambda model, _: torch.jit.script(model),
    "trace": lambda model, _: torch.jit.trace(model, INPUT),
    "loaded": reloaded,
    "export": lambda model, _: torch.export.export(model, (INPUT,)).module(),
    "decomposed": lambda model, _: torch.export.export(model, (INPUT,)).run_decompositions().module(),
}
FROZEN = {
    "frozen": lambda model: torch.jit.freeze(torch.jit.script(model)),
    "optimized": lambda model: torch.jit.optimize_for_inference(torch.jit.script(model)),
}


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("kind", GRAPHS)
def test_weights_that_are_parameters_are_treated_as_in_the_module(kind, part, tmp_path):
    twin = network()
    expected = {layer.name: layer for layer in ci.initialize_(twin, settings=QUICK).layers}
    graph = GRAPHS[kind](network(), tmp_path)
    prefix = "1." if part else ""
    report = ci.initialize_(nn.Sequential(nn.Conv2d(4, 4, 1), graph) if part else graph, settings=QUICK)

    names = [f"{prefix}{name}" for name in ("0", "1.0", "2", "3")]
    assert [layer.name for layer in report.layers] == (["0"] if part else []) + names
    assert not any("not looked at" in remark for remark in report.remarks)
    for layer in report.layers[part:]:
        module = expected[layer.name.removeprefix(prefix)]
        assert layer.shape == module.shape
        if module.name == "2":
            assert (layer.outcome, layer.after) == (ci.Outcome.SKIPPED, {})
            assert "its graph computes the weight" in layer.reason
        else:
            assert (layer.kind, layer.outcome, layer.after) == (module.kind, module.outcome, module.after)
    with torch.no_grad():
        twin[2].weight.copy_(network()[2].weight)
        torch.testing.assert_close(graph(INPUT), twin(INPUT))


@pytest.mark.parametrize("kind", FROZEN)
def test_constants_are_measured_but_left_alone_with_the_reason(kind):
    graph = FROZEN[kind](network())
    model = nn.Sequential(nn.Conv2d(4, 4, 1), graph)
    before = graph(INPUT)
    report = ci.initialize_(model, settings=QUICK)
    assert [layer.outcome.value for layer in report.layers] == ["initialized", *["skipped"] * (len(report.layers) - 1)]
    assert {"1.0", "1.1.0", "1.3"} < {layer.name for layer in report.layers}
    assert all("before it is frozen" in layer.reason for layer in report.layers[1:])
    assert torch.equal(graph(INPUT), before)
    by_name = {layer.name: layer for layer in ci.measure(graph).layers}
    expected = ci.measure(network()).layers[0].before
    assert by_name["0"].before["normalized_similarity"] == pytest.approx(expected["normalized_similarity"], rel=1e-5)


def test_patterns_and_frozen_parameters_count_in_graphs_too():
    model = network()
    model[0].requires_grad_(False)
    graph = torch.jit.script(model)
    reasons = {layer.name: layer.reason for layer in ci.initialize_(graph, exclude=["1.*"], settings=QUICK).layers}
    assert (reasons["0"], reasons["1.0"], reasons["3"]) == ("frozen: requires_grad is False", "excluded", None)


def test_a_list_without_a_forward_pass_is_looked_into():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])

        def forward(self, x):
            for part in self.parts:
                x = part(x)
            return x

    graph = torch.jit.script(Listed())
    assert [layer.name for layer in ci.measure(graph).layers] == ["parts.0", "parts.1"]
    assert [layer.name for layer in ci.measure(graph.parts).layers] == ["0", "1"]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda model: ci.ConvolutionalSimilarity(model).layers, id="regularizer"),
        pytest.param(lambda model: list(ci.measure_feature_correlation(model, INPUT)), id="on data"),
    ],
)
def test_what_needs_modules_says_so(call):
    graph = torch.jit.script(network())
    with pytest.raises(ci.InputError, match="TorchScript or an exported program pass the model that it was made from"):
        call(graph)
    assert call(nn.Sequential(nn.Conv2d(4, 4, 1), graph)) == ["0"]


def test_arguments_may_be_given_by_name():
    class Named(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return torch.ops.aten.conv2d.default(input=x, weight=self.weight, groups=2)

    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    graph = torch.fx.symbolic_trace(nn.Sequential(Named(model[0].weight)))
    (layer,), (expected,) = ci.measure(graph).layers, ci.measure(model).layers
    assert (layer.name, layer.kind, layer.before) == ("0", "Conv2d", expected.before)


def test_a_graph_without_convolutions_has_none():
    with pytest.raises(ci.InputError, match="has none"):
        ci.measure(torch.jit.script(nn.Sequential(Blur(), nn.Linear(2, 2))))


def test_a_weight_that_another_convolution_computes_is_of_no_layer():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.kernel = nn.BatchNorm2d(3), nn.Parameter(torch.randn(12, 3, 3, 3))
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            weight = F.conv2d(self.norm(x[..., :3, :3]), self.kernel).view(4, 3, 1, 1)
            return self.last(F.conv2d(x, weight))

    model, x = Dynamic().eval(), torch.randn(1, 3, 8, 8)
    for graph in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        assert [layer.name for layer in ci.measure(graph).layers] == ["last"]


@pytest.mark.parametrize("kind", GRAPHS)
def test_padding_may_be_a_word(kind, tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    expected, found = (ci.measure(source).layers for source in (model, GRAPHS[kind](model, tmp_path)))
    assert [(layer.name, layer.kind, layer.shape, layer.before) for layer in found] == [
        (layer.name, layer.kind, layer.shape, layer.before) for layer in expected
    ]
