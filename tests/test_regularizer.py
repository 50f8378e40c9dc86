"""The regularization term: the definition's value and gradient, for the weights that are used; and training with it."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.parametrize import register_parametrization

import convsim_init as ci
from convsim_init.backends import gpu
from convsim_init.backends.gradient import Layout, summed_similarity
from convsim_init.settings import SWITCH

CHOICES = list(itertools.product(["all", "adjacent"], ["matched", "all"]))
choices = pytest.mark.parametrize(("pairs", "channels"), CHOICES)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def compiled_or_not(request, monkeypatch):
    if not request.param:
        monkeypatch.setenv(SWITCH, "0")


@choices
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (8, 3, 2, 5), (6, 4, 1, 1), (4, 2, 4), (4, 3, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("compiled_or_not")
def test_its_similarity_is_the_definition(shape, groups, normalized, pairs, channels, dtype):
    assert_is_the_definition(shape, groups, normalized, pairs, channels, dtype)


def assert_is_the_definition(shape, groups, normalized, pairs, channels, dtype):
    weight = torch.randn(2 * shape[0], *shape[1:], dtype=dtype, requires_grad=True)
    actual = summed_similarity([weight], [Layout(groups)], pairs, channels, normalized=normalized)
    expected = ci.convolutional_similarity(weight, groups=groups, pairs=pairs, channels=channels, normalized=normalized)
    torch.testing.assert_close(actual, expected)
    (gradient,), (wanted,) = (torch.autograd.grad(3 * value, weight) for value in (actual, expected))
    units = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, wanted, rtol=units, atol=units * max(1, float(wanted.abs().max())))


@choices
@pytest.mark.parametrize("normalized", [False, True])
def test_gradcheck(pairs, channels, normalized):
    weights = [torch.randn(4, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    layouts = [Layout(2), Layout(2, transposed=True)]
    assert torch.autograd.gradcheck(
        lambda *ws: summed_similarity(ws, layouts, pairs, channels, normalized=normalized),
        weights,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("normalized", [False, True])
def test_a_layer_of_several_blocks(normalized, monkeypatch):
    monkeypatch.setattr("convsim_init.backends.torch_ops.CACHED", 1)
    assert_is_the_definition((4, 3, 3, 3), 2, normalized, "all", "matched", torch.float64)


@choices
@pytest.mark.parametrize("scale", [1, 1e-41, 1e-25, 1e25, 0])
@pytest.mark.usefixtures("compiled_or_not")
def test_filters_of_very_different_norms(scale, pairs, channels):
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((6, 3, 3, 3), (4, 5, 3, 3), (4, 2, 3, 3))]
    weights[1][2] *= scale
    used = [weight.float().requires_grad_() for weight in weights]
    layouts = [Layout(2), Layout(), Layout(2, transposed=True)]
    actual = summed_similarity(used, layouts, pairs, channels, normalized=True)
    expected = sum(
        ci.convolutional_similarity(w, **layout._asdict(), pairs=pairs, channels=channels, normalized=True)
        for w, layout in zip(used, layouts, strict=True)
    )
    torch.testing.assert_close(actual, expected)
    gradients, wanted = torch.autograd.grad(actual, used), torch.autograd.grad(expected, used)
    keep = torch.arange(4) != 2  # the definition's gradient is not finite for all scales
    torch.testing.assert_close((gradients[0], gradients[2]), (wanted[0], wanted[2]))
    torch.testing.assert_close(gradients[1][keep], wanted[1][keep])


@pytest.mark.parametrize("normalized", [False, True])
def test_defaults_of_the_caller_do_not_matter(normalized):
    weights = [torch.randn(6, 3, 3, 3, requires_grad=True), torch.randn(4, 5, 3, 3, requires_grad=True)]

    def gradients():
        value = summed_similarity(weights, [Layout(), Layout()], "all", "matched", normalized=normalized)
        return [value, *torch.autograd.grad(value, weights)]

    expected = gradients()
    former = torch.get_default_dtype()
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                found = gradients()
        finally:
            torch.set_default_dtype(former)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("error:.*(cache|not know how to trace)")
def test_a_compiled_training_step_can_hold_it(backend):
    model = nn.Sequential(nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 8, 3, groups=2))
    model.append(parametrizations.weight_norm(nn.Conv2d(8, 8, 1, groups=2)))
    term, x = ci.ConvolutionalSimilarity(model, normalized=True), torch.randn(2, 3, 9, 9)

    def loss():
        return model(x).square().mean() + 2 * term()

    compiled = torch.compile(loss, backend=backend)
    expected, found = (torch.autograd.grad(one(), list(model.parameters())) for one in (loss, compiled))
    torch.testing.assert_close(found, expected)


def test_filters_that_are_zero_have_no_gradient_and_harm_none():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    weight[2] = 0
    weight.requires_grad_()
    actual = summed_similarity([weight], [Layout()], "all", "matched", normalized=True)
    torch.testing.assert_close(actual, ci.convolutional_similarity(weight, normalized=True))
    (gradient,) = torch.autograd.grad(actual, weight)
    assert gradient.isfinite().all()
    (wanted,) = torch.autograd.grad(ci.convolutional_similarity(weight, normalized=True), weight)
    torch.testing.assert_close(gradient[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])


def test_a_second_derivative_is_refused_rather_than_wrong():
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    value = summed_similarity([weight], [Layout()], "all", "matched", normalized=False)
    for loss in (value, value * weight.sum(), value + weight.pow(4).sum()):
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(gradient.square().sum(), weight, retain_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward(retain_graph=True)


def test_what_inference_mode_made_is_no_obstacle_to_training():
    weight = torch.randn(4, 3, 7, 6, requires_grad=True)  # of a size that no other test has
    with torch.inference_mode():
        expected = ci.convolutional_similarity(weight)
    for value in (
        ci.convolutional_similarity(weight),
        summed_similarity([weight], [Layout()], "all", "all", normalized=False),
    ):
        value.backward()
    torch.testing.assert_close(ci.convolutional_similarity(weight), expected)


@pytest.mark.parametrize("layout", [Layout(), Layout(1, transposed=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_in_any_order_of_memory(layout, dtype):
    storage = torch.randn(5, 4, 6, dtype=dtype)
    for order in itertools.permutations(range(3)):
        weight = storage.permute(order)
        for used in (weight, weight[::2], weight[:1].expand(3, -1, -1)):
            actual = summed_similarity([used], [layout], "all", "matched", normalized=True)
            torch.testing.assert_close(actual, ci.convolutional_similarity(used, **layout._asdict(), normalized=True))


def test_a_weight_may_change_before_the_backward_pass():
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    value = summed_similarity([weight], [Layout()], "all", "matched", normalized=False)
    (wanted,) = torch.autograd.grad(value, weight, retain_graph=True)
    with torch.no_grad():
        weight.zero_()
    (found,) = torch.autograd.grad(value, weight)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.usefixtures("compiled_or_not")
def test_views_that_are_negated_where_they_are_read(normalized):
    weights = [torch.randn(4, 2, 3, 3, requires_grad=True) for _ in range(2)]
    layouts = [Layout(), Layout()]
    wanted = summed_similarity([-weight for weight in weights], layouts, "all", "matched", normalized=normalized)
    found = summed_similarity(
        [torch._neg_view(weight) for weight in weights], layouts, "all", "matched", normalized=normalized
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights))


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.square().mean((1, 2, 3), keepdim=True).sqrt(), self.bias)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def mixed():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 4, (1, 3), groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 1, 1),
        nn.Conv1d(3, 5, 4),
    )
    return model.double()


@choices
@pytest.mark.parametrize("normalized", [False, True])
def test_the_sum_over_layers_and_its_gradient(pairs, channels, normalized):
    model = mixed()
    options = {"pairs": pairs, "channels": channels, "normalized": normalized}
    term = ci.ConvolutionalSimilarity(model, **options)
    assert set(term.skipped) == ({"3", "4"} if channels == "matched" else {"4"})
    expected = sum(
        ci.convolutional_similarity(
            model[int(name)].weight, groups=model[int(name)].groups, transposed=model[int(name)].transposed, **options
        )
        for name in term.layers
    )
    actual = term()
    torch.testing.assert_close(actual, expected)
    weights = [model[int(name)].weight for name in term.layers]
    gradients = torch.autograd.grad(actual, weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, weights))


def parametrized():
    layer = nn.Conv2d(3, 6, 3)
    register_parametrization(layer, "weight", Doubled())
    return layer


USED = {
    "parametrized": (parametrized, lambda m: m.weight),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), lambda m: m.weight),
    "old weight norm": (lambda: weight_norm(nn.Conv2d(3, 6, 3)), lambda m: m.weight),
    "standardized": (
        lambda: Standardized(3, 6, 3),
        lambda m: F.layer_norm(m.weight, m.weight.shape[1:], eps=0),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("build", "used"), USED.values(), ids=USED.keys())
def test_what_counts_is_the_weight_that_is_used(build, used):
    model = build().double()
    model(torch.zeros(1, 3, 4, 4, dtype=torch.float64))  # the old weight_norm computes its weight in here
    actual, expected = ci.ConvolutionalSimilarity(model)(), ci.convolutional_similarity(used(model))
    torch.testing.assert_close(actual, expected)
    parameters = [p for p in model.parameters() if p.dim() > 1]
    gradients = torch.autograd.grad(actual, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters))


def test_spectral_norm_is_read_without_a_power_iteration():
    layer = parametrizations.spectral_norm(nn.Conv2d(3, 6, 3))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    ci.ConvolutionalSimilarity(layer)().backward()
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert layer.training
    assert layer.parametrizations.weight.original.grad.any()


def test_layers_left_out_say_why():
    model = mixed()
    model[0].weight.requires_grad_(False)
    model[1].weight = nn.Parameter(torch.empty(model[1].weight.shape, device="meta"))
    term = ci.ConvolutionalSimilarity(model, exclude=["5"])
    assert term.layers == ["2"]
    assert term.skipped == {
        "0": "frozen: requires_grad is False",
        "1": "on the meta device, without data: move it with to_empty and initialize it first",
        "3": "one filter per group shares its channels with no other",
        "4": "only one filter",
        "5": "excluded",
    }


def test_a_shared_weight_counts_once():
    conv = nn.Conv2d(4, 4, 3)
    twin = nn.Conv2d(4, 4, 3)
    twin.weight = conv.weight
    term = ci.ConvolutionalSimilarity(nn.Sequential(conv, twin))
    torch.testing.assert_close(term(), ci.convolutional_similarity(conv.weight))


def test_a_weight_put_in_its_place_counts():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    term = ci.ConvolutionalSimilarity(model)
    model.load_state_dict({"0.weight": torch.zeros(4, 3, 3, 3), "0.bias": torch.zeros(4)}, assign=True)
    assert term() == 0


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Conv2d(3, 1, 3), {}, "a convolution to regularize, got none: .the model itself.: only one filter"),
        (nn.Linear(3, 1), {}, "a model with convolutions, got Linear"),
        (nn.Conv2d(3, 4, 3), {"pairs": "some"}, "expected pairs to be one of"),
        (nn.Conv2d(3, 4, 3), {"channels": "some"}, "expected channels to be one of"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {"include": ["x"]}, "include: no convolution matches 'x'"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ci.InputError, match=message):
        ci.ConvolutionalSimilarity(model, **options)


@pytest.mark.parametrize("normalized", [False, True])
def test_training_with_it_lowers_the_similarity(normalized):
    images = torch.randn(16, 1, 8, 8)

    def trained(weight):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        term = ci.ConvolutionalSimilarity(model, normalized=normalized)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for _ in range(50):
            loss = (model(images) - 1).square().mean() + weight * term()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return term().item()

    assert trained(1.0) < 0.8 * trained(0.0)


def test_under_autocast_it_is_computed_in_full_precision():
    model = nn.Conv2d(8, 16, 3)
    term = ci.ConvolutionalSimilarity(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = term()
    torch.testing.assert_close(actual, ci.convolutional_similarity(model.weight))


def test_half_precision_passes_gradients_of_its_own_dtype():
    model = nn.Conv2d(8, 16, 3).to(torch.bfloat16)
    term = ci.ConvolutionalSimilarity(model)()
    torch.testing.assert_close(term, ci.convolutional_similarity(model.weight))
    term.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.bfloat16


def test_under_distributed_data_parallel_every_process_adds_the_same_gradient(tmp_path):
    images = torch.randn(4, 3, 8, 8)

    def gradients(wrap):
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
        (model(images).square().mean() + ci.ConvolutionalSimilarity(model)()).backward()
        return [p.grad for p in model.parameters()]

    expected = gradients(lambda model: model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(gradients(nn.parallel.DistributedDataParallel), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.channels_last),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_the_same_also_in_a_captured_training_step(dtype, memory_format, normalized):
    layers = nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 12, 3, groups=2), nn.Conv2d(12, 8, 5), nn.Conv2d(8, 8, 1)
    model = nn.Sequential(*layers).to(dtype)
    exact = copy.deepcopy(model).double()
    model.to("cuda", memory_format=memory_format)
    wanted = ci.ConvolutionalSimilarity(exact, normalized=normalized)()
    wanted.backward()
    term, images = ci.ConvolutionalSimilarity(model, normalized=normalized), torch.randn(2, 3, 16, 16).to("cuda", dtype)
    assert gpu.fits(torch.Size([1, 16, 3, 3, 3]), torch.float32, torch.device("cuda", 0), "all", "matched")

    def step() -> torch.Tensor:
        model.zero_grad()
        total = term()
        (total + 0 * model(images).sum()).backward()
        return total

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # as torch.cuda.graph wants its first runs
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    graph.replay()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(wanted.item(), rel=1e-4)
    for found, expected in zip(model.parameters(), exact.parameters(), strict=True):
        if expected.grad is not None:
            error = 1e-4 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(found.grad.cpu().double(), expected.grad, rtol=error, atol=error)


def test_a_weight_without_a_gradient_is_left_out():
    class Detaching(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, 2 * self.weight.detach(), self.bias)

    term = ci.ConvolutionalSimilarity(nn.Sequential(Detaching(3, 8, 3), nn.Conv2d(8, 4, 3)))
    assert (term.layers, list(term.skipped)) == (["1"], ["0"])
    assert term.skipped["0"] == "no gradient leads from the weight that is used to a parameter"
