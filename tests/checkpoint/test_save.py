"""Section 8 of the design, sentence by sentence: what is in a checkpoint, and that it appears whole or not at all."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from folders import OLD, names
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from convsim_init import __version__, build_model, initialize_, load_checkpoint, save_checkpoint
from convsim_init.checkpoint.save import checkpoint_bytes, checkpoint_contents
from convsim_init.errors import InputError, RunError
from convsim_init.settings import Settings

NAMES = ["init.safetensors", "init.pt", "init.pth"]
FORMATS = NAMES[:2]
formats = pytest.mark.parametrize("name", FORMATS)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, (3, 1), bias=False), nn.Flatten(), nn.Linear(5, 2)
    )


def load(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def header(path: Path) -> dict[str, dict[str, str]]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def assert_holds(path: Path, expected: dict[str, Tensor]) -> None:
    written = load(path)
    assert sorted(written) == sorted(expected)
    for key, tensor in written.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


def run_python(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


# What is in the file


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_the_full_state_dict(name, tmp_path):
    model = small()
    model(torch.randn(4, 3, 5, 3))  # moves the running statistics
    path = save_checkpoint(model, tmp_path / name)
    assert_holds(path, model.state_dict())
    assert load(path)["1.num_batches_tracked"] == 1
    fresh = small()
    fresh.load_state_dict(load(path), strict=True)
    assert_holds(path, fresh.state_dict())


@formats
def test_the_model_stays_as_it_was(name, tmp_path):
    model = small().to(torch.float64, memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_checkpoint(model, tmp_path / name)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.dtype == before[key].dtype
        assert value.stride() == before[key].stride()
    assert all(parameter.requires_grad for parameter in model.parameters())


@formats
@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        pytest.param(torch.float32, {}, torch.float32, id="float32"),
        pytest.param(torch.float64, {}, torch.float32, id="float64-to-float32"),
        pytest.param(torch.bfloat16, {}, torch.float32, id="bfloat16-to-float32"),
        pytest.param(torch.float8_e4m3fn, {}, torch.float32, id="float8-to-float32"),
        pytest.param(torch.float32, {"dtype": torch.float16}, torch.float16, id="float16-asked-for"),
        pytest.param(torch.float16, {"dtype": torch.float64}, torch.float64, id="float64-asked-for"),
        pytest.param(torch.float64, {"dtype": None}, torch.float64, id="float64-kept"),
        pytest.param(torch.bfloat16, {"dtype": None}, torch.bfloat16, id="bfloat16-kept"),
        pytest.param(torch.float8_e4m3fn, {"dtype": None}, torch.float8_e4m3fn, id="float8-kept"),
    ],
)
def test_floats_are_float32_unless_told_otherwise_and_others_stay(name, given, options, expected, tmp_path):
    values = torch.tensor([0.5, -2, 3.25]).to(given)
    others = {
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    path = save_checkpoint({"w": values, **others}, tmp_path / name, **options)
    written = load(path)
    assert written.pop("w").dtype == expected
    assert load(path)["w"].tolist() == values.tolist()
    for key, value in others.items():
        assert written[key].dtype == value.dtype
        assert written[key].tolist() == value.tolist()


class Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
        self.shared = self.first if tied else nn.Conv2d(2, 4, 3)
        self.register_buffer("part", self.first.weight.detach()[:2] if tied else torch.zeros(2, 2, 3, 3))
        if tied:
            self.second.weight = self.first.weight


@formats
def test_tied_weights_are_written_under_each_of_their_names(name, tmp_path):
    model = Tied(tied=True)
    path = save_checkpoint(model, tmp_path / name)
    assert_holds(path, model.state_dict())
    assert {"first.weight", "second.weight", "shared.weight", "part"} <= set(load(path))
    for tied in (True, False):
        fresh = Tied(tied=tied)
        fresh.load_state_dict(load(path), strict=True)
        assert_holds(path, fresh.state_dict())
    storages = [tensor.untyped_storage().data_ptr() for tensor in load(path).values()]
    assert len(set(storages)) == len(storages)  # nobody who loads it gets aliases


def channels_last(*shape: int) -> Tensor:
    return torch.empty(shape, memory_format=torch.channels_last).normal_()


@formats
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.randn(3, 2, 5, 4).transpose(0, 2), id="transposed"),
        pytest.param(lambda: channels_last(4, 3, 3, 3), id="channels-last"),
        pytest.param(lambda: channels_last(4, 3, 1, 1), id="channels-last-1x1"),
        pytest.param(lambda: channels_last(4, 1, 3, 3), id="channels-last-depthwise"),
        pytest.param(lambda: torch.randn(100, 3)[7:9], id="part-of-a-larger-storage"),
        pytest.param(lambda: torch.randn(100, 3)[::50], id="every-fiftieth-row"),
        pytest.param(lambda: torch.randn(1, 3).expand(40, 3), id="expanded"),
        pytest.param(lambda: torch.randn(()), id="scalar"),
        pytest.param(lambda: torch.randn(3, dtype=torch.complex64).conj(), id="conjugate"),
        pytest.param(lambda: torch.randn(3, dtype=torch.complex64).conj().imag, id="negative"),
        pytest.param(lambda: torch.randn(0, 3), id="empty"),
        pytest.param(lambda: nn.Parameter(torch.randn(2, 3)), id="parameter"),
    ],
)
def test_the_layout_in_memory_leaves_no_trace_in_the_file(name, make, tmp_path):
    weight = make()
    plain = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight.detach())
    path = save_checkpoint({"w": weight}, tmp_path / name)
    assert path.read_bytes() == save_checkpoint({"w": plain}, tmp_path / f"plain{path.suffix}").read_bytes()
    written = load(path)["w"]
    assert torch.equal(written, plain)
    assert written.stride() == plain.stride()


@pytest.fixture
def process_group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_inside(model: nn.Sequential) -> nn.Module:
    model[2] = torch.compile(model[2])
    return model


def prefixed(prefix: str):
    return lambda model: {prefix + key: value for key, value in model.state_dict().items()}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(nn.DataParallel, id="data-parallel"),
        pytest.param(nn.parallel.DistributedDataParallel, id="distributed"),
        pytest.param(torch.compile, id="compiled"),
        pytest.param(lambda m: nn.parallel.DistributedDataParallel(torch.compile(m)), id="compiled-then-distributed"),
        pytest.param(lambda m: torch.compile(nn.DataParallel(m)), id="parallel-then-compiled"),
        pytest.param(compiled_inside, id="one-layer-compiled"),
        pytest.param(lambda m: compiled_inside(m).state_dict(), id="state-dict-with-one-layer-compiled"),
        pytest.param(prefixed("module."), id="state-dict-module"),
        pytest.param(prefixed("_orig_mod."), id="state-dict-orig-mod"),
        pytest.param(prefixed("module._orig_mod."), id="state-dict-module-orig-mod"),
        pytest.param(prefixed("_orig_mod.module."), id="state-dict-orig-mod-module"),
    ],
)
def test_wrappers_leave_no_trace_in_the_keys(wrap, tmp_path):
    model = small()
    expected = model.state_dict()
    path = save_checkpoint(wrap(model), tmp_path / "init.safetensors")
    assert_holds(path, expected)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = small()


def test_a_child_called_module_is_no_wrapper(tmp_path):
    model = Holder()
    report = initialize_(model, settings=Settings(steps=1))
    assert_holds(save_checkpoint(model, tmp_path / "init.safetensors"), model.state_dict())
    convs = save_checkpoint(model, tmp_path / "convs.safetensors", report=report, convs_only=True)
    assert sorted(load(convs)) == ["module.0.weight", "module.2.weight"]


def test_a_prefix_that_only_some_keys_carry_stays(tmp_path):
    state = {"module.w": torch.ones(1), "count": torch.zeros(1)}
    assert_holds(save_checkpoint(state, tmp_path / "init.safetensors"), state)


@formats
@pytest.mark.parametrize("prefix", ["model.", "timm_model.", 'mödel "x"\\.'])
def test_a_prefix_stands_before_every_key(name, prefix, tmp_path):
    model = small()
    path = save_checkpoint(nn.DataParallel(model), tmp_path / name, prefix=prefix)
    assert_holds(path, {prefix + key: value for key, value in model.state_dict().items()})


def test_a_prefix_that_would_run_into_the_keys_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"ends in a dot, such as 'model\.', got 'model'"):
        save_checkpoint(small(), tmp_path / "init.pt", prefix="model")
    with pytest.raises(InputError, match=r"expected a prefix of letters that print, .* got '\\udcff\.'"):
        save_checkpoint(small(), tmp_path / "init.pt", prefix="\udcff.")
    assert not list(tmp_path.iterdir())


# Only the convolutions


def changed(model: nn.Module, **options: object):
    return initialize_(model, settings=Settings(steps=1), **options)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        pytest.param(small, {}, ["0.weight", "2.weight"], id="all"),
        pytest.param(small, {"exclude": ["0"]}, ["2.weight"], id="one-excluded"),
        pytest.param(lambda: nn.Conv2d(3, 4, 3), {}, ["weight"], id="the-model-itself"),
        pytest.param(lambda: nn.DataParallel(small()), {}, ["0.weight", "2.weight"], id="wrapped"),
        pytest.param(lambda: compiled_inside(small()), {}, ["0.weight", "2.weight"], id="one-layer-compiled"),
        pytest.param(lambda: Tied(tied=True), {}, ["first.weight", "second.weight", "shared.weight"], id="tied"),
        pytest.param(
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 1, 1)),
            {},
            ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
            id="parametrized",
        ),
    ],
)
def test_convs_only_writes_the_changed_convolutions(model, options, expected, tmp_path):
    model = model()
    report = changed(model, **options)
    path = save_checkpoint(model, tmp_path / "init.safetensors", report=report, convs_only=True)
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in model.state_dict().items()}
    assert_holds(path, {key: state[key] for key in expected})


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    ("wrap", "entries"),
    [
        (old_weight_norm, ["0.weight_g", "0.weight_v"]),
        (lambda module: prune.l1_unstructured(module, "weight", 0.3), ["0.weight_mask", "0.weight_orig"]),
    ],
)
def test_convs_only_writes_what_a_weight_is_computed_from(wrap, entries, tmp_path):
    model = nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    report = initialize_(model, settings=Settings(steps=2))
    path = save_checkpoint(model, tmp_path / "init.safetensors", report=report, convs_only=True)
    assert sorted(load(path)) == entries


def test_a_dtype_that_safetensors_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"that safetensors can hold, got torch.complex32: write a .pt"):
        save_checkpoint({"a": torch.ones(2, dtype=torch.complex32)}, tmp_path / "init.safetensors")
    assert names(tmp_path) == []
    contents = checkpoint_contents({"a": torch.ones(2, dtype=torch.complex32)})
    with pytest.raises(InputError, match=r"that safetensors can hold, got torch.complex32: write a .pt"):
        checkpoint_bytes(contents)  # for stdout


def test_convs_only_reads_no_entry_that_it_does_not_write(tmp_path):
    model = small()
    report = changed(model)
    state = model.state_dict() | {"4.bias": torch.tensor([float("nan")]), "extra": "text"}
    path = save_checkpoint(state, tmp_path / "init.safetensors", report=report, convs_only=True, prefix="net.")
    assert sorted(load(path)) == ["net.0.weight", "net.2.weight"]


# The metadata


def test_metadata_without_a_report_is_the_format_and_the_version(tmp_path):
    path = save_checkpoint(small(), tmp_path / "init.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "convsim_init"}
    assert metadata["format"] == "pt"
    assert json.loads(metadata["convsim_init"]) == {"format_version": 1, "version": __version__}


def test_metadata_tells_what_made_the_weights(tmp_path):
    model = small()
    report = initialize_(model, settings=Settings(steps=3, pairs="adjacent"))
    report.model, report.seed = "small", 7
    path = save_checkpoint(model, tmp_path / "init.safetensors", report=report)
    assert header(path)["__metadata__"].keys() == {"format", "convsim_init"}
    about = json.loads(header(path)["__metadata__"]["convsim_init"])
    assert about == {
        "format_version": 1,
        "version": __version__,
        "model": "small",
        "seed": 7,
        "base": "model",
        "settings": asdict(report.settings),
        "totals": report.totals,
        "all_channels": ["2"],
    }
    assert about["settings"]["pairs"] == "adjacent"
    assert about["totals"]["initialized"] == 2
    assert 0 < about["totals"]["after"]["similarity"] < about["totals"]["before"]["similarity"]


def test_metadata_takes_numbers_of_numpy(tmp_path):
    model = small()
    numbers = {"steps": np.int64(3), "tolerance": np.float32(0.25)}
    report = initialize_(model, settings=Settings(**numbers))
    report.seed = np.int64(7)
    path = save_checkpoint(model, tmp_path / "init.safetensors", report=report)
    about = json.loads(header(path)["__metadata__"]["convsim_init"])
    assert about["seed"] == 7
    assert {name: about["settings"][name] for name in numbers} == {"steps": 3, "tolerance": 0.25}


def test_metadata_names_the_channels_that_all_layers_have(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3))
    path = save_checkpoint(model, tmp_path / "init.safetensors", report=initialize_(model, settings=Settings(steps=1)))
    about = json.loads(header(path)["__metadata__"]["convsim_init"])
    assert about["settings"]["channels"] == "all"
    assert "all_channels" not in about


def test_metadata_is_in_order(tmp_path):
    for _ in range(12):  # the library shuffles two keys: each write has an even chance
        path = save_checkpoint(small(), tmp_path / "init.safetensors", overwrite=True)
        assert list(header(path)["__metadata__"]) == ["convsim_init", "format"]


# The same bytes


@formats
def test_the_same_weights_give_the_same_bytes(name, tmp_path):
    model = small()
    files = {save_checkpoint(model, tmp_path / f"{i}{name}", report=None).read_bytes() for i in range(12)}
    assert len(files) == 1


SAVE = """
import sys, torch
from convsim_init import Settings, initialize_, save_checkpoint
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 1))
for i, parameter in enumerate(model.parameters()):
    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
report = initialize_(model, settings=Settings(steps=3))
for path in sys.argv[1:]:
    save_checkpoint(model, path, report=report)
"""


def test_another_process_writes_the_same_bytes(tmp_path):
    for run in ("1", "2"):
        (tmp_path / run).mkdir()
        done = run_python(SAVE, *(tmp_path / run / name for name in FORMATS), PYTHONHASHSEED=run, OMP_NUM_THREADS=run)
        assert done.returncode == 0, done.stderr
    for name in FORMATS:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_odd_keys_survive_the_rewritten_header(tmp_path):
    keys = ["größe.权重", 'quo"ted\\', "tab\there", "bell\x07", "delete\x7f", "line\u2028", "", " ", "/", "🙂"]
    state = {key: torch.full((3, i), float(i)) for i, key in enumerate(keys)}
    path = save_checkpoint(state, tmp_path / "init.safetensors")
    assert_holds(path, state)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # the data stays aligned


# Who reads it


@pytest.fixture(scope="module", params=NAMES)
def resnet(request, tmp_path_factory):
    model = build_model("resnet18", seed=3)
    return save_checkpoint(model, tmp_path_factory.mktemp("resnet") / request.param), model.state_dict()


def test_timm_starts_from_it(resnet):
    timm = pytest.importorskip("timm")
    path, expected = resnet
    model = timm.create_model("resnet18", checkpoint_path=str(path))
    assert_holds(path, model.state_dict())
    assert torch.equal(model.conv1.weight, expected["conv1.weight"])


def test_torchvision_loads_it_strictly(resnet):
    torchvision = pytest.importorskip("torchvision")
    path, expected = resnet
    model = torchvision.models.resnet18()
    model.load_state_dict(load(path), strict=True)
    assert_holds(path, model.state_dict())
    assert torch.equal(model.conv1.weight, expected["conv1.weight"])


def test_safe_open_reads_it(tmp_path):
    state = small().state_dict()
    with safetensors.safe_open(save_checkpoint(state, tmp_path / "init.safetensors"), framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert sorted(file.keys()) == sorted(state)
        for key, value in state.items():
            assert torch.equal(file.get_tensor(key), value)


@pytest.mark.parametrize("name", ["init.pt", "init.pth"])
def test_a_torch_file_is_a_state_dict_of_plain_tensors(name, tmp_path):
    written = torch.load(save_checkpoint(small(), tmp_path / name), weights_only=True)
    assert type(written) is type(small().state_dict())
    for value in written.values():
        assert type(value) is Tensor
        assert not value.requires_grad
        assert value.device.type == "cpu"


# Where it is written


@formats
@pytest.mark.parametrize("kind", ["path", "text", "relative", "path-like"])
def test_the_path_may_be_given_in_any_way(name, kind, tmp_path, monkeypatch):
    class Like:
        def __fspath__(self) -> str:
            return str(tmp_path / name)

    monkeypatch.chdir(tmp_path)
    given = {"path": tmp_path / name, "text": str(tmp_path / name), "relative": name, "path-like": Like()}[kind]
    assert save_checkpoint(small(), given) == Path(given)
    assert names(tmp_path) == [name]


@formats
def test_a_name_may_be_as_long_as_the_system_lets_it(name, tmp_path):
    long = "é" * 120 + Path(name).suffix
    save_checkpoint(small(), tmp_path / long)
    assert names(tmp_path) == [long]


@formats
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], ids=oct)
@pytest.mark.posix
def test_the_mode_follows_the_umask(name, there, umask, tmp_path):
    path = tmp_path / name
    if there:
        path.write_bytes(OLD)
        path.chmod(0o600 if umask == 0o022 else 0o644)
    before = os.umask(umask)
    try:
        save_checkpoint(small(), path, overwrite=there)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@formats
@pytest.mark.parametrize("there", [False, True], ids=["dangling", "to-a-file"])
@pytest.mark.posix
def test_a_link_is_written_through(name, there, tmp_path):
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "weights", tmp_path / name
    link.symlink_to(real.relative_to(tmp_path))
    if there:
        real.write_bytes(OLD)
        with pytest.raises(InputError, match="exists already"):
            save_checkpoint(small(), link)
    model = small()
    assert save_checkpoint(model, link, overwrite=there) == link
    assert link.is_symlink()
    assert_holds(link, model.state_dict())
    assert names(tmp_path / "store") == ["weights"]


@pytest.mark.parametrize("name", NAMES)
def test_an_existing_file_is_replaced_only_on_demand(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(OLD)
    with pytest.raises(InputError) as caught:
        save_checkpoint(small(), path)
    advice = "choose another name or pass overwrite=True (--force in the shell)"
    assert str(caught.value) == f"{str(path)!r} exists already: {advice}"
    assert path.read_bytes() == OLD
    model = small()
    save_checkpoint(model, path, overwrite=True)
    assert_holds(path, model.state_dict())
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["init", "init.bin", "init.SAFETENSORS", "init.Pt", "init.pt.zip", ".pt", "init.pt2"])
def test_other_suffixes_are_refused(name, tmp_path):
    with pytest.raises(
        InputError, match=r"^expected a file name ending in \.safetensors, \.pt, \.pth, got '.*': choose another name"
    ):
        save_checkpoint(small(), tmp_path / name)
    assert names(tmp_path) == []


def test_a_read_only_folder_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # for root every folder can be written to
    words = re.escape(f"expected a folder that can be written to, got {str(tmp_path)!r}: choose another")
    with pytest.raises(InputError, match=words):
        save_checkpoint({"w": torch.tensor([float("nan")])}, tmp_path / "init.pt")


def test_a_folder_nobody_may_look_into_is_refused_first(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "lstat", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        save_checkpoint(small(), tmp_path / "init.pt")


# Whole or not at all

FULL = OSError(28, "No space left on device")


def fails(error: BaseException):
    def writer(*arguments: object, **_: object) -> None:
        for path in [argument for argument in arguments if isinstance(argument, Path)][:1]:
            path.write_bytes(b"half of")
        raise error

    return writer


def place_of(function: str, name: str) -> tuple[object, str]:
    library = (torch, "save") if name == "init.pt" else (safetensors.torch, "save_file")
    return {
        "library": library,
        "sync": (os, "fsync"),
        "rename": (Path, "replace"),
        "chmod": (Path, "chmod"),
        "open": (os, "open"),
    }[function]


@formats
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        pytest.param(
            "library", FULL, "could not write {!r}: No space left on device; nothing changed there", id="full"
        ),
        pytest.param("open", FULL, "could not write {!r}: No space left on device; nothing changed there", id="open"),
        pytest.param("sync", OSError(5, "Input/output error"), "could not write {!r}: Input/output error; ", id="sync"),
        pytest.param("rename", OSError(1, "Not permitted"), "could not write {!r}: Not permitted; ", id="rename"),
        pytest.param("chmod", OSError("two\nlines"), "could not write {!r}: two lines; nothing changed", id="chmod"),
        *(
            pytest.param(function, error(), "", id=f"{error.__name__}-{function}")
            for function in ("library", "sync", "rename")
            for error in (KeyboardInterrupt, MemoryError)
        ),
    ],
)
def test_a_write_that_fails_changes_nothing(name, there, function, error, message, tmp_path, monkeypatch):
    path = tmp_path / name
    if there:
        path.write_bytes(OLD)
    monkeypatch.setattr(*place_of(function, name), fails(error))
    with pytest.raises(RunError if message else type(error)) as caught:
        save_checkpoint(small(), path, overwrite=True)
    assert str(caught.value).startswith(message.format(str(path)))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == [name] * there
    assert not there or path.read_bytes() == OLD


def test_an_error_of_safetensors_becomes_ours(tmp_path, monkeypatch):
    error = safetensors.SafetensorError("I/O error:\nNo space left")
    monkeypatch.setattr(safetensors.torch, "save_file", fails(error))
    with pytest.raises(RunError, match=r"init\.safetensors': I/O error: No space left; nothing changed there$"):
        save_checkpoint(small(), tmp_path / "init.safetensors")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from convsim_init import save_checkpoint
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint({"w": torch.ones(3)}, sys.argv[1], overwrite=True)
"""


@pytest.mark.posix
def test_a_killed_run_leaves_the_old_file(tmp_path):
    path = tmp_path / "init.safetensors"
    path.write_bytes(OLD)
    assert run_python(KILLED, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == OLD
    litter = [name for name in names(tmp_path) if name != path.name]
    assert all(name.startswith(".") and name.endswith(".convsim-init.tmp") for name in litter)


@formats
@pytest.mark.parametrize("overwrite", [False, True], ids=["linked", "renamed"])
def test_the_whole_file_is_synced_then_named_then_its_folder_synced(name, overwrite, tmp_path, monkeypatch):
    events: list[tuple[str, int]] = []
    sync, rename, link = os.fsync, Path.replace, os.link

    def note_sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append(("folder", 0) if stat.S_ISDIR(status.st_mode) else ("file", status.st_size))
        sync(descriptor)

    def note_name(call: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def noted(source: Path, target: Path) -> None:
            events.append(("name", source.stat().st_size))
            assert source.parent.parent == target.parent  # a file system of its own would copy, not rename
            call(source, target)

        return noted

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_name(rename))
    monkeypatch.setattr(os, "link", note_name(link))
    size = save_checkpoint(small(), tmp_path / name, overwrite=overwrite).stat().st_size
    # Windows lets no folder be opened.
    assert events == [("file", size), ("name", size), ("folder", 0)][: 3 if os.name == "posix" else 2]
    assert (tmp_path / name).stat().st_nlink == 1


# What cannot be written


def with_entry(value: object) -> dict[str, object]:
    return {"fine": torch.ones(2), "layer.weight": value}


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(2, 2, 1))


@formats
def test_masks_of_infinities_are_written(name, tmp_path):
    """Those of attention, and the ranges of observers that have seen nothing."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1))
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    model.register_buffer("min_val", torch.tensor(torch.inf))
    path = save_checkpoint(model, tmp_path / name)
    assert_holds(path, model.state_dict())
    assert load_checkpoint(model, path, strict=True).complete
    model.mask[0, 0] = 1
    with pytest.raises(InputError, match="mask: expected finite numbers"):
        save_checkpoint(model, tmp_path / f"other{name}")


NOT_FINITE = "layer.weight: expected finite numbers, got infinities or NaN: draw it anew, or leave it out with exclude"
NOT_FINITE += " (--without in the shell)"


@formats
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        pytest.param(with_entry(torch.tensor([1, float("nan")])), {}, NOT_FINITE, id="nan"),
        pytest.param(with_entry(torch.tensor([[float("inf")]])), {}, NOT_FINITE, id="infinity"),
        pytest.param(
            {"0.running_var": torch.tensor([torch.inf])},
            {},
            NOT_FINITE.replace("layer.weight", "0.running_var"),
            id="statistics",
        ),
        pytest.param(with_entry(torch.tensor(-float("inf"), dtype=torch.float64)), {}, NOT_FINITE, id="negative"),
        pytest.param(
            with_entry(torch.tensor(float("nan"), dtype=torch.bfloat16)), {"dtype": None}, NOT_FINITE, id="half"
        ),
        pytest.param(
            with_entry(torch.tensor(float("nan")).to(torch.float8_e4m3fn)), {"dtype": None}, NOT_FINITE, id="float8"
        ),
        pytest.param(
            with_entry(torch.tensor([1e6])),
            {"dtype": torch.float16},
            "layer.weight: expected numbers in the range of torch.float16, got larger ones: choose float32",
            id="too-large-for-float16",
        ),
        pytest.param(
            with_entry(torch.tensor(1e300, dtype=torch.float64)),
            {},
            "layer.weight: expected numbers in the range of torch.float32, got larger ones: choose float64",
            id="too-large-for-float32",
        ),
        pytest.param(
            meta(),
            {},
            "0.weight: expected a tensor with data, got one on the meta device: initialize it first",
            id="meta",
        ),
        pytest.param(
            nn.Sequential(nn.LazyConv2d(2, 3)),
            {},
            "0.weight: expected a tensor with data, got a lazy one: run a forward pass first",
            id="lazy",
        ),
        pytest.param(
            with_entry(torch.eye(2).to_sparse()),
            {},
            "layer.weight: expected a dense tensor, got a sparse, quantized or wrapped one: convert it first",
            id="sparse",
        ),
        pytest.param(
            with_entry(3.0),
            {},
            "layer.weight: expected a tensor in the state dict, got float: leave it out with exclude (--without in the "
            "shell)",
            id="no-tensor",
        ),
        pytest.param(
            {"state_dict": small().state_dict(), "epoch": 3},
            {},
            "state_dict: expected a tensor in the state dict, got OrderedDict: pass the state dict inside it",
            id="training-checkpoint",
        ),
        pytest.param({3: torch.ones(1)}, {}, "expected the state dict's keys to be strings, got 3", id="number-as-key"),
        pytest.param({}, {}, "expected weights to write, got an empty state dict", id="empty"),
        pytest.param(nn.ReLU(), {}, "expected weights to write, got an empty state dict", id="no-weights"),
        pytest.param([1], {}, "expected a module or its state dict to write, got list", id="list"),
        pytest.param(
            {"a\ud800": torch.ones(3)},
            {},
            r"a\ud800: expected a key of Unicode letters, got others: rename it, or leave it out with exclude "
            "(--without in the shell)",
            id="surrogates",
        ),
        pytest.param(
            small(),
            {"dtype": torch.int8},
            "expected dtype to be a floating one such as torch.float32, or None, got torch.int8",
            id="integer-dtype",
        ),
        pytest.param(
            small(),
            {"dtype": "float16"},
            "expected dtype to be a floating one such as torch.float32, or None, got 'float16'",
            id="dtype-as-text",
        ),
        pytest.param(
            small(),
            {"convs_only": True},
            "convs_only: expected the report that says which convolutions were changed, got none",
            id="convs-without-report",
        ),
        pytest.param(
            small(),
            {"convs_only": True, "report": changed(small(), exclude=["*"])},
            "convs_only: expected a report of changed convolutions, got one that changed none",
            id="no-convs-changed",
        ),
        pytest.param(
            small(),
            {"convs_only": True, "report": changed(small()), "exclude": ["[02].*"]},
            "convs_only: expected a changed convolution to write, got all of them excluded",
            id="no convolution left",
        ),
        pytest.param(
            small(),
            {"convs_only": True, "report": changed(Holder())},
            "convs_only: the report's layer 'module.0' is not here: pass this model's own report",
            id="report-of-another-model",
        ),
    ],
)
def test_weights_that_cannot_be_written_are_refused(name, source, options, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(OLD)
    with pytest.raises(InputError) as caught:
        save_checkpoint(source, path, overwrite=True, **options)
    assert str(caught.value) == message
    assert names(tmp_path) == [name]
    assert path.read_bytes() == OLD


def test_a_key_that_safetensors_keeps_for_itself_is_refused(tmp_path):
    state = {"__metadata__": torch.ones(1)}
    with pytest.raises(InputError, match="expected keys that safetensors can hold, got '__metadata__'"):
        save_checkpoint(state, tmp_path / "init.safetensors")
    assert names(tmp_path) == []
    assert_holds(save_checkpoint(state, tmp_path / "init.pt"), state)


class WithExtraState(nn.Conv2d):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


@formats
def test_extra_state_is_refused_for_what_it_is(name, tmp_path):
    with pytest.raises(
        InputError, match=r"^_extra_state: expected only tensors .* a module's extra state of type dict"
    ):
        save_checkpoint(WithExtraState(3, 4, 3), tmp_path / name)
    assert not list(tmp_path.iterdir())


class WithMetadata(nn.Conv2d):
    def state_dict(self, *arguments, **options):
        return {**super().state_dict(*arguments, **options), "_metadata": {"args": (), "_name": "here"}}


@formats
def test_what_a_state_dict_of_somebodys_own_holds_beside_tensors_can_be_left_out(name, tmp_path):
    with pytest.raises(InputError, match=r"^_metadata: expected a tensor .* got dict: leave it out with exclude"):
        save_checkpoint(WithMetadata(3, 4, 3), tmp_path / name)
    assert sorted(load(save_checkpoint(WithMetadata(3, 4, 3), tmp_path / name, exclude=["_metadata"]))) == [
        "bias",
        "weight",
    ]


@pytest.mark.parametrize("path", [None, b"a.pt", 3])
def test_a_path_is_a_path(path):
    with pytest.raises(InputError, match=f"expected the path of a file, got {type(path).__name__}"):
        save_checkpoint({"a": torch.ones(2)}, path)


def test_packed_numbers_are_no_dtype_to_convert_to(tmp_path):
    dtype = getattr(torch, "float4_e2m1fn_x2", None) or pytest.skip("a dtype of newer versions of PyTorch")
    with pytest.raises(InputError, match=r"expected dtype to be a floating one .*, got torch\.float4"):
        save_checkpoint(small(), tmp_path / "init.pt", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_numbers_of_float8_that_are_not_finite_are_seen(dtype, tmp_path):
    values = torch.tensor([1.0, float("nan")]).to(dtype)
    with pytest.raises(InputError, match="mask"):
        save_checkpoint({"a": torch.ones(2), "mask": values}, tmp_path / "a.pt", dtype=None)
