"""A bare checkpoint: its convolutions are inferred from names and shapes, and initialized where they stand."""

import copy
import warnings

import pytest
import torch
from seen import similarity_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import convsim_init as ci
from convsim_init.layers.inferred import BY_BIAS, BY_NORM, BY_SHAPE, DEPTHWISE, DOUBTFUL

QUICK = ci.Settings(steps=4, channels="matched")


def test_plain_convolutions_come_out_as_from_the_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), nn.Conv1d(8, 4, 3))
    state = copy.deepcopy(model.state_dict())
    tensors = {key: value.data_ptr() for key, value in state.items()}
    report = ci.initialize_(state, settings=QUICK)
    expected = ci.initialize_(model, settings=QUICK)
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    for layer, twin in zip(report.layers, expected.layers, strict=True):
        assert (layer.kind, layer.shape, layer.outcome) == (twin.kind, twin.shape, twin.outcome)
        assert layer.after == twin.after
        assert layer.reason == BY_SHAPE
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    assert {key: value.data_ptr() for key, value in state.items()} == tensors


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_shows_in_the_length_of_its_bias(groups):
    module = nn.ConvTranspose2d(8, 12, 3, groups=groups)
    state = copy.deepcopy(nn.Sequential(module).state_dict())
    (layer,) = ci.initialize_(state, settings=QUICK).layers
    (twin,) = ci.initialize_(module, settings=QUICK).layers
    assert (layer.kind, layer.reason) == ("ConvTranspose2d", BY_BIAS)
    assert layer.after == twin.after
    assert torch.equal(state["0.weight"], module.weight)
    assert ci.measure(state).layers[0].before == ci.measure(module).layers[0].before


def test_a_transposed_convolution_without_a_bias_shows_in_the_length_of_the_norm_layer_behind_it():
    model = nn.Sequential(nn.ConvTranspose2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3))
    state = copy.deepcopy(model.state_dict())
    first, second = ci.initialize_(state, settings=QUICK).layers
    ci.initialize_(model, settings=QUICK)
    assert [(first.kind, first.reason), second.reason] == [("ConvTranspose2d", BY_NORM), BY_SHAPE]
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_norm_layer_of_another_module_or_of_what_is_concatenated_shows_nothing():
    state = {"a.conv.weight": torch.randn(8, 24, 3, 3), "b.norm.weight": torch.ones(24), "b.norm.bias": torch.ones(24)}
    state |= {"c.0.weight": torch.randn(8, 12, 3, 3), "c.1.running_mean": torch.ones(24)}
    state |= {"d.0.weight": torch.randn(8, 12, 1, 1), "d.1.running_mean": torch.ones(12)}
    assert [layer.reason for layer in ci.initialize_(state, settings=QUICK).layers] == [BY_SHAPE] * 3


def test_one_channel_per_filter_looks_depthwise():
    state = copy.deepcopy(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)).state_dict())
    before = {key: value.clone() for key, value in state.items()}
    (layer,) = ci.initialize_(state, settings=QUICK).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert layer.reason.startswith(DEPTHWISE)
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    (layer,) = ci.initialize_(state, settings=ci.Settings(channels="all", steps=4)).layers
    assert layer.outcome is ci.Outcome.INITIALIZED


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"a.weight_v": torch.randn(4, 3, 3, 3)}, "parametrized"),
        ({"a.parametrizations.weight.original1": torch.randn(4, 3, 3, 3)}, "parametrized"),
        ({f"a.parametrizations.weight.original{i}": torch.randn(4, 3, 3, 3) for i in range(2)}, "parametrized"),
        ({"a.weight": torch.ones(4, 3, 3, 3, dtype=torch.int64)}, "dtype torch.int64"),
        ({"a.weight": torch.zeros(4, 3, 3, 3)}, "all weights are zero"),
        ({"a.weight": torch.empty(0, 3, 3, 3)}, "empty"),
        ({"a.weight": torch.randn(1, 3, 3, 3)}, "only one filter"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_left_alone(entry, reason):
    state = {key: value.clone() for key, value in entry.items()}
    (layer,) = ci.initialize_(state, settings=QUICK).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert reason in layer.reason
    assert all(torch.equal(state[key], value) for key, value in entry.items())


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(1 + torch.randn(16, 7, 7) / 4, id="factors-of-a-norm-over-images"),
        pytest.param(torch.randn(5, 5, 1, 6), id="tensorflow"),
        pytest.param(torch.randn(3, 3, 4, 1), id="tensorflow-depthwise"),
        pytest.param(torch.randn(7, 3, 12, 12), id="tensorflow-not-square"),
        pytest.param(torch.randn(6, 5, 4, 3, 3), id="rotations-of-a-group-convolution"),
        pytest.param(torch.randn(4, 1, 12), id="tokens"),
    ],
)
def test_what_is_doubtful_is_left_alone(weight):
    state = {"a.weight": weight.clone(), "b.weight": torch.randn(5, 3, 3, 3), "c.weight": torch.randn(64, 3, 3)}
    state |= {"d.weight": torch.randn(32, 32, 1, 3), "e.weight": torch.randn(16, 16, 5, 1)}
    state |= {
        "f.weight": torch.randn(3, 3, 1, 3, 3),
        "g.weight": torch.randn(4, 4, 3, 1),
        "h.weight": torch.rand(9, 4, 3, 3),
        "i.weight": torch.randn(9, 3, 2, 8, 8),
    }
    layer, *convolutions = ci.initialize_(state, settings=QUICK).layers
    assert layer.reason.startswith("doubtful whether it is a convolution's weight")
    assert torch.equal(state["a.weight"], weight)
    assert {layer.reason for layer in convolutions} == {BY_SHAPE}


def test_what_looks_the_same_in_two_layouts_is_doubtful_in_a_file_of_the_other_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1))
    own = model.state_dict()
    other = {key: value.movedim(1, -1) if value.dim() == 4 else value for key, value in own.items()}
    assert [layer.reason for layer in ci.measure(own).layers] == [BY_SHAPE] * 3
    assert [layer.reason for layer in ci.measure(other).layers] == [DOUBTFUL] * 3
    over_time, over_electrodes = nn.Conv2d(1, 9, (1, 25)), nn.Conv2d(9, 9, (22, 1))
    layers = ci.measure(nn.Sequential(over_time, over_electrodes).state_dict()).layers
    assert [layer.reason for layer in layers] == [DOUBTFUL, BY_SHAPE]


def weight_normed(new: bool, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return (parametrizations.weight_norm if new else nn.utils.weight_norm)(nn.Conv2d(4, 8, 3), dim=dim)


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Conv2d(4, 8, 3), "weight", 0.5)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(prune.ln_structured(nn.Conv2d(4, 8, 3), "weight", 0.5, n=2, dim=0), id="pruned"),
        pytest.param(prune.random_unstructured(nn.ConvTranspose2d(4, 8, 3), "weight", 0.5), id="pruned transposed"),
        pytest.param(weight_normed(False), id="weight_norm"),
        pytest.param(weight_normed(False, None), id="weight_norm of all"),
        pytest.param(weight_normed(True, 1), id="parametrized weight_norm"),
    ],
)
def test_what_is_computed_from_entries_is_measured_as_in_the_module_but_not_set(module):
    state = copy.deepcopy(nn.Sequential(module).state_dict())
    before = {key: value.clone() for key, value in state.items()}
    (layer,), (twin,) = ci.measure(state).layers, ci.measure(module).layers
    assert (layer.name, layer.kind, layer.outcome) == ("0", twin.kind.removeprefix("Parametrized"), twin.outcome)
    assert layer.before == pytest.approx(twin.before, rel=1e-5)
    (layer,) = ci.initialize_(state, settings=QUICK).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert "parametrized: its weight is computed" in layer.reason
    assert all(torch.equal(value, before[key]) for key, value in state.items())


class Masked(nn.Conv2d):
    """As in PixelCNN."""

    def __init__(self, *arguments: int, per_kernel: bool = False) -> None:
        super().__init__(*arguments)
        mask = torch.ones_like(self.weight[:1, :1] if per_kernel else self.weight)
        mask[:, :, 2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(images, self.weight * self.mask, self.bias)


def beside_its_mask() -> dict[str, torch.Tensor]:
    return {key.replace("_orig", ""): value for key, value in nn.Sequential(pruned()).state_dict().items()}


NAMES = ["masks.layer1.0.conv1", "masks.layer1_0_conv1", "layer1.0.conv1_mask", "mask.layer1.0.conv1.weight"]


@pytest.mark.parametrize("mask", NAMES)
def test_a_mask_may_be_an_entry_of_another_module(mask):
    weight = torch.randn(8, 4, 3, 3)
    state = {mask: (torch.rand(8, 4, 3, 3) < 0.5).float(), "layer1.0.conv1.weight": weight, "b.weight": weight * 2}
    before = {key: value.clone() for key, value in state.items()}
    first, second = ci.measure(state).layers
    assert (first.name, second.name, second.reason) == ("layer1.0.conv1", "b", BY_SHAPE)
    assert first.reason == f"times {mask}, taken for its mask by its zeros and ones: {BY_SHAPE}"
    assert first.before["similarity"] == similarity_of(weight * state[mask], normalized=False)
    ci.initialize_(state, settings=ci.Settings(steps=1))
    assert [key for key in state if not torch.equal(state[key], before[key])] == ["b.weight"]


def test_what_is_only_called_a_mask_is_none():
    names = ("mask_head.conv1", "head.conv1", "mask_fcn1", "fcn1")
    state = {f"{name}.weight": torch.randn(8, 4, 3, 3) for name in names}
    assert [layer.reason for layer in ci.measure(state).layers] == [BY_SHAPE] * 4


def test_arrays_are_named():
    weight = torch.randn(8, 4, 3, 3)
    report = ci.measure({"a.weight": weight.numpy(), "b.weight": weight, "steps": 3})
    assert [layer.name for layer in report.layers] == ["b"]
    assert report.remarks == ["not looked at, for they are no tensors of torch, as torch.from_numpy makes: a.weight"]
    with pytest.raises(ci.InputError, match=r"got 1 entries without any: make tensors of its arrays, as by torch.from"):
        ci.measure({"a.weight": weight.numpy()})


def test_stacked_models_are_no_3d_convolutions():
    kinds = [nn.Conv2d(3, 16, 7), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, bias=False), nn.Conv2d(16, 8, 1, bias=False)]
    models = [nn.Sequential(*map(copy.deepcopy, kinds)) for _ in range(5)]
    parameters, buffers = torch.func.stack_module_state(models)
    assert all(layer.reason.startswith("doubtful") for layer in ci.measure({**parameters, **buffers}).layers)
    norms = {key: value for key, value in parameters.items() if key.startswith(("1.", "2."))}
    assert [layer.reason[:8] for layer in ci.measure(norms).layers] == ["doubtful"]


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*nested tensors")
@pytest.mark.parametrize(
    "others",
    [
        lambda: nn.LazyLinear(3).state_dict(prefix="1."),
        lambda: nn.LazyConv2d(3, 3).state_dict(prefix="1."),
        lambda: {"1.weight": torch.nested.nested_tensor([torch.ones(2, 3, 3), torch.ones(3, 3, 3)])},
        lambda: {"1.bias": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        lambda: {"0.bias": nn.UninitializedParameter()},
        lambda: {"0.mask": torch.nested.nested_tensor([torch.ones(3), torch.ones(3)])},
    ],
    ids=["lazy", "lazy-convolution", "nested", "nested-bias", "own-bias", "mask"],
)
def test_entries_without_a_shape_are_no_convolutions(others):
    state = nn.Conv2d(3, 8, 3).state_dict(prefix="0.") | others()
    assert [(layer.name, layer.reason) for layer in ci.measure(state).layers] == [("0", BY_SHAPE)]
    assert ci.initialize_(state, settings=ci.Settings(steps=1)).totals["initialized"] == 1


@pytest.mark.parametrize(
    ("shape", "doubtful"),
    [((8, 64, 64, 3, 3), True), ((16, 8, 3, 3, 2), True), ((16, 8, 9, 1, 1), False), ((16, 8, 5, 7, 7), False)],
)
def test_kernels_of_rank_3_are_no_filters_of_2d(shape, doubtful):
    (layer,) = ci.measure({"a.weight": torch.randn(shape)}).layers
    assert layer.reason.startswith("doubtful") == doubtful


@pytest.mark.parametrize(
    ("shapes", "doubtful"),
    [
        ([(384, 3, 80), (384, 3, 384)], True),  # [M, k, C]
        ([(32, 5, 16), (64, 5, 32), (64, 3, 64)], True),
        ([(384, 80, 3), (384, 384, 3)], False),
        ([(32, 3, 80)], False),  # nobody can tell
        ([(32, 3, 32), (32, 3, 16), (32, 3, 64)], False),  # branches
        ([(32, 1, 32), (32, 1, 32)], False),  # depthwise, or filters of one signal
        ([(32, 2, 32), (64, 2, 32)], False),
        ([(32, 3, 32), (32, 3, 32)], False),
        ([(32, 3, 80), (64, 32, 5)], False),
    ],
)
def test_a_chain_of_1d_layers_shows_the_layout(shapes, doubtful):
    state = {}
    for index, shape in enumerate(shapes):
        state |= {f"{index}.weight": torch.randn(shape), f"{index}.bias": torch.randn(shape[0])}
    reasons = [layer.reason.startswith("doubtful") for layer in ci.measure(state).layers]
    assert reasons == [doubtful] * len(shapes)


@pytest.mark.parametrize("name", ["mask", "mask of kernels", "weight_mask", "mask and weight_norm"])
def test_a_mask_beside_a_weight_counts_when_it_is_measured(name):
    module = Masked(4, 8, 3, per_kernel=name == "mask of kernels")
    if name == "mask and weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(module)
    state = beside_its_mask() if name == "weight_mask" else nn.Sequential(module).state_dict()
    state = {key: value.clone() for key, value in state.items()}
    mask = next(key for key in state if key.endswith("mask"))
    used = module.weight * module.mask if mask == "0.mask" else state["0.weight"] * state[mask]
    (layer,), (twin,) = ci.measure(state).layers, ci.measure({"0.weight": used.detach()}).layers
    assert layer.before == pytest.approx(twin.before, rel=1e-5)
    assert layer.reason == f"times {mask}, taken for its mask by its zeros and ones: {BY_SHAPE}"
    before = {key: value.clone() for key, value in state.items()}
    (layer,) = ci.initialize_(state, settings=QUICK).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert layer.reason.startswith(f"times {mask}, taken for its mask by its zeros and ones: whether its forward pass")
    assert all(torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.parametrize("beside", [torch.ones(8, 4, 3, 3), torch.zeros(8, 4, 3, 3), torch.rand(8, 1, 1, 1)])
def test_what_is_no_mask_does_not_count(beside):
    weight = torch.eye(8)[:, :4, None, None].repeat(1, 1, 3, 3)  # zeros and ones itself
    state = {"a.weight": weight, "a.other": beside, "a.bias": torch.eye(8)[0], "b.mask": weight}
    assert [layer.reason for layer in ci.measure(state).layers] == [BY_SHAPE]


@pytest.mark.parametrize("stale_first", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: weight_normed(False), lambda: weight_normed(True), pruned], ids=["old", "new", "prune"]
)
def test_what_is_computed_goes_before_a_weight_that_was_left_over(make, stale_first):
    module = make()
    state, stale = nn.Sequential(module).state_dict(), {"0.weight": torch.randn(8, 4, 3, 3)}
    state = stale | state if stale_first else state | stale
    (layer,), (twin,) = ci.measure(state).layers, ci.measure(module).layers
    assert layer.before == pytest.approx(twin.before, rel=1e-5)
    assert [layer.outcome for layer in ci.initialize_(state, settings=QUICK).layers] == [ci.Outcome.SKIPPED]
    assert torch.equal(state["0.weight"], stale["0.weight"])


def test_a_tensor_under_two_names_is_treated_once():
    weight = torch.randn(4, 3, 3, 3)
    report = ci.initialize_({"a.weight": weight, "b.weight": weight}, settings=QUICK)
    assert [layer.reason for layer in report.layers] == [BY_SHAPE, "shares its weight with a"]


def test_what_lies_in_the_memory_of_a_weight_and_changes_with_it_is_told():
    memory = torch.randn(300)
    state = {"a.weight": memory[:216].view(8, 3, 3, 3), "a.bias": memory[210:218], "b.bias": memory[216:]}
    expected = "in the memory of weights of layers, and change with them: a.bias"
    assert expected in ci.initialize_(state, settings=QUICK).remarks


def test_packed_numbers_are_neither_masks_nor_copies():
    dtype = getattr(torch, "float4_e2m1fn_x2", None) or pytest.skip("a dtype of newer versions of PyTorch")
    packed = torch.ones(8, 3, 3, 3, dtype=torch.uint8).view(dtype)
    state = {"a.weight": torch.randn(8, 3, 3, 3), "a.packed": packed, "b.weight": packed[:, :, 0].clone()}
    report = ci.initialize_(state, settings=QUICK)
    assert [layer.outcome.value for layer in report.layers] == ["initialized", "skipped"]


def test_copies_beside_the_weights_that_part_from_them_are_told():
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).state_dict()
    state |= {f"{key}_ema": value.clone() for key, value in state.items()}
    expected = "copies that are no longer equal to what they were copied from: 0.weight_ema (of 0), 1.weight_ema (of 1)"
    remarks = ci.initialize_(state, settings=QUICK).remarks
    assert [remark for remark in remarks if remark.startswith(expected)]
    assert not [remark for remark in ci.initialize_(state, settings=QUICK).remarks if remark.startswith(expected)]


def test_patterns_select_entries_too():
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).state_dict()
    report = ci.initialize_(state, include=["1"], settings=QUICK)
    assert [layer.outcome.value for layer in report.layers] == ["skipped", "initialized"]
    with pytest.raises(ci.InputError, match="no convolution matches 'stem'"):
        ci.initialize_(state, include=["stem"])


@pytest.mark.parametrize("state", [{}, {"a.weight": torch.ones(3, 3)}, {"a.bias": torch.ones(3)}])
def test_a_state_dict_without_convolutions(state):
    with pytest.raises(ci.InputError, match="expected a state dict with convolution weights"):
        ci.initialize_(state)


def test_a_state_dict_in_another_dict_is_asked_for():
    with pytest.raises(ci.InputError, match="got 1 entries without any: pass the state dict in it"):
        ci.initialize_({"state_dict": {"a.weight": torch.ones(3, 3, 3, 3)}})
