import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convsim_init.errors import InputError
from convsim_init.models.build import build_model
from convsim_init.models.zoo import catalog, resnet
from convsim_init.models.zoo.wide_resnet import WideResNet

CIFAR = catalog.names("cifar_*")
IMAGENET = [name for name in catalog.names() if name not in CIFAR]
RESNETS = [name for name in IMAGENET if not name.startswith("vgg")]


@pytest.fixture(scope="module")
def torchvision():
    return pytest.importorskip("torchvision")


def on_meta(name: str) -> nn.Module:
    entry = catalog.MODELS[name]
    family = getattr(import_module(f"convsim_init.models.zoo.{entry.module}"), entry.factory)
    with torch.device("meta"):
        return family(**entry.arguments, num_classes=entry.num_classes, in_chans=entry.in_chans)


def layout(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key


def randomize_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)


@pytest.mark.parametrize("name", IMAGENET)
def test_layout_and_order_are_those_of_torchvision(name, torchvision):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
    assert layout(on_meta(name)) == layout(theirs)
    assert [n for n, _ in on_meta(name).named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("name", RESNETS)
def test_keys_and_shapes_are_those_of_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(name, pretrained=False)
    assert sorted(layout(on_meta(name)), key=str) == sorted(layout(theirs), key=str)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "vgg11", "vgg11_bn"])
def test_weights_are_those_of_torchvision_under_the_same_seed(name, torchvision):
    torch.manual_seed(5)
    assert_same_weights(build_model(name, seed=5), torchvision.models.get_model(name, weights=None))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg11"])
def test_forward_in_eval_mode_is_that_of_torchvision(name, torchvision):
    ours, theirs = build_model(name).eval(), torchvision.models.get_model(name, weights=None).eval()
    randomize_batch_norm(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 65, 79)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_forward_in_train_mode_is_that_of_torchvision(name, torchvision):
    ours, theirs = build_model(name), torchvision.models.get_model(name, weights=None)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 3, 64, 64)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(9)  # for dropout
        outputs.append(model(x))
    assert torch.equal(*outputs)
    assert_same_weights(ours, theirs)  # the running statistics moved alike


def test_cifar_resnet_is_torchvisions_with_another_stem(torchvision):
    ours, theirs = build_model("cifar_resnet18").eval(), torchvision.models.resnet18(num_classes=10).eval()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    assert layout(ours) == layout(theirs)
    randomize_batch_norm(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_cifar_vgg_is_torchvisions_features_and_one_linear_layer(torchvision):
    ours, theirs = build_model("cifar_vgg19").eval(), torchvision.models.vgg19_bn(init_weights=False).features.eval()
    randomize_batch_norm(ours)
    theirs.load_state_dict(ours.features.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), ours.classifier(theirs(x).flatten(1)))


def wide_resnet_by_formula(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    def activated(x: Tensor, key: str) -> Tensor:
        mean, var, scale, shift = (weights[f"{key}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, scale, shift))

    x = F.conv2d(x, weights["conv1.weight"], padding=1)
    for block in sorted({key.rsplit(".", 2)[0] for key in weights if key.startswith("block")}):
        stride = 2 if block in ("block2.layer.0", "block3.layer.0") else 1
        first = activated(x, f"{block}.bn1")
        if f"{block}.convShortcut.weight" in weights:
            x = F.conv2d(first, weights[f"{block}.convShortcut.weight"], stride=stride)
        second = activated(F.conv2d(first, weights[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn2")
        x = x + F.conv2d(second, weights[f"{block}.conv2.weight"], padding=1)
    return F.linear(activated(x, "bn1").mean((2, 3)), weights["fc.weight"], weights["fc.bias"])


@pytest.mark.parametrize("widen", [1, 3])
def test_wide_resnet_computes_its_formula(widen):
    model = WideResNet(depth=16, widen=widen, num_classes=7, in_chans=2).double().eval()
    randomize_batch_norm(model)
    x = torch.randn(2, 2, 19, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wide_resnet_by_formula(model.state_dict(), x))


# The counts of the README of szagoruyko/wide-residual-networks (36.5 M) and of the networks of kuangliu/pytorch-cifar.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cifar_resnet18", 11_173_962), ("cifar_vgg19", 20_040_522), ("cifar_wide_resnet28_10", 36_479_194)],
)
def test_cifar_parameter_counts_are_the_published_ones(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_models_take_32x32_images(name):
    model = build_model(name).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 32, 32))
    assert out.shape == (1, 10)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_vgg19"])
def test_cifar_resnet_and_vgg_keep_pytorchs_initialization(name):
    for module in build_model(name).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5  # nn.Conv2d and nn.Linear draw from U(-bound, bound)
            assert 0.98 * bound < module.weight.abs().max() <= bound
            if module.bias is not None:
                assert 0 < module.bias.abs().max() <= bound


def test_wide_resnet_initialization_is_zagoruykos():
    model = build_model("cifar_wide_resnet28_10")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.weight[0, 0].numel() * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert (model.fc.bias == 0).all()
    assert 0 < model.fc.weight.abs().max() <= 640**-0.5


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet18", "cifar_vgg19", "cifar_wide_resnet28_10"])
def test_num_classes_and_in_chans_are_honoured(name):
    model = build_model(name, num_classes=3, in_chans=1).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)


def test_vgg_honours_num_classes_and_in_chans():
    model = build_model("vgg11", num_classes=1, in_chans=5)
    assert model.features[0].in_channels == 5
    assert model.classifier[6].out_features == 1


def test_the_seed_decides_the_weights():
    first, again, other = (build_model("cifar_resnet18", seed=seed) for seed in (3, 3, 4))
    assert_same_weights(first, again)
    for key, weight in first.named_parameters():
        if weight.ndim > 1:
            assert not torch.equal(weight, other.get_parameter(key)), key


@pytest.mark.parametrize("seed", [0, 2**63 - 1], ids=["smallest", "largest"])
def test_seeds_at_the_ends_of_the_range_work(seed):
    assert build_model("cifar_resnet18", seed=seed).training


def test_the_callers_random_state_is_left_alone():
    before = torch.get_rng_state()
    build_model("cifar_resnet18", seed=11)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
def test_the_callers_cuda_random_state_is_left_alone():
    before = torch.cuda.get_rng_state()
    build_model("cifar_resnet18", seed=11)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_by_default")
def test_the_callers_default_dtype_and_device_change_nothing():
    with torch.device("meta"):
        model = build_model("cifar_resnet18", seed=2)
        assert torch.empty(1).device.type == "meta"
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)
    assert_same_weights(model, build_model("cifar_resnet18", seed=2))
    for weight in model.parameters():
        assert weight.device.type == "cpu"
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()


@pytest.mark.usefixtures("float64_by_default")
def test_a_build_that_fails_leaves_the_callers_state_alone(monkeypatch):
    def fail(**_: object) -> None:
        torch.rand(1)
        raise RuntimeError("no memory")

    monkeypatch.setattr(resnet, "ResNet", fail)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no memory"):
        build_model("resnet18", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float64


LARGEST = "9223372036854775807"


WHOLE = "{}: expected a whole number {}, got {}; pass one in that range or leave it out"
REFUSED = [
    (18, {}, "spec: expected a model's name, got type int; pass a string such as 'resnet18'"),
    *(
        ("resnet18", {name: value}, WHOLE.format(name, span, got))
        for name, value, span, got in [
            ("num_classes", 0, "of at least 1", "0"),
            ("num_classes", True, "of at least 1", "type bool"),
            ("num_classes", "10", "of at least 1", "type str"),
            ("num_classes", torch.ones(3, 3), "of at least 1", "type Tensor"),
            ("in_chans", -3, "of at least 1", "-3"),
            ("in_chans", 3.0, "of at least 1", "type float"),
            ("seed", -1, f"from 0 to {LARGEST}", "-1"),
            ("seed", 2**63, f"from 0 to {LARGEST}", "9223372036854775808"),
            ("seed", None, f"from 0 to {LARGEST}", "type NoneType"),
        ]
    ),
    (
        "resnet18",
        {"width": 2, "dropout": 0.1},
        "resnet18: a built-in model takes only num_classes and in_chans, got width, dropout; leave that out",
    ),
]


@pytest.mark.parametrize(("spec", "arguments", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(spec, arguments, message):
    with pytest.raises(InputError) as caught:
        build_model(spec, **arguments)
    assert str(caught.value) == message
    assert "\n" not in message


def test_numpy_integers_are_whole_numbers():
    numpy = pytest.importorskip("numpy")
    assert build_model("cifar_resnet18", num_classes=numpy.int64(4)).fc.out_features == 4


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("cifar_*", ["cifar_resnet18", "cifar_vgg19", "cifar_wide_resnet28_10"]),
        ("resnext???_*", ["resnext101_32x8d", "resnext101_64x4d"]),
        ("vgg1[13]", ["vgg11", "vgg13"]),
        ("RESNET*", []),
        ("", []),
    ],
)
def test_names_match_a_pattern(pattern, expected):
    assert catalog.names(pattern) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ResNet-18", "resnet18"),
        ("VGG16BN", "vgg16_bn"),
        ("resnext50", "resnext50_32x4d"),
        ("wide_resnet28_10", "cifar_wide_resnet28_10"),
    ],
)
def test_the_closest_name_comes_first(typed, expected):
    assert catalog.closest(typed)[0] == expected
    assert len(catalog.closest(typed)) <= 3


@pytest.mark.parametrize("typed", ["", "convnext_tiny_in22k"])
def test_nothing_is_close_to_a_strange_name(typed):
    assert catalog.closest(typed) == []


def test_every_name_is_listed_once_with_a_line_about_it():
    assert catalog.names() == list(catalog.MODELS)
    assert len(catalog.names()) == 21
    for name, entry in catalog.MODELS.items():
        assert entry.name == name
        assert entry.summary
        assert "\n" not in entry.summary


def test_importing_the_models_does_not_import_torch():
    script = (
        "import sys; import convsim_init.models.build; from convsim_init.models.zoo import catalog; catalog.names(); "
    )
    done = subprocess.run(
        [sys.executable, "-c", script + "print('torch' in sys.modules)"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
