"""Correlations of feature maps on data: against torch.corrcoef, and what must be as it was afterwards."""

import copy
import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import convsim_init as ci
from convsim_init.layers.forward.isolation import isolated
from convsim_init.metrics import observed
from convsim_init.metrics import observed as feature_maps


def reference(*outputs):
    """From feature maps ``[N, M, *positions]`` of every call, in float64."""
    values = torch.cat([maps.double().transpose(0, 1).flatten(1) for maps in outputs], dim=1)
    values = values[values.ne(values[:, :1]).any(1)]
    correlations = torch.corrcoef(values).abs()
    return ((correlations.sum() - correlations.trace()) / (len(values) * (len(values) - 1))).item()


class Net(nn.Module):
    """Batch norm, dropout and an activation in place, all of which leave traces where they may."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(8, 6, 3, groups=2, padding=1))
        self.head = nn.Linear(6, 2)

    def forward(self, x, scale=1.0):
        return self.head(self.body(self.norm(self.stem(x * scale))).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_mean_correlation_of_pre_activation_feature_maps(training):
    model, batch = Net().train(training), torch.randn(5, 3, 12, 12)
    clone, seen = copy.deepcopy(model), {}
    for name in ("stem", "body.2"):
        clone.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.clone()}))
    torch.manual_seed(3)
    clone(batch)
    torch.manual_seed(3)
    found = ci.measure_feature_correlation(model, batch)
    assert list(found) == ["stem", "body.2"]
    for name, value in found.items():
        assert value == pytest.approx(reference(seen[name]), rel=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 5), (7, 3, 20)),
        (nn.Conv3d(2, 4, (1, 3, 2)), (3, 2, 4, 5, 6)),
        (nn.ConvTranspose2d(3, 5, 3, stride=2), (4, 3, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 4, 6, 6)),
        (nn.Conv2d(3, 5, 3), (3, 9, 9)),
        (nn.Conv1d(3, 5, 3), (3, 9)),
        (nn.Conv2d(3, 70, 1, dtype=torch.float64), (2, 3, 7, 7)),
    ],
    ids=["1-D", "3-D", "transposed", "depthwise", "one image", "one signal", "float64"],
)
def test_every_kind_of_convolution(layer, shape):
    batch = torch.randn(shape, dtype=layer.weight.dtype)
    output = layer(batch).detach()
    (value,) = ci.measure_feature_correlation(layer, batch).values()
    expected = reference(output if len(shape) == layer.weight.dim() else output[None])
    assert value == pytest.approx(expected, rel=1e-5 if batch.dtype == torch.float32 else 1e-12)


def test_tuples_lists_and_mappings_are_arguments():
    model, images = Net().eval(), torch.randn(4, 3, 9, 9)
    expected = ci.measure_feature_correlation(model, images * 2)
    for batch in ((images, 2.0), [images, 2.0], {"x": images, "scale": 2.0}):
        assert ci.measure_feature_correlation(model, batch) == pytest.approx(expected)


class Repeated(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, *batches):
        return [self.conv(batch) for batch in batches]


def test_all_calls_of_a_module_count_with_their_size():
    model = Repeated(nn.Conv2d(3, 6, 3))
    batches = (
        torch.randn(2, 3, 8, 8) + 5,
        torch.randn(7, 3, 5, 9) * 3,
        torch.rand(1, 3, 3, 3),
        torch.randn(0, 3, 8, 8),
    )
    expected = reference(*(maps.detach() for maps in model(*batches)))
    assert ci.measure_feature_correlation(model, batches) == {"conv": pytest.approx(expected, rel=1e-5)}


def test_chunks_change_nothing(monkeypatch):
    model, batch = nn.Conv2d(3, 6, 3), torch.randn(7, 3, 9, 9)
    expected = ci.measure_feature_correlation(model, batch)
    monkeypatch.setattr(feature_maps, "VALUES_PER_CHUNK", 600)  # two samples and a bit
    assert ci.measure_feature_correlation(model, batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("offset", [0, 1000])
def test_neither_scale_nor_mean_counts(scale, offset):
    model, batch = nn.Conv2d(3, 6, 3, bias=False), torch.randn(7, 3, 9, 9) + offset
    expected = reference(copy.deepcopy(model).double()(batch.double()).detach())
    tolerance = 1e-5 if offset == 0 else 2e-3  # what the convolution itself keeps
    assert ci.measure_feature_correlation(model, batch * scale)[""] == pytest.approx(expected, rel=tolerance)


def test_constant_maps_form_no_pair():
    model, batch = nn.Conv2d(3, 6, 3), torch.randn(7, 3, 9, 9)
    alive = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        model.weight[4:] = 0  # their maps are their biases
        alive.weight.copy_(model.weight[:4])
    expected = ci.measure_feature_correlation(alive, batch)
    assert ci.measure_feature_correlation(model, batch) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        model.weight[1:] = 0
    assert ci.measure_feature_correlation(model, batch) == {}


def test_identical_and_opposite_maps_are_wholly_correlated():
    model = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        model.weight.copy_(model.weight[:1] * torch.tensor([1, -1, 2, 0.1])[:, None, None, None])
    assert ci.measure_feature_correlation(model, torch.randn(4, 3, 9, 9))[""] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("filters", [slice(None), slice(1), slice(1, 2)], ids=["all", "the first", "the second"])
def test_non_finite_maps_are_told(filters):
    model, batch = nn.Conv2d(3, 4, 1), torch.randn(4, 3, 9, 9)
    batch[1, 0, 4, 4] = 1e20
    with torch.no_grad():
        model.weight[filters, 0] = 1e20
    assert math.isnan(ci.measure_feature_correlation(model, batch)[""])


def test_the_expectation_of_the_closed_form_is_what_white_noise_shows():
    model = nn.Conv2d(3, 16, 5)
    expected = ci.measure(model).layers[0].before["feature_correlation_white"]
    found = ci.measure_feature_correlation(model, torch.randn(64, 3, 40, 40))[""]
    assert found == pytest.approx(expected, rel=0.03)


# What must be as it was


def hooks(model):
    return [len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_mode_buffers_gradients_and_random_state_are_as_they_were(training):
    model, batch = Net().train(training), torch.randn(5, 3, 12, 12, requires_grad=True)
    model.body.eval()
    model(batch).sum().backward()
    modes = [module.training for module in model.modules()]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters()}
    input_gradient, state, before = batch.grad.clone(), torch.get_rng_state(), hooks(model)
    ci.measure_feature_correlation(model, batch)
    assert [module.training for module in model.modules()] == modes
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(now) == list(tensors)
    for name, tensor in now.items():
        assert tensor is tensors[name]
        assert torch.equal(tensor, values[name])
    for name, tensor in model.named_parameters():
        assert tensor.requires_grad
        assert torch.equal(tensor.grad, gradients[name])
    assert torch.equal(batch.grad, input_gradient)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(model) == before
    assert torch.is_grad_enabled()


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.conv, self.norm, self.error = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), error

    def forward(self, x):
        self.norm(self.conv(F.dropout(x)))
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_after_an_error_nothing_is_left_behind(error):
    model = Failing(error)
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)):
        ci.measure_feature_correlation(model, torch.randn(2, 3, 8, 8, generator=torch.Generator()))
    assert hooks(model) == [0, 0, 0]
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_hooks_of_others_stay():
    model, calls = Net(), []
    handle = model.stem.register_forward_hook(lambda *_: calls.append(1))
    ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))
    assert calls == [1]
    assert list(model.stem._forward_hooks) == [handle.id]


def test_a_parametrization_that_writes_to_its_buffers():
    model = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    before = copy.deepcopy(model.state_dict())
    ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


class ActNorm(nn.Module):
    """Glow's: the first batch sets its parameter; and it makes a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.register_buffer("known", torch.tensor(False))

    def forward(self, x):
        if not self.known:
            self.scale.data = 1 / x.std((0, 2, 3), keepdim=True)
            self.known.fill_(True)
            self.register_buffer("made", torch.ones(1))
        return x * self.scale


class Skipping(nn.Module):
    """An encoder and a decoder that share a list; and attributes that look like hooks."""

    def __init__(self, kept=None):
        super().__init__()
        self.conv, self.kept, self.hooks = nn.Conv2d(3, 3, 3, padding=1), [] if kept is None else kept, (0, 2)
        self.last = kept is not None

    def forward(self, x):
        if self.last:
            return self.conv(x + self.kept.pop())
        self.kept.append(x)
        return self.conv(x)


def test_attributes_stay_the_objects_that_they_are():
    first = Skipping()
    model = nn.Sequential(first, Skipping(first.kept))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert set(ci.measure_feature_correlation(model, torch.randn(2, 3, 8, 8))) == {"0.conv", "1.conv"}
    assert (first.kept, seen) == ([], [1])


class Busy(nn.Module):
    """Leaves traces of all kinds."""

    def __init__(self):
        super().__init__()
        self.conv, self.count, self.notes = nn.Conv2d(3, 4, 3), torch.zeros(1), {"seen": 0}
        self.generator, self.register = torch.Generator().manual_seed(3), []
        self.register_buffer("mean", torch.zeros(1))
        self.register += [self.mean]
        self.hook = self.conv.register_forward_hook(self.scale)

    def scale(self, module, _, output):
        module.weight.data *= 0.5
        module.weight.requires_grad_(False)
        self.hook.remove()

    def forward(self, x):
        self.count += torch.rand(1, generator=self.generator)
        self.notes["seen"] += 1
        self.register[0] += 1
        self.register.append(x)
        return self.conv(x)


@pytest.mark.parametrize("copied", [2**30, 0], ids=["small", "large"])
def test_traces_of_all_kinds_are_removed(copied, monkeypatch):
    monkeypatch.setattr(observed, "COPIED", copied)
    model = nn.Sequential(Busy(), nn.Conv2d(4, 4, 3))
    busy = model[0]
    before, state = copy.deepcopy(model.state_dict()), busy.generator.get_state()
    assert len(ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))) == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (busy.count.item(), busy.notes, len(busy.register)) == (0, {"seen": 0}, 1)
    assert busy.register[0] is busy.mean
    assert torch.equal(busy.generator.get_state(), state)
    assert len(busy.conv._forward_hooks) == 1
    assert busy.conv.weight.requires_grad


def test_a_model_of_inference_mode_is_measured():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert set(ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))) == {"0"}


def test_measuring_is_no_training():
    def draw(module):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)

    with ci.initializing(settings=ci.Settings(steps=2)) as reports:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        torch.optim.SGD(model.parameters(), lr=0.1)
        model.apply(draw)
        drawn = model[0].weight.clone()
        ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))
        assert torch.equal(model[0].weight, drawn)
        model(torch.randn(2, 3, 9, 9))
        assert not torch.equal(model[0].weight, drawn)
    assert len(reports) == 2


def test_a_compiled_part_runs_as_it_is():
    part, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 9, 9)
    expected = ci.measure_feature_correlation(nn.Sequential(part), x)
    model = nn.Sequential(torch.compile(part, backend="eager", fullgraph=True))
    assert list(ci.measure_feature_correlation(model, x).values()) == list(expected.values())


def test_what_a_first_pass_sets_is_put_back():
    model = nn.Sequential(ActNorm(), nn.Conv2d(3, 4, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ci.measure_feature_correlation(model, torch.randn(4, 3, 8, 8))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert model.training


class Reassigning(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.conv(x)


def test_a_buffer_that_is_replaced_is_put_back():
    model = Reassigning()
    buffer = model.calls
    ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))
    assert model.calls is buffer
    assert buffer == 0


def test_frozen_half_wrapped_and_under_autocast():
    model, batch = Net().eval().requires_grad_(False), torch.randn(8, 3, 20, 20)
    expected = ci.measure_feature_correlation(model, batch)
    assert ci.measure_feature_correlation(nn.DataParallel(model), batch) == expected
    with torch.inference_mode():
        assert ci.measure_feature_correlation(model, batch) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert ci.measure_feature_correlation(model, batch) == pytest.approx(expected, rel=0.05)
    half = ci.measure_feature_correlation(model.bfloat16(), batch.bfloat16())
    assert half == pytest.approx(expected, rel=0.05)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x, use=True):
        return self.used(x) if use else x


def test_convolutions_that_did_not_run_are_not_in_the_answer():
    assert list(ci.measure_feature_correlation(Idle(), torch.randn(2, 3, 9, 9))) == ["used"]


def test_complex_maps_are_not_in_the_answer():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.real, self.complex = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, dtype=torch.complex64)

        def forward(self, x):
            return self.complex(self.real(x).to(torch.complex64))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(ci.measure_feature_correlation(Complex(), torch.randn(2, 3, 9, 9))) == ["real"]


class Sparse(nn.Module):
    """With a buffer that has no memory to be compared, before a layer that is frozen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.conv, self.norm = nn.Conv2d(3, 8, 3).requires_grad_(False), nn.BatchNorm2d(8)

    def forward(self, x):
        self.sparse.mul_(2)
        weight = self.conv.weight
        return self.norm(self.conv._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), None))


def test_a_sparse_buffer_is_no_obstacle():
    model = Sparse()
    assert len(ci.measure(model).layers) == 1
    assert not model.conv.weight.requires_grad
    with pytest.raises(ci.InputError, match="called none"):
        ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


@pytest.mark.parametrize("name", ["float4_e2m1fn_x2", "bits8"])
def test_a_packed_buffer_is_no_obstacle_and_is_put_back(name):
    class Packed(nn.Sequential):
        def forward(self, x):
            self.packed.view(torch.uint8).add_(1)
            return super().forward(x)

    model = Packed(nn.Conv2d(3, 8, 3))
    dtype = getattr(torch, name, None) or pytest.skip("a dtype of newer versions of PyTorch")
    model.register_buffer("packed", torch.arange(4, dtype=torch.uint8).view(dtype))
    assert ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9)).keys() == {"0"}
    assert model.packed.view(torch.uint8).tolist() == [0, 1, 2, 3]


def test_a_trial_of_another_thread_that_ends_meanwhile_changes_nothing():
    begun, ended = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.count = nn.Conv2d(3, 8, 3), 0

        def forward(self, x):
            self.count += 1
            begun.set()
            assert ended.wait(60)
            return self.conv(x)

    model, found = Slow(), []
    thread = threading.Thread(
        target=lambda: found.append(ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9)))
    )
    with isolated(nn.Conv2d(3, 8, 3)):
        thread.start()
        assert begun.wait(60)
    ended.set()
    thread.join()
    assert [list(one) for one in found] == [["conv"]]
    assert model.count == 0


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Linear(3, 3), torch.randn(2, 3), "got Linear, which has none"),
        (Idle(), (torch.randn(2, 3, 9, 9), False), "called none"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), torch.randn(2, 3, 9, 9), "0.weight is lazy"),
        (nn.Conv2d(3, 4, 3, device="meta"), torch.randn(2, 3, 9, 9), "expected a model and a batch with data"),
        (nn.Conv2d(3, 4, 3), torch.empty(2, 3, 9, 9, device="meta"), "expected a model and a batch with data"),
    ],
    ids=["no convolution", "none ran", "lazy", "no data", "meta batch"],
)
def test_what_cannot_be_measured(model, batch, message):
    with pytest.raises(ci.InputError, match=message):
        ci.measure_feature_correlation(model, batch)
    assert hooks(model) == [len(m._forward_hooks) for m in copy.deepcopy(model).modules()]


@pytest.mark.parametrize("place", ["register_forward_pre_hook", "register_forward_hook"])
def test_what_a_hook_raises_is_raised(place):
    def stop(*_):
        raise KeyError("stopped")

    model = Net()
    getattr(model.stem, place)(stop)
    with pytest.raises(KeyError, match="stopped"):
        ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9))


def test_parameters_may_have_no_data_until_they_are_used():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 9, 9)
    expected, weight = ci.measure_feature_correlation(model, x), model[0].weight
    model[0].weight = nn.Parameter(weight.to("meta"))

    def fetch(part, _):
        part._parameters["weight"] = weight

    model[0].register_forward_pre_hook(fetch)
    assert ci.measure_feature_correlation(model, x) == expected


def test_a_state_dict_is_refused():
    for function in (ci.measure_feature_correlation, ci.calibrate_):
        with pytest.raises(ci.InputError, match="expected a module, got dict"):
            function({"0.weight": torch.ones(4, 3, 3, 3)}, torch.randn(2, 3, 9, 9))


def test_memory_does_not_grow_with_the_batch(monkeypatch):
    monkeypatch.setattr(feature_maps, "VALUES_PER_CHUNK", 2**12)
    maps = feature_maps.FeatureMaps(rank=2)
    values = torch.randn(64, 16, 12, 12)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != values.data_ptr():
                largest = max(largest, out.numel())
            return out

    with Watch():
        maps.add(values)
    assert largest <= 2**12
    assert maps.count == 64 * 12 * 12
    assert maps.mean_correlation() == pytest.approx(reference(values), rel=1e-4)


@pytest.mark.cuda
def test_on_the_gpu_its_random_state_stays_too():
    model, images = Net().cuda(), torch.randn(5, 3, 12, 12, device="cuda")
    state = torch.cuda.get_rng_state()
    found = ci.measure_feature_correlation(model, images)
    assert list(found) == ["stem", "body.2"]
    assert torch.equal(torch.cuda.get_rng_state(), state)
