"""Which channels are compared: told by whether a normalization follows, without a change to the model."""

import copy
import pickle
import random
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import convsim_init as ci
from convsim_init.layers.symbolic import passes as symbolic
from convsim_init.layers.symbolic.follow import follow
from convsim_init.layers.symbolic.normalized import NOT_NORMALIZED, NOT_TOLD, normalization_follows

QUICK = ci.Settings(steps=2)


def conv(*others: nn.Module) -> nn.Sequential:
    """A convolution before other modules."""
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *others)


class LayerNorm2d(nn.Module):
    """A normalization of somebody's own, told by its name."""

    def forward(self, x):
        if x.mean() > 0:  # cannot be traced
            return x
        return F.normalize(x)


class Residual(nn.Module):
    """Normalization first, then a convolution beside a shortcut."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1) if raw else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.conv(F.relu(self.norm(x)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        return F.linear(F.layer_norm(x, x.shape[1:]).mean((2, 3)) * x.shape[1], torch.ones(4, 4))


class Stubborn(nn.Module):
    """Code that depends on values, around parts that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = conv(nn.ReLU(), *conv(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.last(self.part(x)) if x.sum() > 0 else x


class Function(nn.Module):
    """A function of its input and itself."""

    def __init__(self, function):
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return self.function(self, x)


def named(name):
    return type(name, (nn.Module,), {"forward": lambda self, x: x + 1})()


class WeightNormConv2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(x, F.normalize(self.direction, dim=(1, 2, 3)))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x, style=None, *, raw=False):
        x = self.conv(x)
        x = x if raw else self.norm(x)
        return x if style is None else self.last(self.conv(x) * style)


class Detector(nn.Module):
    """A list of images, a dictionary of features, a head for each of them, and checks of what comes."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]), nn.BatchNorm2d(4)
        self.heads = nn.ModuleDict({"low": nn.Conv2d(4, 8, 3), "high": nn.Conv2d(4, 8, 3)})

    def forward(self, images, targets=None):
        for image in images:
            if image.dim() != 3 or len(image.shape[-2:]) != 2:
                raise ValueError(f"expected an image, got {image.shape}")
        batch = images[0].new_zeros((len(images), *images[0].shape))
        for i in range(batch.shape[0]):
            batch[i, :, : images[i].shape[1], : images[i].shape[2]].copy_(images[i])
        features = {"low": self.norm(self.body[0](batch))}
        features["high"] = self.body[1](features["low"])
        results = []
        for name, feature in features.items():
            n, _, h, w = (found := self.heads[name](feature)).shape
            results.append(found.view(n, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4))
        scores, labels = torch.cat(results, 1).max(-1)
        return [{"scores": score[score > 0.5], "labels": label} for score, label in zip(scores, labels, strict=True)]


class OneOf(nn.Module):
    """Two inputs that each can take the place of the other, but not both."""

    def __init__(self):
        super().__init__()
        self.image, self.sound, self.norm = nn.Conv2d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, image=None, sound=None):
        if (image is None) == (sound is None):
            raise ValueError("one of image and sound")
        return self.norm(self.image(image)) if sound is None else self.sound(sound)


class Failing(nn.Module):
    """A module that no unknown value passes."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(torch.from_numpy(np.asarray(x) + 1))


class Offering(nn.Sequential):
    """Offers an argument that the parts may refuse."""

    def forward(self, x):
        for part in self:
            try:
                x = part(x, lengths=None)
            except TypeError:
                x = part(x)
        return x


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x)


@torch.jit.script
def scripted(x):
    return x + torch.sin(x)


def pooled(m, x):
    while x.shape[-1] > 4:
        x = F.avg_pool2d(x, 2)
    return F.batch_norm(x, None, None, training=True)


def repeated(m, x):
    for _ in range(1500):
        x = x + 1
    return x * x.mean()


def windowed(m, x):
    batch, channels, height, width = x.shape
    assert height % 2 == 0, f"an even height, not {height}"
    if x.shape != (batch, channels, height, width) or len(x.size()) not in (4, 5):
        raise ValueError("another shape")
    causal = width > 1 and not m.training
    assert isinstance(causal, bool)
    x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, channels)
    return F.layer_norm(x + torch.zeros(4, channels), (channels,))


def of_many_dimensions(m, x):
    line, windows = m.scale.flatten()[: x.shape[-1]], x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).relu()
    for value, rank in ((line, 1), (windows, 6)):
        if len(value.shape) != rank:  # as einops asks, by its patterns
            raise ValueError(f"expected {rank} dimensions, got {value.shape}")
    return F.normalize(windows * line)


def placed(m, x):
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1])  # which takes nothing but tensors in a tuple
    return F.normalize(x + torch.stack(torch.broadcast_tensors(grid[0], grid[1])).sum(0))


def attended(m, x):
    q, k, v = F.layer_norm(x.flatten(2), (1,)).chunk(3, dim=1)
    first, *rest = v.split([1, 1, 2], dim=1)
    return F.linear((q @ k.transpose(1, 2)).softmax(-1) @ torch.cat([first, *rest][::-1], 1), m.scale)


def written(m, x):
    total = torch.zeros_like(x)
    total.add_(x)
    total[:, 0] = 0
    total += 1
    return F.normalize(total)


def attended_scaled(m, x):
    batch, channels, *_ = x.shape
    x = x.view(batch, channels, -1)
    return (x.transpose(1, 2) @ x / channels**0.5).softmax(-1)


def written_into_a_part(m, x):
    total = x.new_zeros(x.shape)
    first, _ = total[:, :2].chunk(2, dim=1)
    first.copy_(x[:, :1])
    return total, F.normalize(x)


def written_out(m, x):
    total = torch.empty_like(x)
    torch.add(x, 1, out=total)
    return total, F.normalize(x)


class Writing(nn.Module):
    """Code that changes its input and then fails."""

    def forward(self, x):
        x += 1
        x.view(-1)[0] = 1
        raise NotImplementedError


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.part = nn.BatchNorm2d(4), Writing()

    def forward(self, x):
        normalized = self.norm(x)
        self.part(x)
        return x, normalized


FUSED = torch.ao.nn.intrinsic.qat.ConvBn2d(4, 4, 3, qconfig=torch.ao.quantization.default_qat_qconfig)
MODELS = {
    "batch norm": (conv(nn.BatchNorm2d(4)), {"0": True}),
    "through activation, pooling and dropout": (
        conv(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Identity(), nn.InstanceNorm2d(4)),
        {"0": True},
    ),
    "none": (conv(nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2)), {"0": False, "2": False}),
    "local response": (conv(nn.LocalResponseNorm(2)), {"0": False}),
    "by its name": (conv(LayerNorm2d()), {"0": True}),
    "by a name that says something else": (
        nn.Sequential(
            *(
                part
                for name in ("NoNorm", "NormFreeAct", "NormalNoise", "FrozenBatchNorm2d")
                for part in conv(named(name))
            ),
            *conv(WeightNormConv2d()),
        ),
        {"0": False, "2": False, "4": False, "6": False, "8": False, "9": False},
    ),
    "written out": (conv(Function(lambda m, x: (x - x.mean(1, True)) / (x.var(1, True) + 1e-5).sqrt())), {"0": True}),
    "by the root of the mean square": (
        conv(Function(lambda m, x: x * torch.rsqrt(x.square().mean(1, keepdim=True)))),
        {"0": True},
    ),
    "by one over a deviation": (
        conv(Function(lambda m, x: x * (1 / (x.square().mean((2, 3), keepdim=True) + 1e-5) ** 0.5))),
        {"0": True},
    ),
    "by a norm": (conv(Function(lambda m, x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True))), {"0": True}),
    "times a deviation": (conv(Function(lambda m, x: x * (x.std((2, 3), keepdim=True) / 2))), {"0": False}),
    "times a root": (conv(Function(lambda m, x: x.sign() * x.abs().sqrt())), {"0": False}),
    "under a deviation": (conv(Function(lambda m, x: x.std((2, 3), keepdim=True) / x)), {"0": False}),
    "scaled by its shape": (conv(Function(lambda m, x: x / torch.tensor(x.shape[1]).float().sqrt())), {"0": False}),
    "scaled by another's": (conv(Function(lambda m, x: x * m.scale.std())), {"0": False}),
    "behind a product": (
        conv(Function(lambda m, x: F.layer_norm(x.mean((2, 3)) @ m.scale, (4,)))),
        {"0": False},
    ),
    "by default": (Optional(), {"conv": True}),
    "of another layer": (conv(nn.Conv2d(4, 4, 3), nn.RMSNorm(4)), {"0": False, "1": True}),
    "first": (
        nn.Sequential(*conv(), Residual(), Residual(), nn.BatchNorm2d(4)),
        {"0": True, "1.conv": True, "2.conv": True},
    ),
    "first, but not for a shortcut": (
        nn.Sequential(*conv(), Residual(raw=True), nn.BatchNorm2d(4)),
        {"0": False, "1.conv": True, "1.shortcut": True},
    ),
    "functional": (Functional(), {"conv": True}),
    "where values decide": (Stubborn(), {"part.0": False, "part.2": True, "part.4": False, "last": False}),
    "through what refuses an argument": (
        nn.Sequential(*conv(), Offering(Residual(), nn.BatchNorm2d(4))),
        {"0": True, "1.0.conv": True},
    ),
    "by a module that code makes": (conv(Function(lambda m, x: nn.GroupNorm(1, 4).to(x)(x))), {"0": True}),
    "in parts alone": (
        nn.Sequential(*conv(nn.BatchNorm2d(4)), *conv(Failing(*conv(*conv(nn.BatchNorm2d(4))))), *conv()),
        {"0": True, "3.parts.0": False, "3.parts.1": True, "4": False},
    ),
    "through what is no layer": (conv(Failing(nn.ReLU()), nn.BatchNorm2d(4)), {"0": True}),
    "through functions of their own": (
        conv(Function(lambda m, x: scripted(Step.apply(x))), nn.BatchNorm2d(4)),
        {"0": True},
    ),
    "through many functions": (conv(Function(repeated)), {"0": False}),
    "through loops": (conv(Function(pooled)), {"0": True}),
    "but for a single pixel": (
        conv(Function(lambda m, x: x if x.shape[-1] == 1 else F.normalize(x))),
        {"0": True},
    ),
    "through checks and shapes": (conv(Function(windowed)), {"0": True}),
    "of one and of six dimensions": (conv(Function(of_many_dimensions)), {"0": True}),
    "by its imaginary part": (conv(Function(lambda m, x: F.normalize(torch.fft.fft2(x).imag))), {"0": True}),
    "through grids": (conv(Function(placed)), {"0": True}),
    "through attention": (conv(Function(attended)), {"0": True}),
    "scaled by the root of a size": (conv(Function(attended_scaled)), {"0": False}),
    "in place, in a part of what is returned": (conv(Function(written_into_a_part)), {"0": False}),
    "into what is returned": (conv(Function(written_out)), {"0": False}),
    "in place, in code that fails": (conv(Around()), {"0": False}),
    "in place": (conv(Function(written)), {"0": True}),
    "of many outputs": (
        Detector(),
        {"body.0": True, "body.1": False, "heads.low": False, "heads.high": False},
    ),
    "one of two": (OneOf(), {"image": True, "sound": False}),
    "called by their weights": (
        Function(lambda m, x: F.batch_norm(F.conv2d(x, m.function.weight), None, None, training=True)),
        {},
    ),
    "fused": (nn.Sequential(FUSED), {"0": True}),
    "of the weight alone": (
        nn.Sequential(weight_norm(nn.Conv2d(4, 4, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(4, 4, 3))),
        {"0": False, "2": False},
    ),
    "lazily": (conv(nn.LazyBatchNorm2d(), nn.Conv2d(4, 4, 3)), {"0": True, "2": False}),
    "around a script": (
        nn.Sequential(*conv(torch.jit.script(nn.ReLU())), *conv(nn.BatchNorm2d(4)), *conv()),
        {"2": True, "4": False},
    ),
    "a layer by itself": (nn.Conv2d(4, 4, 3), {}),
    "no forward pass": (nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.BatchNorm2d(4)}), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_follows(name):
    model, expected = MODELS[name]
    assert normalization_follows(follow(model)) == expected


def test_a_layer_that_is_called_twice_is_normalized_both_times():
    shared = nn.Conv2d(4, 4, 3)
    assert normalization_follows(follow(nn.Sequential(shared, nn.BatchNorm2d(4), shared))) == {"0": False}
    assert normalization_follows(follow(nn.Sequential(*2 * [shared, nn.BatchNorm2d(4)]))) == {"0": True}


def test_nothing_of_the_model_is_touched(capsys):
    class Counting(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.conv, self.seen, self.outside = nn.Conv2d(4, 4, 3), [], threading.Lock()
            self.again = self.first

        def first(self, x):
            return self.conv(x)

        def forward(self, x):
            self.calls += 1
            print("called")
            self.seen.append(random.random() + np.random.rand() + torch.rand(()).item())
            self.conv.extra = x
            return self.again(x)

    model, heard = Counting().train(), []
    model.register_forward_hook(lambda *_: heard.append("hook"))
    before, attributes = copy.deepcopy(model.state_dict()), dict(vars(model.conv))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert normalization_follows(follow(model)) == {"conv": False}
    assert (model.calls, model.seen, heard, model.training) == (0, [], [], True)
    assert vars(model.conv) == attributes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert capsys.readouterr().out == ""


class Passing(nn.Module):
    """As networks of ultralytics: what else it is given are options of another method."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(nn.BatchNorm2d(4))

    def forward(self, x, *args):
        return self.predict(x, *args)

    def predict(self, x, profile=False):
        x = self.conv(x)
        return x if profile else self.norm(x)


class Joining(Passing):
    def forward(self, x, *skips):
        return self.predict(x + skips[0])


class Handing(Passing):
    def forward(self, *args):
        return self.predict(*args)


@pytest.mark.parametrize("kind", [Passing, Joining, Handing])
def test_arguments_that_a_module_takes_besides_are_given_where_there_is_no_other_way(kind):
    assert normalization_follows(follow(kind())) == {"conv": True}


def test_a_module_that_is_its_own_copy_stays_as_it_is():
    class Single(nn.Sequential):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(Single(*conv(nn.BatchNorm2d(4))), nn.Conv2d(4, 4, 3))
    before = [dict(vars(part)) for part in model.modules()]
    assert normalization_follows(follow(model)) == {}
    assert [dict(vars(part)) for part in model.modules()] == before


def test_nothing_that_a_model_holds_is_touched():
    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.history, self.cache = nn.Conv2d(4, 4, 3), deque(maxlen=3), SimpleNamespace(steps=0)
            self.numbers, self.chance = np.zeros(3), np.random.default_rng(0)

        def forward(self, x):
            self.cache.steps += 1
            self.cache.features = x
            self.numbers += self.chance.random()
            self.history.append(x)
            return self.conv(x)

    model = Recording()
    before = pickle.dumps(model.__dict__)
    assert normalization_follows(follow(model)) == {"conv": False}
    assert pickle.dumps(model.__dict__) == before


def test_a_forward_pass_that_leaves_or_never_ends_is_not_told(monkeypatch):
    monkeypatch.setattr(symbolic, "MAX_CALLS", 1000)

    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            raise SystemExit

    class Endless(Leaving):
        def forward(self, x):
            while True:
                x = x + 1

    for model in (Leaving(), Endless()):
        assert normalization_follows(follow(model)) == {}


def test_other_threads_run_their_modules_meanwhile(capsys):
    other, outputs = nn.Sequential(nn.Linear(3, 3)), []

    class Waiting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            thread = threading.Thread(target=lambda: print(outputs.append(other(torch.ones(1, 3)))))
            thread.start()
            thread.join()
            print(x)
            return self.conv(x)

    assert normalization_follows(follow(Waiting())) == {"conv": False}
    assert capsys.readouterr().out == "None\n"
    assert torch.equal(outputs[0], other(torch.ones(1, 3)))


def test_all_channels_are_compared_where_nothing_normalizes():
    model = conv(nn.BatchNorm2d(4), *conv(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4))
    twin = copy.deepcopy(model)
    report = ci.initialize_(model, settings=QUICK)
    first, second, point, depthwise = report.layers
    assert (first.channels, first.reason) == ("matched", None)
    assert (second.channels, second.reason) == ("all", NOT_NORMALIZED)
    assert (point.outcome, point.channels) == (ci.Outcome.SKIPPED, "all")
    assert "kernels of one tap" in point.reason
    assert (depthwise.outcome, depthwise.reason) == (
        ci.Outcome.SKIPPED,
        "one filter per group shares its channels with no other",
    )
    assert report.channels == "auto"
    for name, channels in (("0", "matched"), ("2", "all")):
        ci.initialize_(twin, settings=ci.Settings(steps=2, channels=channels), include=[name])
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in twin.state_dict().items())


def test_what_cannot_be_told_is_matched_and_said():
    report = ci.initialize_(nn.ModuleList([nn.Conv2d(4, 4, 3)]), settings=QUICK)
    assert [(layer.channels, layer.reason) for layer in report.layers] == [("matched", NOT_TOLD)]
    report = ci.initialize_(conv().state_dict(), settings=QUICK)
    assert [layer.channels for layer in report.layers] == ["matched"]
    assert any(remark.startswith(NOT_TOLD) for remark in report.remarks)


def test_settings_that_name_the_channels_ask_nothing():
    report = ci.initialize_(conv(), settings=ci.Settings(steps=2, channels="matched"))
    assert [(layer.channels, layer.reason) for layer in report.layers] == [("matched", None)]


class Held:
    """What may fill the memory if it is copied."""

    def __init__(self, values):
        self.values, self.count, self.last = [torch.empty(values, dtype=torch.uint8)], 0, None

    def note(self, last):
        self.count, self.last = self.count + 1, last
        return last


class Holding(nn.Module):
    def __init__(self, values=2**27 + 1):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.data = self.first.data = Held(values)

    def forward(self, x):
        return F.conv2d(self.norm(self.first(x)), self.last.weight * 2)


def test_heavy_objects_that_the_forward_pass_does_not_name_are_not_copied(monkeypatch):
    copies = []
    monkeypatch.setattr(Held, "__deepcopy__", lambda self, _: copies.append(self), raising=False)
    report = ci.initialize_(Holding(), settings=ci.Settings(steps=2))
    assert [layer.channels for layer in report.layers] == ["matched", "all"]
    assert copies == []


class Noting(Holding):
    def __init__(self):
        super().__init__(8)
        self.noted = [self.data.note]

    def forward(self, x):
        return F.conv2d(self.norm(self.first(x)), self.noted[0](self.last.weight * 2))


class NotingByName(Holding):
    def __init__(self):
        super().__init__(8)

    def forward(self, x):
        return F.conv2d(self.norm(self.first(x)), getattr(self, "da" + "ta").note(self.last.weight * 2))


@pytest.mark.parametrize("build", [Noting, NotingByName])
def test_objects_of_the_model_stay_as_they_were(build):
    model = build()
    ci.initialize_(model, settings=ci.Settings(steps=2))
    ci.measure(model)
    assert (model.data.count, model.data.last) == (0, None)


def test_code_that_fails_within_code_that_fails_is_not_tried_without_end():
    calls = []

    class Nested(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.conv, self.inner = nn.Conv2d(4, 4, 3), Nested(depth - 1) if depth else nn.Identity()

        def forward(self, x):
            calls.append(self)
            x = self.inner(self.conv(x))
            if x.mean() > 0 or x.sum() > 0:
                x = x + 1
            raise ValueError

    assert normalization_follows(follow(Nested(8))) == {}
    assert len(calls) < 1000


@pytest.mark.posix
def test_a_distributed_data_parallel_within_the_model_is_followed(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(net), nn.Flatten())
        assert normalization_follows(follow(model)) == {"0.module.0": False, "0.module.2": True}
    finally:
        dist.destroy_process_group()


class NormalizedAtOnce(nn.parallel.DistributedDataParallel):
    """Normalizes after its first layer, and runs no other."""

    def forward(self, x):
        return F.instance_norm(self.module[0](x))


@pytest.mark.posix
def test_the_forward_pass_of_another_distributed_data_parallel_is_not_taken_for_that_of_pytorch(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert "0.module.0" not in normalization_follows(follow(nn.Sequential(NormalizedAtOnce(net), nn.Flatten())))
    finally:
        dist.destroy_process_group()


class BySize(nn.Module):
    """Computes with sizes by functions of NumPy between two layers."""

    def __init__(self, of_size):
        super().__init__()
        self.first, self.last, self.norm = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.of_size = of_size

    def forward(self, x):
        x = self.first(x)
        return self.norm(self.last(x * self.of_size(x)))


SIZES = {
    "root": lambda x: 1 / np.sqrt(x.shape[1]),
    "of-number": lambda x: np.sqrt(x.numel() / len(x)),
    "whole": lambda x: int(np.ceil(np.log2(x.shape[2]))),
    "positions": lambda x: torch.from_numpy(np.arange(x.shape[-1])),
}


@pytest.mark.parametrize("of_size", SIZES.values(), ids=SIZES)
def test_sizes_may_be_computed_with_by_numpy(of_size):
    model = BySize(of_size)
    model(torch.randn(2, 8, 8, 8))
    assert normalization_follows(follow(model)) == {"first": False, "last": True}


class NewNeedsTheModel(nn.Module):
    """As the wrapper of a library for averages of weights: __new__ has arguments, which copy.deepcopy does not give."""

    def __new__(cls, model):
        return super().__new__(cls)

    def __init__(self, model):
        super().__init__()
        self.online = model

    def __call__(self, x):
        return self.online(x)


def test_a_wrapper_whose_new_needs_arguments_is_followed_like_the_network_in_it():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    report = ci.initialize_(nn.ModuleDict({"average": NewNeedsTheModel(network)}), settings=QUICK)
    assert [layer.reason for layer in report.layers] == [None, NOT_NORMALIZED]
    assert normalization_follows(follow(NewNeedsTheModel(network))) == {"online.0": True, "online.2": False}


class AlsoADict(nn.Module, dict):
    """Is made by the __new__ of dict alone."""

    __hash__ = object.__hash__

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.last(self.first(x))


def test_a_module_may_be_a_dict_as_well():
    assert normalization_follows(follow(AlsoADict())) == {"first": False, "last": False}
