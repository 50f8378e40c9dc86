"""Models and single weights: what is treated, what is left alone and why, and what stays as it was."""

import copy
import gc
import json
import math
import weakref
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import convsim_init as ci
from convsim_init.initialize import plan
from convsim_init.layers.symbolic.normalized import decide_channels
from convsim_init.metrics.measure import measure_bank

QUICK = ci.Settings(steps=3)


def by_name(report):
    return {layer.name: layer for layer in report.layers}


def zoo():
    """One convolution of each kind."""
    return nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 6, 3),
            "bias_stride_dilation": nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding="valid", bias=True),
            "pointwise": nn.Conv2d(4, 6, 1),
            "non_square": nn.Conv2d(4, 6, (1, 5)),
            "grouped": nn.Conv2d(8, 6, 3, groups=2),
            "conv1d": nn.Conv1d(4, 6, 5),
            "conv3d": nn.Conv3d(2, 4, (1, 3, 2)),
            "transposed": nn.ConvTranspose2d(4, 6, 3),
            "transposed_grouped": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "transposed1d": nn.ConvTranspose1d(4, 6, 3),
            "transposed3d": nn.ConvTranspose3d(2, 4, 2),
            "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        }
    )


def filter_norms(module):
    weight = module.weight.detach().double()
    if module.transposed:
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1).norm(dim=1)


def test_every_kind_of_convolution_is_treated_and_keeps_its_norms():
    model = zoo()
    before = copy.deepcopy(model)
    report = ci.initialize_(model, settings=QUICK)
    assert [layer.name for layer in report.layers] == list(model)
    for layer in report.layers:
        old, new = before[layer.name], model[layer.name]
        assert layer.outcome is ci.Outcome.INITIALIZED, layer
        assert layer.kind == type(new).__name__
        assert layer.shape == list(new.weight.shape)
        options = {"groups": new.groups, "transposed": new.transposed}
        for module, measured in ((old, layer.before), (new, layer.after)):
            weight = module.weight
            torch.testing.assert_close(
                measured["similarity"], ci.convolutional_similarity(weight, **options).item(), rtol=1e-4, atol=0
            )
            normalized = ci.convolutional_similarity(weight, normalized=True, **options).item()
            torch.testing.assert_close(measured["normalized_similarity"], normalized, rtol=1e-4, atol=0)
        assert layer.after["normalized_similarity"] < layer.before["normalized_similarity"]
        torch.testing.assert_close(filter_norms(new), filter_norms(old), rtol=1e-5, atol=0)
        assert layer.after["norm_ratio"] == pytest.approx(1, abs=1e-5)
        assert layer.steps == 3
        assert len(layer.losses) == 4
        assert new.bias is None or torch.equal(new.bias, old.bias)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "one filter per group"),
        (nn.Conv2d(4, 1, 3), "only one filter"),
        (nn.Conv2d(4, 4, 3).requires_grad_(False), "frozen"),
        (nn.LazyConv2d(4, 3), "run a forward pass first"),
        (nn.Conv2d(4, 4, 3, device="meta"), "meta device"),
        (nn.Conv2d(4, 4, 3, dtype=torch.complex64), "torch.complex64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_treated_is_skipped_with_its_reason(module, reason):
    model = nn.Sequential(module, nn.Conv2d(3, 5, 3))
    frozen = {key: value.clone() for key, value in module.state_dict().items() if not hasattr(module, "cls_to_become")}
    report = by_name(ci.initialize_(model, settings=QUICK))
    assert report["0"].outcome is ci.Outcome.SKIPPED
    assert reason in report["0"].reason
    assert report["0"].before == report["0"].after == {}
    assert report["1"].outcome is ci.Outcome.INITIALIZED
    for key, value in frozen.items():
        assert value.is_meta or torch.equal(module.state_dict()[key], value)


def test_a_weight_that_is_no_parameter_is_skipped():
    module = nn.Conv2d(3, 4, 3, bias=False)
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", weight)
    (layer,) = ci.initialize_(module, settings=QUICK).layers
    assert layer.outcome is ci.Outcome.SKIPPED
    assert layer.reason == "its weight is a buffer, which is not trained"


def test_zero_filters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight[1:].zero_()
        model[2].weight[1].zero_()
    report = ci.initialize_(model, settings=QUICK).layers
    assert (report[0].outcome, report[0].reason) == (ci.Outcome.SKIPPED, "all weights are zero")
    assert (report[1].outcome, report[1].reason) == (
        ci.Outcome.SKIPPED,
        "fewer than two filters of a group are not zero",
    )
    assert report[2].outcome is ci.Outcome.INITIALIZED
    assert model[2].weight[1].eq(0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_with_non_finite_weights_is_left_as_it_was_and_called_failed(value):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = value
    before = model[0].weight.clone()
    report = ci.initialize_(model, settings=QUICK).layers
    assert report[0].outcome is ci.Outcome.FAILED
    assert "infinities or NaN" in report[0].reason
    assert torch.equal(model[0].weight.nan_to_num(7), before.nan_to_num(7))
    assert report[1].outcome is ci.Outcome.INITIALIZED


def test_all_channels_make_pairs_of_depthwise_filters():
    model = nn.Conv2d(6, 6, 3, groups=6)
    (layer,) = ci.initialize_(model, settings=ci.Settings(channels="all", steps=5)).layers
    assert layer.outcome is ci.Outcome.INITIALIZED
    assert layer.after["normalized_similarity"] < layer.before["normalized_similarity"]


def test_a_module_and_a_weight_used_twice_are_treated_once():
    shared = nn.Conv2d(3, 3, 3)
    tied = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared, tied, nn.Conv2d(3, 3, 3))
    model[4].weight = tied.weight
    report = by_name(ci.initialize_(model, settings=QUICK))
    assert list(report) == ["0", "3", "4"]
    assert report["4"].outcome is ci.Outcome.SKIPPED
    assert report["4"].reason == "shares its weight with 3"
    assert model[4].weight is tied.weight


@pytest.mark.parametrize(
    ("include", "exclude", "treated"),
    [
        ((), (), ["a.0", "a.1", "b.0"]),
        (("a.*",), (), ["a.0", "a.1"]),
        ((), ("*.0",), ["a.1"]),
        (("a.*", "b.*"), ("a.0",), ["a.1", "b.0"]),
        (("[ab].0",), (), ["a.0", "b.0"]),
    ],
)
def test_layers_are_chosen_by_patterns(include, exclude, treated):
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), "b": nn.Sequential(nn.Conv2d(3, 3, 3))}
    )
    report = ci.initialize_(model, settings=QUICK, include=include, exclude=exclude)
    assert [layer.name for layer in report.layers if layer.outcome is ci.Outcome.INITIALIZED] == treated
    assert {layer.reason for layer in report.layers if layer.name not in treated} <= {"not included", "excluded"}


@pytest.mark.parametrize("name", ["a[0]", "[image]", "conv*", "x?"])
def test_a_name_chooses_its_layer_whatever_its_letters_mean_in_a_pattern(name):
    model = nn.ModuleDict({name: nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3)})
    report = ci.initialize_(model, settings=QUICK, include=[name])
    assert [layer.reason == "not included" for layer in report.layers] == [False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ci.initialize_(nn.Linear(3, 3)), "got Linear, which has none"),
        (lambda: ci.initialize_(zoo(), include=["nope"]), "include: no convolution matches 'nope'"),
        (lambda: ci.initialize_(zoo(), exclude=["plain", "head*"]), r"exclude: no convolution matches 'head\*'"),
        (lambda: ci.initialize_(zoo(), include="plain"), "expected a list of patterns, got the string 'plain'"),
        (lambda: ci.initialize_(zoo(), include=None), "expected a list of patterns such as .*, got None"),
        (lambda: ci.initialize_(zoo(), exclude=(one for one in ["plain"])), "expected a list of patterns .*, got <gen"),
        (lambda: ci.initialize_(zoo(), exclude=[0]), r"expected a list of patterns such as .*, got \[0\]"),
        (lambda: ci.initialize_(zoo(), settings={"steps": 3}), "expected settings of type Settings, got dict"),
        (lambda: ci.initialize_(zoo(), device="gpu"), "expected a device that is here, such as 'cpu', got 'gpu'"),
        (lambda: ci.initialize_(zoo(), device="meta"), "expected a device to compute on, got 'meta'"),
        (lambda: ci.convsim_(torch.ones(3)), "rank 1, without kernels"),
        (lambda: ci.convsim_(nn.Conv2d(3, 3, 3)), "got Conv2d: pass a tensor like conv.weight"),
        (lambda: ci.convsim_(nn.LazyConv2d(3, 3).weight), "got one that cannot: lazy"),
        (lambda: ci.convsim_(torch.ones(3, 3, 3, 3, device="meta")), "got one that cannot: on the meta device"),
        (lambda: ci.convsim_(torch.ones(3, 3, 1, 1).expand(3, 3, 3, 3)), "entries share memory"),
        (lambda: ci.convsim_(torch.ones(4, 3, 3, 3), groups=2.0), "expected groups to divide .*, got 2.0"),
        (lambda: ci.convsim_(torch.rand(8, 3, 3, 3) * 3e38), "the loss or the weights became infinite"),
        (lambda: ci.convolutional_similarity(nn.Conv2d(3, 3, 3)), "got Conv2d"),
        (lambda: ci.ConvolutionalSimilarity(torch.ones(3, 3, 3, 3)), "expected a module to regularize, got Tensor"),
        (lambda: ci.convsim_(torch.full((3, 3, 3, 3), math.nan)), "infinities or NaN"),
        (lambda: ci.convsim_(torch.ones(3, 3, 3, 3, dtype=torch.int8)), "torch.int8"),
        (lambda: ci.Settings(steps=0), "steps: expected a whole number of at least 1, got 0"),
        (lambda: ci.Settings(steps=True), "steps: expected a whole number of at least 1, got type bool"),
        (lambda: ci.Settings(tolerance=-1), "tolerance"),
        (lambda: ci.Settings(tolerance=math.nan), "tolerance"),
        (lambda: ci.Settings(tolerance=False), "tolerance"),
        (lambda: ci.Settings(tolerance=10**400), "tolerance"),
        (lambda: ci.Settings(learning_rate="fast"), "learning_rate to be positive and finite, got 'fast'"),
        (lambda: ci.Settings(learning_rate=0), "learning_rate"),
        (lambda: ci.Settings(norm="keep"), "norm to be one of preserve, free, got 'keep'"),
        (lambda: ci.Settings.preset("best"), "preset to be one of convsim, paper"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ci.InputError, match=message):
        call()


def test_settings_of_numpys_numbers_are_pythons_in_a_report():
    settings = ci.Settings(steps=np.int64(2), tolerance=np.float32(0.5), learning_rate=np.float64(1))
    report = ci.initialize_(nn.Conv2d(3, 8, 3), settings=settings)
    found = json.loads(json.dumps(report.to_dict()))["settings"]
    assert (found["steps"], found["tolerance"], found["learning_rate"]) == (2, 0.5, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_memory_format_and_identity_stay(dtype, memory_format):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3)).to(dtype=dtype, memory_format=memory_format)
    weights = [layer.weight for layer in model]
    before = [(w.stride(), w.data_ptr(), filter_norms(layer)) for w, layer in zip(weights, model, strict=True)]
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    report = ci.initialize_(model, settings=QUICK)
    assert all(layer.outcome is ci.Outcome.INITIALIZED for layer in report.layers)
    for layer, weight, (stride, pointer, norms) in zip(model, weights, before, strict=True):
        assert layer.weight is weight
        assert weight.is_leaf
        assert weight.requires_grad
        assert (weight.dtype, weight.stride(), weight.data_ptr()) == (dtype, stride, pointer)
        torch.testing.assert_close(filter_norms(layer), norms, rtol=8 * torch.finfo(dtype).eps, atol=0)
    ci.initialize_(contiguous, settings=QUICK)
    for one, other in zip(model, contiguous, strict=True):
        assert torch.equal(one.weight, other.weight), "the memory format must not change the result"


def test_the_same_weights_give_the_same_result_and_no_random_state_changes():
    first = zoo()
    second = copy.deepcopy(first)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    ci.initialize_(first, settings=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    ci.initialize_(second, settings=QUICK)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)


def test_no_thread_is_left_behind_that_watches_a_bar_that_is_not_shown(monkeypatch):
    monkeypatch.setattr("tqdm.tqdm.monitor", None)
    ci.initialize_(nn.Sequential(nn.Conv2d(3, 8, 3)), settings=QUICK)
    assert tqdm.monitor is None


def test_one_thread_and_several_give_the_same_bits():
    first = zoo()
    second = copy.deepcopy(first)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ci.initialize_(first, settings=QUICK)
        torch.set_num_threads(3)
        ci.initialize_(second, settings=QUICK)
    finally:
        torch.set_num_threads(threads)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_it_works_under_any_gradient_mode_and_autocast(mode):
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    expected = copy.deepcopy(model)
    ci.initialize_(expected, settings=QUICK)
    with mode():
        ci.initialize_(model, settings=QUICK)
    assert torch.equal(model[0].weight, expected[0].weight)
    weight = expected[0].weight.detach().clone()
    with mode():
        assert ci.convsim_(weight, settings=QUICK) is weight


def test_a_model_born_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))
        report = ci.initialize_(model, settings=QUICK)
    assert all(layer.outcome is ci.Outcome.INITIALIZED for layer in report.layers)


def test_the_paper_preset_under_inference_mode():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    with torch.inference_mode():
        (layer,) = ci.initialize_(model, settings=ci.Settings.paper(steps=2)).layers
    assert layer.outcome is ci.Outcome.INITIALIZED
    assert layer.steps == 2


class Wrapper(nn.Module):
    """What torch.compile returns, as far as this package looks at it, without compiling anything."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, nn.DataParallel, torch.compile, lambda m: Wrapper(nn.DataParallel(m))],
    ids=["like compile", "DataParallel", "compile", "both"],
)
def test_wrappers_are_looked_through(wrap):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    expected = copy.deepcopy(model)
    ci.initialize_(expected, settings=QUICK)
    report = ci.initialize_(wrap(model), settings=QUICK)
    assert [layer.name for layer in report.layers] == ["0"]
    assert torch.equal(model[0].weight, expected[0].weight)


def test_wrappers_inside_a_model_do_not_show_in_names():
    model = nn.ModuleDict({"backbone": Wrapper(nn.Sequential(nn.Conv2d(3, 4, 3)))})
    assert [layer.name for layer in ci.initialize_(model, settings=QUICK).layers] == ["backbone.0"]


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def test_a_parametrized_weight_is_assigned_through_its_parametrization():
    plain, parametrized = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    parametrized.load_state_dict(plain.state_dict())
    nn.utils.parametrize.register_parametrization(parametrized, "weight", Doubled())
    with torch.no_grad():
        parametrized.weight = plain.weight.detach()
    (layer,) = ci.initialize_(parametrized, settings=QUICK).layers
    ci.initialize_(plain, settings=QUICK)
    assert layer.outcome is ci.Outcome.INITIALIZED
    torch.testing.assert_close(parametrized.weight, plain.weight)
    assert parametrized.parametrizations.weight.original.requires_grad


def test_convsim_changes_a_weight_in_place_as_initialize_does():
    for module in zoo().values():
        weight = module.weight.detach().clone()
        assert ci.convsim_(weight, groups=module.groups, transposed=module.transposed, settings=QUICK) is weight
        ci.initialize_(module, settings=QUICK)
        torch.testing.assert_close(weight, module.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 3, 3), (4, 1, 3, 3)], ids=["one filter", "depthwise"])
def test_convsim_leaves_weights_without_pairs_alone(shape):
    weight = torch.randn(shape)
    before = weight.clone()
    ci.convsim_(weight, groups=shape[0])
    assert torch.equal(weight, before)


def test_a_parameter_that_requires_grad_is_changed_and_stays_a_leaf():
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    ci.convsim_(weight, settings=QUICK)
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight.grad is None


def test_a_plan_changes_nothing_and_names_the_same_layers():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    before = copy.deepcopy(model.state_dict())
    planned = plan(model, exclude=["2"])
    done = ci.initialize_(copy.deepcopy(model), settings=QUICK, exclude=["2"])
    assert [layer.outcome.value for layer in planned.layers] == ["planned", "skipped", "skipped"]
    assert [layer.reason for layer in planned.layers] == [layer.reason for layer in done.layers]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_settings_reach_their_figures_on_every_layer_of_a_resnet18(seed):
    report = ci.initialize_(ci.build_model("resnet18", seed=seed))
    for layer in report.layers:
        share = layer.after["normalized_similarity"] / layer.before["normalized_similarity"]
        goal = {1: 0.55, 3: 0.10, 7: 0.45}[layer.shape[-1]]
        assert share <= goal, f"{layer.name}: {share:.1%}"
        assert layer.after["norm_ratio"] == pytest.approx(1, abs=1e-5)


def test_totals_count_outcomes_and_combine_measures():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3))
    report = ci.initialize_(model, settings=QUICK)
    first, _, last = report.layers
    totals = report.totals
    assert (totals["layers"], totals["initialized"], totals["skipped"]) == (3, 2, 1)
    assert totals["before"]["similarity"] == pytest.approx(first.before["similarity"] + last.before["similarity"])
    mean = (first.after["normalized_similarity"] + last.after["normalized_similarity"]) / 2
    assert totals["after"]["normalized_similarity"] == pytest.approx(mean)


def test_free_norms_show_in_the_report():
    model = nn.Conv2d(16, 16, 3)
    before = filter_norms(model)
    (layer,) = ci.initialize_(model, settings=ci.Settings.paper(steps=60)).layers
    assert layer.after["norm_ratio"] < 0.97
    assert layer.after["norm_ratio"] == pytest.approx((filter_norms(model) / before).mean().item(), rel=1e-5)


def test_an_interrupt_ends_the_work_and_puts_the_threads_back(monkeypatch):
    class Bar:
        def __init__(self, **options): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def update(self, done):
            raise KeyboardInterrupt

    monkeypatch.setattr("convsim_init.initialize.tqdm", Bar)
    threads = torch.get_num_threads()
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(6)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        ci.initialize_(model, settings=ci.Settings(steps=5000, tolerance=0), progress=True)
    assert torch.get_num_threads() == threads
    changed = sum(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert changed <= 3, "layers not yet done must not be worked on to the end"


@pytest.mark.cuda
def test_a_model_stays_on_its_device_wherever_its_weights_are_computed():
    on_gpu, on_cpu, by_gpu = (nn.Sequential(nn.Conv2d(16, 32, 3)) for _ in range(3))
    on_gpu.load_state_dict(on_cpu.state_dict())
    by_gpu.load_state_dict(on_cpu.state_dict())
    reports = [
        ci.initialize_(model, settings=QUICK, device=device)
        for model, device in ((on_cpu, None), (on_gpu.cuda(), None), (by_gpu, "cuda"))
    ]
    assert [report.device for report in reports] == ["cpu", "cpu", "cuda:0"]
    assert on_gpu[0].weight.is_cuda
    assert not by_gpu[0].weight.is_cuda
    assert torch.equal(on_gpu[0].weight.cpu(), on_cpu[0].weight)
    torch.testing.assert_close(by_gpu[0].weight, on_cpu[0].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("raw", [1.0, math.inf])
def test_a_layer_that_does_not_improve_stays_as_it_was_to_the_bit(raw, monkeypatch):
    """Over all channels of a wide layer a descent may gain less than rounding costs."""
    calls = []

    def worse_afterwards(bank, channels):
        calls.append(bank)
        found = {name: value + len(calls) for name, value in measure_bank(bank, channels).items()}
        return found | {"similarity": raw * found["similarity"]}

    monkeypatch.setattr("convsim_init.treat.measure_bank", worse_afterwards)
    conv = nn.Conv2d(3, 8, 3)
    before = conv.weight.detach().clone()
    (layer,) = ci.initialize_(conv).layers
    assert (layer.outcome, layer.reason) == (ci.Outcome.SKIPPED, "left as it was: the new weight is no better")
    assert torch.equal(conv.weight, before)


def test_filters_that_are_not_alike_at_all_stay_to_the_bit():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    nn.init.dirac_(model[0].weight)
    before = model[0].weight.detach().clone()
    (layer,) = ci.initialize_(model).layers
    assert (layer.outcome, layer.reason) == (ci.Outcome.SKIPPED, "left as it was: the new weight is no better")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("built_within", [True, False])
@pytest.mark.parametrize(
    "work",
    [
        lambda model, path: ci.initialize_(model),
        lambda model, path: plan(model),
        lambda model, path: ci.convsim_(model[0].weight),
        lambda model, path: ci.measure(model),
        lambda model, path: ci.calibrate_(model, input_shape=(3, 9, 9)),
        lambda model, path: ci.measure_feature_correlation(model, torch.randn(2, 3, 9, 9)),
        lambda model, path: ci.ConvolutionalSimilarity(model),
        lambda model, path: ci.save_checkpoint(model, path),
        lambda model, path: ci.load_checkpoint(model, path.with_name("there.pt")),
    ],
    ids=["initialize", "plan", "convsim", "measure", "calibrate", "correlation", "regularizer", "save", "load"],
)
def test_where_tensors_have_no_data_nothing_is_done(work, built_within, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    ci.save_checkpoint(model, tmp_path / "there.pt")
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)) if built_within else model
        with pytest.raises(ci.InputError, match="a call within FakeTensorMode"):
            work(model, tmp_path / "a.pt")


def test_a_model_of_fake_tensors_is_left_alone(tmp_path):
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert {layer.outcome for layer in ci.initialize_(model).layers} == {ci.Outcome.SKIPPED}
    with pytest.raises(ci.InputError, match="expected a tensor with data"):
        ci.save_checkpoint(model, tmp_path / "a.pt")
    path = ci.save_checkpoint(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), tmp_path / "a.pt")
    with pytest.raises(ci.InputError, match="expected a tensor with data"):
        ci.load_checkpoint(model, path)


class OfClips(nn.Conv2d):
    """Takes an axis more than its class does, as that of time."""

    def forward(self, x):
        samples, times, _, _, _ = x.shape
        return super().forward(x.flatten(0, 1)).unflatten(0, (samples, times))


@pytest.mark.parametrize("kind", [nn.Conv2d, OfClips])
@pytest.mark.parametrize("use", [ci.initialize_, ci.measure, ci.ConvolutionalSimilarity])
def test_nothing_holds_a_model_that_its_user_lets_go(use, kind):
    """The memory of a GPU is free at once, and not when Python next looks for cycles."""
    model = nn.Sequential(kind(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))
    alive = [weakref.ref(one) for one in (*model.modules(), *model.parameters())]
    gc.disable()
    try:
        found = use(model)
        del model
        if use is ci.ConvolutionalSimilarity:
            assert found().requires_grad
            del found
        assert not any(one() is not None for one in alive)
    finally:
        gc.enable()


def test_a_context_that_is_opened_meanwhile_sees_nothing_of_the_call(monkeypatch):
    with ExitStack() as stack:

        def open_context(*args):  # as another thread may after the layers were sampled
            stack.enter_context(ci.initializing())
            return decide_channels(*args)

        monkeypatch.setattr("convsim_init.initialize.decide_channels", open_context)
        report = ci.initialize_(nn.Sequential(nn.Conv2d(3, 8, 3)), settings=QUICK)
    assert report.totals["initialized"] == 1


def test_a_model_of_which_little_is_treated_says_how_much():
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 200)
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    remark = "10.6% of the model's parameters (216 of 2,040) are in layers that are treated"
    assert plan(model).remarks == ci.initialize_(model).remarks == [remark]
    model[5] = nn.Linear(8, 2)
    assert ci.initialize_(model).remarks == []
    chosen = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64))
    assert ci.initialize_(chosen, include=["0"]).remarks == []
    with ci.initializing() as reports:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64))
        torch.optim.SGD(model.parameters())
        model[0].reset_parameters()
        torch.optim.SGD(model.parameters())
    assert [[remark for remark in report.remarks if "parameters" in remark] for report in reports] == [[], []]


def test_a_model_of_which_nothing_is_treated_warns():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(4, 4, 3).requires_grad_(False))
    with pytest.warns(UserWarning, match="no convolution was treated: '0' skipped, lazy.* and 1 more"):
        report = ci.initialize_(model)
    assert [layer.outcome.value for layer in report.layers] == ["skipped", "skipped"]


def test_kernels_of_one_tap_on_one_channel_have_nothing_to_lower():
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8))
    with pytest.warns(UserWarning, match="no convolution was treated"):
        point, depthwise = ci.initialize_(model).layers
    assert (point.channels, point.reason) == (
        "matched",
        "kernels of one tap, compared over all channels: at fixed norms there is nothing to lower",
    )
    assert depthwise.reason == "one filter per group shares its channels with no other"
