"""Models of torchvision, timm and the user's own code: what is built, how often, and what is refused how."""

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from folders import OLD
from torch import nn

import convsim_init
from convsim_init.cli.arguments import parse_arguments
from convsim_init.errors import InputError
from convsim_init.files.sources import READ_SUFFIXES
from convsim_init.models.build import build_model
from convsim_init.models.libraries import resolve
from convsim_init.models.spec import Source, Spec, parse
from convsim_init.models.zoo.catalog import UnknownModelError

ROOT = Path(__file__).parents[2]
FORMS = "a model's name, torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory"

NET = """
import random
import sys

import numpy
import torch
from torch import nn

import blocks

print("net is imported")
torch.rand(3), random.random(), numpy.random.rand()
model = nn.Conv2d(1, 2, 3)
number = 3


def make(width=4, *, num_classes=2, depth=1):
    print("net is made")
    layers = [blocks.conv(3 if index == 0 else width, width) for index in range(depth)]
    return nn.Sequential(*layers, nn.Linear(width, num_classes)).eval()


def drawn():
    made = make(3)
    with torch.no_grad():
        made[0].bias.copy_(torch.tensor([random.random(), numpy.random.rand(), 0.5]))
    return made


def needs(width):
    return make(width)


class Net(nn.Module):
    def __init__(self, in_chans=3):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 4, 3)

    @classmethod
    def wide(cls):
        return cls(in_chans=7)


class Plain:
    pass


def raises():
    raise ValueError("two\\nlines")


def leaves():
    sys.exit(3)


class Strange(BaseException):
    pass


def strange():
    raise Strange(4)


def nothing():
    pass


def pair():
    return make(), 3


def interrupted():
    raise KeyboardInterrupt


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3, device="meta"))


def compiled():
    return torch.compile(make())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the user's own code, which nobody has imported yet."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "blocks.py").write_text("from torch import nn\n\n\ndef conv(a, b):\n    return nn.Conv2d(a, b, 3)\n")
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "failing.py").write_text("raise OSError('no disk')\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Specs


@pytest.mark.parametrize(
    ("text", "source", "place", "name"),
    [
        ("resnet18", Source.BUILT_IN, "", "resnet18"),
        ("resnet34d", Source.ANY, "", "resnet34d"),
        ("torchvision:resnet18", Source.TORCHVISION, "", "resnet18"),
        ("timm:resnet50.a1_in1k", Source.TIMM, "", "resnet50.a1_in1k"),
        ("timm:hf-hub:timm/resnet18", Source.TIMM, "", "hf-hub:timm/resnet18"),
        ("timm.models:resnet18", Source.MODULE, "timm.models", "resnet18"),
        ("package.module:Class.method", Source.MODULE, "package.module", "Class.method"),
        ("a/b c/net.py:make", Source.FILE, "a/b c/net.py", "make"),
        ("C:\\nets\\net.py:make", Source.FILE, "C:\\nets\\net.py", "make"),
        ("a:b/init.safetensors", Source.CHECKPOINT, "a:b/init.safetensors", ""),
        ("init.pt", Source.CHECKPOINT, "init.pt", ""),
    ],
)
def test_a_spec_names_its_source(text, source, place, name):
    assert parse(text) == Spec(text, source, place, name)


# Libraries


@pytest.mark.parametrize("name", ["squeezenet1_1", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_torchvisions_models_are_built_as_it_builds_them(name, monkeypatch):
    models = pytest.importorskip("torchvision").models
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("it downloads weights"))
    parameters = {} if name == "squeezenet1_1" else {"weights_backbone": None}
    torch.manual_seed(3)
    theirs = models.get_model(name, weights=None, **parameters)
    ours = build_model(f"torchvision:{name}", seed=3)
    assert same_weights(ours, theirs)
    assert ours.training


@pytest.mark.parametrize(
    "name", ["googlenet", "inception_v3", "r3d_18", "fcn_resnet50", "fasterrcnn_mobilenet_v3_large_fpn", "raft_small"]
)
def test_torchvisions_other_models_are_built_without_a_warning(name, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("it downloads weights"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_model(f"torchvision:{name}").training


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "resnet18.a1_in1k"])
def test_timms_models_are_built_as_it_builds_them(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    theirs = timm.create_model(name, pretrained=False, num_classes=5, in_chans=1)
    assert same_weights(build_model(f"timm:{name}", seed=3, num_classes=5, in_chans=1), theirs)


def test_arguments_reach_the_library():
    pytest.importorskip("timm")
    assert build_model("timm:resnet10t", output_stride=8).layer4[0].conv1.dilation == (2, 2)
    assert build_model("torchvision:squeezenet1_1", num_classes=4, dropout=0.25).classifier[0].p == 0.25


@pytest.mark.parametrize(
    ("name", "found", "remark"),
    [
        ("resnet18", "resnet18", None),
        ("timm:resnet18", "timm:resnet18", None),
        ("resnet10t", "timm:resnet10t", "resnet10t was taken from timm"),
        ("r3d_18", "torchvision:r3d_18", "r3d_18 was taken from torchvision"),
        (
            "convnext_tiny",
            "torchvision:convnext_tiny",
            "convnext_tiny was taken from torchvision; timm has one of that name too, whose keys may differ: "
            "timm:convnext_tiny",
        ),
    ],
)
def test_a_bare_name_is_looked_up_and_it_is_told_where_it_was_found(name, found, remark):
    pytest.importorskip("timm")
    resolved = resolve(name)
    assert (resolved.text, resolved.remark) == (found, remark)


def test_a_bare_name_builds_what_it_was_resolved_to():
    pytest.importorskip("timm")
    assert same_weights(build_model("resnet10t", seed=1), build_model("timm:resnet10t", seed=1))


# The user's own code


@pytest.mark.parametrize("place", ["net", "net.py", "{}/net.py"])
def test_a_factory_is_called_with_what_was_given_and_no_more(place, folder, capsys):
    spec = place.format(folder)
    model = build_model(f"{spec}:make", width=6, num_classes=3, depth=2)
    assert [tuple(weight.shape) for weight in model.parameters() if weight.ndim > 1] == [
        (6, 3, 3, 3),
        (6, 6, 3, 3),
        (3, 6),
    ]
    assert model.training
    assert build_model(f"{spec}:Net", in_chans=1).conv.in_channels == 1
    assert build_model(f"{spec}:Net.wide").conv.in_channels == 7
    assert capsys.readouterr().out == ""


def test_what_the_users_code_prints_goes_to_stderr(folder, capsys):
    build_model("net.py:make")
    assert capsys.readouterr() == ("", "net is imported\nnet is made\n")


@pytest.mark.parametrize("place", ["net", "net.py"])
def test_the_search_path_is_left_as_it_was(place, folder, monkeypatch):
    monkeypatch.setattr(sys, "path", ["somewhere", *sys.path])
    before = sys.path.copy()
    build_model(f"{place}:make")
    with pytest.raises(InputError):
        build_model(f"{place}:raises")
    assert sys.path == before


@pytest.mark.parametrize("spec", ["net:drawn", "net.py:drawn", "timm:resnet10t"])
def test_the_same_spec_and_seed_give_the_same_bits_and_the_callers_random_states_stay(spec, folder):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())

    before = states()
    first, again, other = (build_model(spec, seed=seed) for seed in (2**40, 2**40, 5))  # the first one imports
    assert states() == before
    assert same_weights(first, again)
    assert not same_weights(first, other)
    if spec.endswith("drawn"):
        assert all(a != b for a, b in zip(first[0].bias[:2].tolist(), other[0].bias[:2].tolist(), strict=True))


def test_files_of_two_folders_import_each_its_own_neighbours(folder):
    for name, width in (("a", 5), ("b", 6)):
        (folder / name).mkdir()
        (folder / name / "neighbour.py").write_text(f"width = {width}\n")
        text = "import neighbour\nfrom torch import nn\n\n\ndef make():\n    return nn.Conv2d(3, neighbour.width, 3)\n"
        (folder / name / "net.py").write_text(text)
    widths = [build_model(f"{name}/net.py:make").out_channels for name in ("a", "b", "a")]
    assert widths == [5, 6, 5]


def test_files_of_two_folders_import_each_its_own_part_of_a_package(folder):
    text = "import pack{}\nfrom torch import nn\n\n\ndef make():\n    return nn.Conv2d(3, {}, 3)\n"
    for name, width in (("a", 5), ("b", 6)):
        (folder / name / "pack").mkdir(parents=True)
        (folder / name / "pack" / "__init__.py").write_text("")
        (folder / name / "pack" / "part.py").write_text(f"width = {width}\n")
        (folder / name / "first.py").write_text(text.format("", 4))
        (folder / name / "second.py").write_text(text.format(".part", "pack.part.width"))
    files = ("a/first", "a/second", "b/second", "a/second")  # the first leaves the part to the second
    assert [build_model(f"{file}.py:make").out_channels for file in files] == [4, 5, 6, 5]


def test_a_module_that_imports_more_once_it_is_asked_for_something_is_not_asked(folder):
    lazy = """
import sys
from types import ModuleType
from torch import nn


class Lazy(ModuleType):
    def __getattr__(self, name):
        raise ImportError(f"{name} needs what is not installed")


sys.modules["lazy_part"] = Lazy("lazy_part")


def make():
    return nn.Conv2d(3, 4, 3)
"""
    (folder / "lazy.py").write_text(lazy)
    try:
        assert build_model("lazy.py:make").out_channels == 4
    finally:
        del sys.modules["lazy_part"]


def test_a_file_is_run_once_and_again_when_it_was_edited(folder, capsys):
    path = folder / "net.py"
    build_model("net.py:make")
    build_model("net.py:Net")
    assert capsys.readouterr().err.count("net is imported") == 1
    path.write_text(NET.replace("width=4", "width=9"))
    os.utime(path, ns=(1, 1))
    assert build_model("net.py:make")[0].out_channels == 9


def test_a_file_may_bear_the_name_of_an_imported_module(folder):
    json_module = sys.modules["json"]
    (folder / "json.py").write_text((folder / "net.py").read_text())
    assert build_model("json.py:make")[0].out_channels == 4
    assert sys.modules["json"] is json_module


@pytest.mark.parametrize("factory", ["lazy", "compiled"])
def test_models_without_data_and_wrapped_ones_are_built(factory, folder):
    assert isinstance(build_model(f"net.py:{factory}"), nn.Module)


@pytest.mark.parametrize("place", ["net", "net.py"])
def test_an_interrupt_in_the_users_code_stays_one(place, folder):
    with pytest.raises(KeyboardInterrupt):
        build_model(f"{place}:interrupted")


# Arguments


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-0.5", -0.5),
        ("1e-3", 1e-3),
        ("[1, 2]", [1, 2]),
        ("(3, 4)", (3, 4)),
        ("{'a': None}", {"a": None}),
        ("'3'", "3"),
        ("relu", "relu"),
        ("a=b", "a=b"),
        ("", ""),
        ("torch.nn.ReLU", "torch.nn.ReLU"),
        ("__import__('os')", "__import__('os')"),
        ("9**9**9", "9**9**9"),
        *((word, True) for word in ("True", "true", "TRUE")),
        *((word, False) for word in ("False", "false")),
        *((word, None) for word in ("None", "none", "null")),
    ],
)
def test_values_are_literals_or_else_text(text, value):
    parsed = parse_arguments([f"key={text}"])["key"]
    assert (parsed, type(parsed)) == (value, type(value))


def test_arguments_reach_the_factory_from_every_command(folder, command):
    monkey = ["net.py:make", "--model-arg", "width=6", "--num-classes", "3"]
    status, out, _ = command(*monkey, "--json", "--steps", "1", "--out", "init.safetensors")
    assert (status, json.loads(out)["model"]) == (0, "net.py:make")
    assert safetensors.torch.load_file("init.safetensors")["1.weight"].shape == (3, 6)
    assert json.loads(command("inspect", *monkey, "--json")[1])["layers"][0]["shape"] == [6, 3, 3, 3]
    compared = json.loads(command("compare", *monkey, "init.safetensors", "--json")[1])
    assert compared["layers"][0]["shapes"] == [[6, 3, 3, 3]] * 2


def test_a_report_tells_where_a_bare_name_was_found(command):
    pytest.importorskip("timm")
    remark = "resnet10t was taken from timm"
    for arguments in (["resnet10t", "--dry-run"], ["inspect", "resnet10t"]):
        data = json.loads(command(*arguments, "--json")[1])
        assert (data["model"], data["remarks"]) == ("timm:resnet10t", [remark])
        assert f"\n{remark}\n" in command(*arguments)[1]
    assert json.loads(command("compare", "resnet10t", "resnet10t", "--json")[1])["compared"] == ["timm:resnet10t"] * 2


# The list


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("timm:resnet10t", ["timm:resnet10t"]),
        ("torchvision:raft_*", ["torchvision:raft_large", "torchvision:raft_small"]),
        ("r3d_*", ["torchvision:r3d_18"]),
        ("resnet1[08]t", ["timm:resnet10t"]),
        ("vgg11*", ["vgg11", "vgg11_bn"]),
    ],
)
def test_the_list_shows_the_libraries_models(pattern, expected, command):
    pytest.importorskip("timm")
    status, out, err = command("list", pattern)
    assert (status, err, [line.split()[0] for line in out.splitlines()]) == (0, "", expected)
    assert [entry["name"] for entry in json.loads(command("list", pattern, "--json")[1])] == expected


@pytest.mark.parametrize(
    ("spec", "declined"),
    [
        ("torchvision:squeezenet1_1", {"weights": None, "pretrained": False}),
        ("timm:resnet10t", {"pretrained": False, "checkpoint_path": ""}),
    ],
)
def test_weights_that_are_declined_need_not_be_left_out(spec, declined):
    pytest.importorskip(spec.partition(":")[0])
    states = [build_model(spec, **arguments).state_dict() for arguments in (declined, {})]
    assert all(map(torch.equal, states[0].values(), states[1].values()))


def test_the_list_of_a_library_is_its_own(command):
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    assert command("list", "timm:*")[1].split() == [f"timm:{name}" for name in timm.list_models()]
    theirs = [f"torchvision:{name}" for name in torchvision.models.list_models()]
    assert command("list", "torchvision:*")[1].split() == theirs


def test_the_list_names_the_others_to_people_only(command, monkeypatch):
    assert command("list")[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "convsim-init list 'timm:*'" in command("list")[2]
    assert command("list", "vgg11")[2] == ""


# What is refused

DEBUG = "--debug shows where"
NOT_HERE = "neither in this folder nor installed"
BAD = [
    ("resnet81", "expected the name of a model, got 'resnet81': did you mean resnet18 or timm:"),
    ("Convnext-Tiny", "got 'Convnext-Tiny': did you mean torchvision:convnext_tiny"),
    ("net.make", "expected the name of a model, got 'net.make': did you mean net:make?"),
    ("me/net", "expected the name of a model, got 'me/net': did you mean hf-hub:me/net?"),
    ("timm.resnt18", "got 'timm.resnt18': did you mean resnet18 or timm:"),
    ("net.", "expected the name of a model, got 'net.': for all names run"),
    ("~/net", "expected a model's name or a path, got '~/net', which is neither: check the path"),
    ("runs/first/last", "expected a model's name or a path, got 'runs/first/last', which is neither: check the path"),
    ("https://host/me/net", "got the address 'https://host/me/net': nothing is downloaded here"),
    ("torchvision:resnet81", "expected the name of a model of torchvision, got 'resnet81': did you mean torchvision:"),
    ("timm:resnt10t", "expected the name of a model of timm, got 'resnt10t': did you mean timm:resnet10t"),
    ("timm:resnet18.nonsense", "timm:resnet18.nonsense raised RuntimeError: Invalid pretrained tag (nonsense)"),
    ("timm:hf-hub:timm/resnet18", "expected the name of a model of timm, got 'hf-hub:timm/resnet18'"),
    ("timm:local-dir:.", "expected the name of a model of timm, got 'local-dir:.'"),
    ("timm:", "name a model: timm:NAME"),
    ("torchvision:resnet18 --in-chans 1", "torchvision's models take no in_chans"),
    (
        "torchvision:squeezenet1_1 --model-arg foo=1",
        "raised TypeError: SqueezeNet.__init__() got an unexpected keyword",
    ),
    ("timm:resnet10t --model-arg foo=1", "unexpected keyword argument 'foo'"),
    ("torchvision:resnet18 --model-arg weights=DEFAULT", "yet to be trained, got weights: leave it out"),
    ("timm:resnet18 --model-arg pretrained=true", "yet to be trained, got pretrained: leave it out"),
    ("resnet18 --model-arg width=3", "a built-in model takes only num_classes and in_chans, got width"),
    ("gone.py:make", "expected a Python file to read, got 'gone.py', which is none"),
    ("nett.py:make", "did you mean net.py?"),
    ("NET.py:make", "did you mean net.py?"),
    ("old.pt:make", "expected a Python file, got 'old.pt': put the function into one that ends in .py"),
    ("own.py:make", "expected a Python file to read, got 'own.py'"),
    ("", f"expected {FORMS}, got '': name one"),
    ("net.py", "name the function in it that returns the model: net.py:FUNCTION"),
    (r"C:\nets\net.py", r"name the function in it that returns the model: C:\nets\net.py:FUNCTION"),
    ("net-1.txt:make", f"expected {FORMS}, got 'net-1.txt:make'"),
    ("net.py:", "after the colon stands the name of a function or class"),
    ("net.py:make()", "after the colon stands the name of a function or class"),
    ("./net:make", "before the colon stands a module's name or a path that ends in .py"),
    ("hf_hub:me/net", "after the colon stands the name of a function or class: did you mean hf-hub?"),
    ("Timm:resnet18", f"got 'Timm': it is {NOT_HERE}: did you mean timm?"),
    ("hf-hub:timm", "expected a model whose config is in the local cache of Hugging Face, got 'hf-hub:timm'"),
    ("nowhere.net:make", f"expected a module that can be imported, got 'nowhere.net': it is {NOT_HERE}"),
    ("net.sub:make", "expected a module that can be imported, got 'net.sub': there is no 'net.sub'"),
    ("own:make", f"importing own raised ModuleNotFoundError: No module named 'not_there_at_all'; {DEBUG}"),
    ("broken.py:make", "broken.py raised SyntaxError"),
    ("failing.py:make", f"failing.py raised OSError: no disk; {DEBUG}"),
    ("net.py:mak", "expected the name of a function or class in net.py, got 'mak': did you mean make"),
    ("net:Net.wid", "expected the name of a function or class in net, got 'Net.wid': did you mean wide"),
    ("net.py:model", "expected a function or class, got a model: name a function that returns a model"),
    ("net.py:number", "expected a function or class, got int, which cannot be called"),
    ("net.py:Plain", "net.py:Plain: expected it to return a torch.nn.Module, got type Plain"),
    ("net.py:nothing", "expected it to return a torch.nn.Module, got None"),
    ("net.py:pair", "expected it to return a torch.nn.Module, got type tuple: return the model alone"),
    ("net.py:raises", f"net.py:raises raised ValueError: two lines; {DEBUG}"),
    ("net.py:leaves", f"net.py:leaves raised SystemExit: 3; {DEBUG}"),
    ("net.py:strange", f"net.py:strange raised Strange: 4; {DEBUG}"),
    ("net.py:needs", "expected arguments that fit (width), got none: missing a required argument: 'width'; give it"),
    (
        "net.py:make --in-chans 1 --model-arg foo=1",
        "expected arguments that fit (width=4, *, num_classes=2, depth=1), got in_chans, foo: got an unexpected",
    ),
    ("net.py:make --model-arg width='x'", "net.py:make raised TypeError"),
    *(
        (f"net.py:make --model-arg {text}", f"--model-arg: {words}")
        for text, words in [
            ("width", "expected KEY=VALUE with the name of an argument as KEY, got 'width'"),
            ("=3", "expected KEY=VALUE with the name of an argument as KEY, got '=3'"),
            ("a.b=3", "expected KEY=VALUE with the name of an argument as KEY, got 'a.b=3'"),
            ("width=1 --model-arg width=2", "expected each argument once, got 'width' twice"),
            ("num_classes=3", "num_classes has an option of its own: use --num-classes"),
            ("seed=3", "seed has an option of its own: use --seed"),
            ("width=[1,2", "expected a Python literal such as [1, 2] or 'text' for 'width', got '[1,2'"),
            ("width=[relu]", "expected a Python literal such as [1, 2] or 'text' for 'width', got '[relu]'"),
            (f"width={'(' * 900}", "expected a Python literal such as [1, 2] or 'text' for 'width', got '(((("),
            (f"width={'[' * 100_000}", "expected a value of at most 1000 characters for 'width', got 100000"),
        ]
    ),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[arguments[:60] for arguments, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(arguments, words, folder, command):
    pytest.importorskip("timm")
    (folder / "old.pt").write_bytes(OLD)
    before = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    status, out, err = command(*arguments.split(" "), "--out", "old.pt", "--force")
    assert (status, out) == (2, "")
    *printed, line = err.splitlines()
    assert set(printed) <= (set() if "--model-arg:" in words else {"net is imported", "net is made"})
    assert line.startswith("Error: ")
    assert words in line
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before
    assert (folder / "old.pt").read_bytes() == OLD


@pytest.mark.parametrize("missing", [["timm"], ["torchvision", "timm"]], ids=" ".join)
def test_a_library_that_is_not_installed_is_named_with_its_extra(missing, command, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    line = "Error: timm:resnet18 needs the package timm, which is not installed: pip install 'convsim-init[timm]'\n"
    assert command("timm:resnet18") == (2, "", line)
    status, _, err = command("resnet81")
    assert status == 2
    assert err.endswith(f"run `convsim-init list`; pip install 'convsim-init[{','.join(missing)}]' for more\n")
    assert "did you mean resnet18" in err


def test_a_name_is_unknown_to_python_callers_too():
    for spec in ("timm:resnet81", "torchvision:resnet81", "resnet81"):
        with pytest.raises(UnknownModelError):
            build_model(spec)


@pytest.mark.parametrize("suffix", READ_SUFFIXES)
def test_a_checkpoint_is_no_model_to_build(suffix):
    with pytest.raises(InputError, match=f"expected a model to build, got the checkpoint 'weights{suffix}'"):
        build_model(f"weights{suffix}")


def test_options_of_the_command_are_not_for_python_callers(folder):
    with pytest.raises(InputError, match=r"^net\.py:raises raised ValueError: two lines$"):
        build_model("net.py:raises")


def test_a_debugged_error_shows_the_users_line(folder, command):
    status, _, err = command("net.py:raises", "--debug")
    assert status == 2
    assert 'raise ValueError("two\\nlines")' in err


# As a process of its own

QUICKLY = """
import sys
blocked = sys.argv.pop(1)
if blocked:
    sys.modules[blocked] = None
from convsim_init.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", *{"torch", "numpy", "timm"} & sys.modules.keys() - {blocked}, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("blocked", "arguments"),
    [
        ("timm", ["timm:resnet18"]),
        ("torchvision", ["torchvision:resnet18"]),
        ("", ["torchvision:resnet18", "--in-chans", "1"]),
        ("", ["timm:resnet18", "--model-arg", "pretrained=True"]),
        ("", ["gone.py:make"]),
        ("", ["nowhere.net:make"]),
        ("", ["net.py"]),
        ("", ["resnet18", "--model-arg", "width=[1"]),
        ("", ["inspect", "gone.py:make"]),
        ("", ["compare", "resnet18", "nowhere.net:make"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_needs_no_torch_is_refused_without_importing_it(blocked, arguments, tmp_path):
    process = [sys.executable, "-c", QUICKLY, blocked, *arguments]
    done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["imported:"]


MISFIT = """
import sys
class Misfit:
    def find_spec(self, name, *_):
        if name == "torchvision.extension" or name == "torchvision._meta_registrations":
            raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Misfit())
from convsim_init.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["timm:resnet18"],
        ["torchvision:resnet18"],
        ["list", "timm:*"],
        ["resnet81"],
        ["transformers:ResNetForImageClassification"],
    ],
    ids=" ".join,
)
def test_a_torchvision_that_does_not_fit_torch_is_named_with_the_remedy(arguments, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    process = [sys.executable, "-c", MISFIT, *arguments]
    done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    cause = "RuntimeError: operator torchvision::nms does not exist"
    assert f"does not fit torch {torch.__version__} ({cause})" in done.stderr
    assert "install both from the same place" in done.stderr
    assert ("did you mean resnet18" in done.stderr) == (arguments == ["resnet81"])


def test_the_same_command_writes_the_same_bytes_of_the_users_own_model(folder):
    for name in ("a.safetensors", "b.safetensors"):
        command = [sys.executable, "-m", "convsim_init", "net.py:drawn", "--steps", "1", "--out", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert (done.returncode, done.stderr) == (0, "net is imported\nnet is made\n")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_every_source_is_in_the_help(command):
    text = " ".join(command("--help")[1].split())
    for words in ("torchvision:NAME", "timm:NAME", "package.module:function", "path/to/file.py:function"):
        assert words in text


# Of a class of the user's nothing is called but its constructor and, in a trial, its forward

OVERRIDDEN = ["train", "eval", "to", "half", "float", "apply", "cuda", "cpu", "requires_grad_", "zero_grad", "_apply"]


class Willful(nn.Module):
    """Means something else by the names of methods, as a class that starts to train on `train` does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.conv.training = False


def _refused(self, *_, **__):
    raise AssertionError("called")


for _method in OVERRIDDEN:
    setattr(Willful, _method, _refused)


def test_no_method_with_another_meaning_is_called(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "willful", sys.modules[__name__])
    model = build_model("willful:Willful")
    assert all(module.training for module in model.modules())
    report = convsim_init.initialize_(model, settings=convsim_init.Settings(steps=2))
    convsim_init.measure(model)
    convsim_init.draw_base_(model, "orthogonal")
    path = convsim_init.save_checkpoint(model, tmp_path / "a.pt", report=report)
    assert convsim_init.load_checkpoint(build_model("willful:Willful"), path, strict=True).exact
    assert not Willful().conv.training


def test_a_file_that_parses_the_command_line_sees_none_of_our_arguments(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(
        "import argparse\nfrom torch import nn\n"
        "args = argparse.ArgumentParser().parse_args()\n"
        "def build(): return nn.Sequential(nn.Conv2d(3, 8, 3))\n"
    )
    monkeypatch.setattr(sys, "argv", arguments := ["convsim-init", "train.py:build", "--dry-run"])
    assert build_model(f"{tmp_path / 'train.py'}:build")[0].out_channels == 8
    assert sys.argv is arguments


def test_a_relative_import_says_how_to_name_the_module(tmp_path):
    (tmp_path / "net.py").write_text("from .layers import nn\ndef build(): return nn.Conv2d(3, 8, 3)\n")
    with pytest.raises(InputError, match=r"name it with its package, as package\.module:function"):
        build_model(f"{tmp_path / 'net.py'}:build")


@pytest.mark.parametrize("text", ["timm/resnet18.a1_in1k", "timm/resnet18"])
def test_a_hubs_name_of_a_timm_model_says_what_to_write(text):
    with pytest.raises(InputError, match=r"write timm:resnet18; weights are drawn anew"):
        build_model(text)
