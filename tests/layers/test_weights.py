"""What counts is the weight that a forward pass uses, however the module comes by it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from seen import given, similarity_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import convsim_init as ci
from convsim_init.initialize import plan
from convsim_init.layers.weights import describe_mismatch

QUICK = ci.Settings(steps=4)


def used_weight(module):
    """The weight of the convolution that a forward pass runs."""
    (weight,) = given(module, torch.randn(1, module.in_channels, 16, 16))
    return weight


class Standardized(nn.Conv2d):
    """As in arXiv 1903.10520, with a gain that may be of either sign."""

    def __init__(self, *args, gain=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), gain))

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = self.gain * weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """An equalized learning rate: the parameter times a constant."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 0.3, bias)


class Normalized(nn.Conv2d):
    """Filters of unit norm."""

    def forward(self, x):
        return F.conv2d(x, F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight), self.bias)


def timm_layer(name):
    def build(*args, **kwargs):
        return getattr(pytest.importorskip("timm.layers"), name)(*args, **kwargs)

    return build


def transformers_layer(*args, **kwargs):
    pytest.importorskip("transformers")
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    return WeightStandardizedConv2d(*args, **kwargs)


CLASSES = {
    "standardized": Standardized,
    "negative gain": lambda *args, **kwargs: Standardized(*args, gain=-0.7, **kwargs),
    "scaled": Scaled,
    "normalized": Normalized,
    **{name: timm_layer(name) for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")},
    "Conv2dSame": timm_layer("Conv2dSame"),
    "transformers": transformers_layer,
}
CENTRED = {"standardized", "negative gain", "transformers"} | {name for name in CLASSES if "Std" in name}


@pytest.mark.parametrize("name", CLASSES)
def test_the_weight_that_is_used_is_lowered_and_reported(name):
    module = CLASSES[name](8, 16, 3)
    before = used_weight(module)
    raw = module.weight.detach().clone()
    (layer,) = ci.initialize_(module).layers
    after = used_weight(module)

    assert (layer.outcome, layer.reason) == (ci.Outcome.INITIALIZED, None)
    for measures, weight in ((layer.before, before), (layer.after, after)):
        assert measures["normalized_similarity"] == similarity_of(weight)
    assert ci.measure(module).layers[0].before["similarity"] == pytest.approx(layer.after["similarity"], rel=1e-4)
    share = layer.after["normalized_similarity"] / layer.before["normalized_similarity"]
    assert share < (0.2 if name in CENTRED else 0.1)
    torch.testing.assert_close(after.flatten(1).norm(dim=1), before.flatten(1).norm(dim=1), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        module.weight.detach().flatten(1).norm(dim=1), raw.flatten(1).norm(dim=1), rtol=1e-4, atol=0
    )
    if name in CENTRED:
        torch.testing.assert_close(module.weight.detach().mean((1, 2, 3)), raw.mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_a_class_that_uses_its_parameter_gets_the_same_bits_as_the_plain_convolution():
    module = timm_layer("Conv2dSame")(4, 8, 3)
    plain = nn.Conv2d(4, 8, 3)
    plain.load_state_dict(module.state_dict())
    ci.initialize_(module, settings=QUICK)
    ci.initialize_(plain, settings=QUICK)
    assert torch.equal(module.weight, plain.weight)


def test_standardized_layers_with_groups_and_in_half_precision():
    module = Standardized(8, 16, 3, groups=2).bfloat16()
    before = ci.measure(module).layers[0].before["normalized_similarity"]
    (layer,) = ci.initialize_(module).layers
    assert layer.outcome is ci.Outcome.INITIALIZED
    assert layer.after["normalized_similarity"] < 0.4 * before
    assert layer.after["norm_ratio"] == pytest.approx(1, abs=1e-2)


def test_standardization_keeps_norms_that_were_to_be_free():
    module = Standardized(4, 8, 3)
    (layer,) = ci.initialize_(module, settings=ci.Settings.paper(steps=20)).layers
    assert layer.outcome is ci.Outcome.APPROXIMATED
    assert "keeps a weight that differs" in layer.reason
    assert layer.after["norm_ratio"] == pytest.approx(1, abs=1e-4)


class Polynomial(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight + self.weight**3, self.bias)


class Elsewhere(nn.Conv2d):
    def forward(self, x):
        return x.mean() * self.weight


class Conditional(nn.Conv2d):
    def forward(self, x, routing):
        return F.conv2d(x, routing * self.weight)


def test_what_a_class_makes_of_its_parameter_is_approximated_where_it_is_not_known():
    module = Polynomial(4, 8, 3)
    (layer,) = ci.initialize_(module, settings=QUICK).layers
    assert layer.outcome is ci.Outcome.APPROXIMATED
    assert "its class keeps a weight that differs by" in layer.reason
    assert layer.after["normalized_similarity"] == similarity_of(used_weight(module))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Elsewhere(4, 8, 3), "which weight Elsewhere uses is not known: a trial pass ended with NoConvolutionError"),
        (Conditional(4, 8, 3), "which weight Conditional uses is not known: a trial pass ended with TypeError"),
        (Standardized(4, 8, 3, gain=0.0), "all weights are zero that Standardized makes of its parameter"),
        (Standardized(4, 8, 3).requires_grad_(False), "frozen"),
        (Standardized(4, 8, 3, device="meta"), "meta device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_a_class_does_otherwise_is_left_alone_with_the_reason(module, reason):
    before = copy.deepcopy(module.state_dict())
    (layer,) = ci.initialize_(module, settings=QUICK).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert layer.reason.startswith(reason) or reason in layer.reason
    for key, value in before.items():
        assert value.is_meta or torch.equal(value, module.state_dict()[key])


@pytest.mark.parametrize(("off", "told"), [(1e-4, "less than 0.1%"), (0.04, "4.0%")])
def test_a_small_difference_is_told_as_one(off, told):
    weight = torch.ones(8, 3, 3, 3)
    text = describe_mismatch("class", weight, weight * (1 + off))
    assert text == f"its class keeps a weight that differs by {told} from the one it was given"


def test_a_layer_that_is_not_selected_is_not_tried():
    class Loud(nn.Conv2d):
        def forward(self, x):
            raise AssertionError("run")

    model = nn.Sequential(Loud(4, 8, 3), nn.Conv2d(8, 8, 3))
    assert ci.initialize_(model, exclude=["0"], settings=QUICK).layers[0].reason == "excluded"


def test_kernels_too_large_for_memory_are_left_alone():
    model = nn.Sequential(nn.Conv1d(1, 2, 100_000), nn.Conv2d(1, 2, 46), nn.Conv1d(1, 2, 3))
    report = ci.initialize_(model, settings=QUICK)
    assert "100000 taps are too large" in report.layers[0].reason
    assert "2116 taps are too large" in report.layers[1].reason
    assert report.layers[2].outcome is ci.Outcome.INITIALIZED
    measured = ci.measure(model.state_dict())
    assert [layer.outcome.value for layer in measured.layers] == ["skipped", "skipped", "skipped"]
    assert "100000 taps are too large" in measured.layers[0].reason
    assert torch.equal(ci.convsim_(model[0].weight.detach().clone()), model[0].weight)


# The old and the new weight_norm


def normed(new, dim):
    module = nn.Conv2d(4, 8, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return (parametrizations.weight_norm if new else nn.utils.weight_norm)(module, dim=dim)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("new", [False, True], ids=["old", "new"])
def test_weight_norm_of_both_kinds(new, dim):
    module, plain = normed(new, dim), nn.Conv2d(4, 8, 3)
    before = used_weight(module)
    plain.weight.data.copy_(before)
    (layer,) = ci.initialize_(module).layers
    ci.initialize_(plain)
    assert (layer.outcome, layer.reason) == (ci.Outcome.INITIALIZED, None)
    torch.testing.assert_close(module.weight.detach(), plain.weight.detach(), rtol=1e-4, atol=1e-5)
    after = used_weight(module)
    torch.testing.assert_close(after, plain.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.flatten(1).norm(dim=1), before.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


def test_the_old_weight_norm_is_trained_as_before():
    module = normed(False, 0)
    ci.initialize_(module, settings=QUICK)
    module(torch.randn(1, 4, 8, 8)).sum().backward()
    assert module.weight_g.grad.abs().sum() > 0
    assert module.weight_v.grad.abs().sum() > 0
    assert set(dict(module.named_parameters())) == {"weight_g", "weight_v", "bias"}


def test_a_parametrized_buffer_is_told_of():
    module = nn.Conv2d(3, 8, 3)
    values = module.weight.detach().clone()
    del module.weight
    module.register_buffer("weight", values)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity(), unsafe=True)
    model = nn.Sequential(module, nn.Conv2d(8, 8, 3))
    for report in (ci.measure(model), ci.initialize_(model)):
        first, second = report.layers
        assert (first.outcome, first.reason) == (ci.Outcome.SKIPPED, "parametrized without a parameter of its own")
        assert second.outcome is not ci.Outcome.SKIPPED


class LowRank(nn.Module):
    """Adds the product of the weights of two convolutions."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 3), nn.Conv2d(2, 8, 1)

    def product(self):
        return torch.einsum("mr,rckl->mckl", self.up.weight[:, :, 0, 0], self.down.weight)

    def forward(self, weight):
        return weight + self.product()

    def right_inverse(self, weight):
        return weight - self.product()


def test_a_convolution_that_a_parametrization_is_made_of_does_not_change_with_it():
    module = nn.Conv2d(4, 8, 3)
    nn.utils.parametrize.register_parametrization(module, "weight", LowRank())
    first, *others = ci.initialize_(nn.Sequential(module), settings=QUICK).layers
    assert first.after["normalized_similarity"] == similarity_of(module.weight, channels=first.channels)
    assert [layer.reason for layer in others] == ["used together with 0, as one weight"] * 2


@pytest.mark.parametrize("parametrize", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrizations_that_keep_another_weight_say_so(parametrize):
    module = parametrize(nn.Conv2d(4, 8, 3))
    before = used_weight(module)
    (layer,) = ci.initialize_(module).layers
    after = used_weight(module.eval())
    if layer.outcome is not ci.Outcome.APPROXIMATED:
        assert parametrize is parametrizations.orthogonal
        assert "cannot be assigned to" in layer.reason or "is no better" in layer.reason
        torch.testing.assert_close(after, before)
    else:
        assert "its parametrization keeps a weight that differs" in layer.reason
        measured = float(ci.convolutional_similarity(after, normalized=True))
        assert layer.after["normalized_similarity"] == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_what_comes_out_no_better_is_put_back(seed):
    """An orthogonal parametrization makes of what it is given a weight that is often more similar than before."""
    torch.manual_seed(seed)
    module = parametrizations.orthogonal(nn.Conv2d(8, 8, 3))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    before = ci.measure(module).layers[0].before["normalized_similarity"]
    (layer,) = ci.initialize_(module).layers
    after = ci.measure(module).layers[0].before["normalized_similarity"]
    if layer.outcome is ci.Outcome.SKIPPED:
        assert layer.reason.startswith("left as it was: its parametrization keeps a weight that differs by")
        assert layer.reason.endswith("and is no better")
        assert layer.after == {}
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    else:
        assert layer.outcome is ci.Outcome.APPROXIMATED
        assert after < before


def test_a_parametrization_with_an_expanded_buffer_is_put_back():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("gain", torch.ones(8, 1, 1, 1).expand(8, 4, 3, 3))

        def forward(self, weight):
            return weight * self.gain

        def right_inverse(self, weight):
            self.gain[:, 0, 0, 0] += 1
            return torch.ones_like(weight)

    module = nn.Conv2d(4, 8, 3)
    weight = module.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(module, "weight", Reversed())
    module.parametrizations.weight[0].gain[:, 0, 0, 0] = 1
    module.parametrizations.weight.original.data.copy_(weight)
    (layer,) = ci.initialize_(module, settings=QUICK).layers
    assert layer.reason.endswith("is no better")
    assert torch.equal(module.weight, weight)


# Weights that hooks compute can be read


def hooked() -> nn.Conv2d:
    module = nn.Conv2d(4, 8, 3)
    module.source = nn.Parameter(module.weight.detach().clone())
    del module.weight
    module.weight = module.source * 2
    module.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.source * 2))
    return module


def test_what_a_hook_computes_is_measured_but_not_set():
    module = hooked()
    used = used_weight(module.eval())
    module.train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    attribute = module.weight
    (layer,) = ci.measure(module).layers
    assert (layer.outcome, layer.reason, layer.shape) == (ci.Outcome.MEASURED, None, [8, 4, 3, 3])
    assert layer.before["normalized_similarity"] == similarity_of(used)
    (layer,) = ci.initialize_(module, settings=QUICK).layers
    assert (layer.outcome, layer.after) == (ci.Outcome.SKIPPED, {})
    assert "its weight is no parameter" in layer.reason
    assert module.weight is attribute
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_parameter_of_spectral_norm_that_is_pruned_is_no_frozen_one():
    module = nn.utils.spectral_norm(nn.Conv2d(4, 8, 3))
    nn.utils.prune.l1_unstructured(module, "weight_orig", 0.3)
    with torch.no_grad():
        module(torch.zeros(1, 4, 5, 5))
    for layer in (*plan(module).layers, *plan(nn.Sequential(module)).layers):
        assert layer.outcome is ci.Outcome.SKIPPED
        assert "its weight is no parameter: a hook" in layer.reason


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_behind_the_hook_of_spectral_norm_the_parameter_is_set(kind):
    module = nn.utils.spectral_norm(kind(8, 16, 3)).train()
    parameter, attribute, transposed = module.weight_orig, module.weight, kind is nn.ConvTranspose2d
    (layer,) = ci.initialize_(module, settings=QUICK).layers
    assert layer.outcome is ci.Outcome.APPROXIMATED
    assert "its spectral_norm keeps a weight that differs" in layer.reason
    assert module.weight_orig is parameter
    assert module.weight is attribute
    module.eval()(torch.randn(1, 8, 5, 5))  # the hook sets the weight
    used = module.weight.detach()
    measured = ci.convolutional_similarity(used, transposed=transposed, normalized=True)
    assert layer.after["normalized_similarity"] == pytest.approx(float(measured), rel=1e-3)
    matrix = (used.transpose(0, 1) if transposed else used).flatten(1)
    assert torch.linalg.matrix_norm(matrix, 2) == pytest.approx(1, rel=0.05)
    module.train()(torch.randn(1, 8, 5, 5))
    torch.testing.assert_close(module.weight.detach(), used, rtol=1e-2, atol=1e-4)


def test_a_pruned_weight_is_the_masked_one_although_its_attribute_is_stale():
    module = prune.ln_structured(nn.Conv2d(4, 8, 3), "weight", 0.5, n=2, dim=0)
    with torch.no_grad():
        module.weight_orig.copy_(torch.randn_like(module.weight_orig))  # as a step of an optimizer does
    expected = similarity_of(module.weight_orig * module.weight_mask, normalized=False)
    assert ci.measure(module).layers[0].before["similarity"] == expected


@pytest.mark.parametrize("how", ["absent", "None"])
def test_a_weight_that_is_not_there_is_skipped(how):
    module = nn.Conv2d(4, 8, 3)
    del module.weight
    if how == "None":
        module.register_parameter("weight", None)
    model = nn.Sequential(module, nn.Conv2d(8, 8, 3))
    for report in (ci.measure(model), ci.initialize_(model, settings=QUICK)):
        assert report.layers[0].outcome is ci.Outcome.SKIPPED
        assert "it has no weight" in report.layers[0].reason
        assert report.layers[1].outcome is not ci.Outcome.SKIPPED


def test_a_pruned_weight_without_its_parameter_is_skipped():
    module = prune.l1_unstructured(nn.Conv2d(4, 8, 3), "weight", 0.5)
    del module.weight_orig
    layer, other = ci.initialize_(nn.Sequential(module, nn.Conv2d(8, 8, 3)), settings=QUICK).layers
    assert (layer.outcome, other.outcome) == (ci.Outcome.SKIPPED, ci.Outcome.INITIALIZED)
    assert "its weight is no parameter" in layer.reason


# A whole network of them


@pytest.mark.parametrize("name", ["nf_resnet26", "resnetv2_50x1_bit"])
def test_a_standardized_network_of_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    report = ci.initialize_(model, settings=ci.Settings(channels="matched"), include=["*.0.*"])
    treated = [layer for layer in report.layers if layer.after and layer.shape[2:] == [3, 3]]
    assert treated
    for layer in treated:
        assert "StdConv2d" in layer.kind
        assert layer.after["normalized_similarity"] <= 0.15 * layer.before["normalized_similarity"]
        assert layer.after["norm_ratio"] == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
