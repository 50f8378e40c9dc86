"""Checkpoints of other people: what is read from them, and what is refused."""

import datetime
import os
import pickle
import random
import sys
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import ModuleType, SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from words import MISSING

from convsim_init.checkpoint import read, torch_files
from convsim_init.checkpoint.read import bare_tensors, read_checkpoint
from convsim_init.checkpoint.save import save_checkpoint
from convsim_init.errors import InputError

TENSORS = {"conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "conv.bias": torch.ones(2, dtype=torch.float16)}


def read_state_dict(path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    return bare_tensors(read_checkpoint(path, key), path)


def wrapped(*names: str) -> dict[str, object]:
    content: dict[str, object] = TENSORS
    for name in names:
        content = {"epoch": 3, name: content, "optimizer": {"state": {}}}
    return content


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors"])
def test_what_was_written_is_read_in_its_order(name, tmp_path):
    path = tmp_path / name
    safetensors.torch.save_file(TENSORS, path) if path.suffix == ".safetensors" else torch.save(TENSORS, path)
    read = read_state_dict(path)
    assert sorted(read) == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        torch.testing.assert_close(read[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(OrderedDict(TENSORS), id="ordered"),
        *(pytest.param(wrapped(n), id=n) for n in ("state_dict", "model", "model_state_dict", "state_dict_ema")),
        pytest.param(wrapped("state_dict", "model"), id="twice"),
        pytest.param({"state_dict_ema": {"other": torch.ones(1)}, "state_dict": TENSORS}, id="not-the-average"),
        pytest.param({f"module.{key}": value for key, value in TENSORS.items()}, id="parallel"),
        pytest.param({f"_orig_mod.{key}": value for key, value in TENSORS.items()}, id="compiled"),
        pytest.param({f"module._orig_mod.{key}": value for key, value in TENSORS.items()}, id="both"),
        pytest.param(wrapped("model") | {"extra": [1, "two", None]}, id="plain-extras"),
        pytest.param({key: nn.Parameter(value) for key, value in TENSORS.items()}, id="parameters"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_wrappers_are_opened_and_prefixes_taken_off(content, zipped, tmp_path):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_state_dict(tmp_path / "a.pt")
    assert list(read) == list(TENSORS)
    assert all(torch.equal(read[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.parametrize("keys", [["module.a", "b"], ["model", "model.a"], ["state_dict"]], ids=str)
def test_names_that_only_look_like_wrappers_are_kept(keys, tmp_path):
    torch.save(dict.fromkeys(keys, torch.ones(1)), tmp_path / "a.pt")
    assert list(read_state_dict(tmp_path / "a.pt")) == keys


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(Namespace(lr=0.1, out=Path("x")), id="namespace"),
        pytest.param(Path("runs"), id="path"),
        pytest.param(np.float64(0.5), id="number"),
        pytest.param(np.arange(3), id="array"),
        pytest.param(datetime.datetime(2026, 1, 1), id="date"),
        pytest.param(datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc), id="date-of-a-zone"),
        pytest.param(torch.__version__, id="version"),
        pytest.param(defaultdict(list, loss=[0.5]), id="defaultdict"),
        pytest.param({int, frozenset({1, 2})}, id="types-and-sets"),
        pytest.param({frozenset({frozenset({1}), (1, 2)}): 3}, id="sets-as-keys"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_plain_data_beside_the_weights_do_not_matter(extra, protocol, tmp_path):
    """As the reference scripts of timm and torchvision save their arguments."""
    content = {"model": TENSORS, "args": extra, "epoch": 3, "best": {"extra": [extra]}}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
    torch.testing.assert_close(read_state_dict(tmp_path / "a.pt"), TENSORS)


def class_of_others(module: str, name: str, bases: tuple[type, ...], monkeypatch) -> type:
    """A class as one of a package that need not be installed."""
    kind = type(name, bases, {"__module__": module})
    for package in accumulate(module.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    setattr(sys.modules[module], name, kind)
    return kind


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lightning.fabric.utilities.data", "AttributeDict"),
        ("mmengine.config.config", "ConfigDict"),
        ("yacs.config", "CfgNode"),
        ("easydict", "EasyDict"),
    ],
)
def test_a_dict_whose_entries_are_attributes_is_a_dict(module, name, protocol, tmp_path, monkeypatch):
    kind = class_of_others(module, name, (dict,), monkeypatch)
    config = kind(lr=0.1)
    config.note = "an attribute"
    for content in (kind(TENSORS), {"state_dict": TENSORS, "hyper_parameters": config}):
        torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol)
        torch.testing.assert_close(read_state_dict(tmp_path / "a.ckpt"), TENSORS)


@pytest.mark.parametrize(
    ("module", "name"),
    [("omegaconf.dictconfig", "DictConfig"), ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")],
)
def test_configs_and_callbacks_beside_the_weights_do_not_matter(module, name, tmp_path, monkeypatch):
    kind = class_of_others(module, name, (), monkeypatch)
    content = {"state_dict": TENSORS, "hyper_parameters": kind(), "callbacks": {kind: {"best": 1.0}}}
    torch.save(content, tmp_path / "a.ckpt")
    torch.testing.assert_close(read_state_dict(tmp_path / "a.ckpt"), TENSORS)
    torch.save({"state_dict": kind()}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=f"got {module}.{name} under 'state_dict'"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_dtype_is_one_of_torch(tmp_path, monkeypatch):
    class Call:
        def __init__(self, dtype):
            self.dtype = dtype

        def __reduce__(self):
            storage = torch.ones(2).untyped_storage()
            return torch._utils._rebuild_tensor_v3, (storage, 0, (2,), (1,), False, OrderedDict(), self.dtype)

    torch.save({"a": Call(torch.float32)}, tmp_path / "a.pt")
    torch.testing.assert_close(read_state_dict(tmp_path / "a.pt"), {"a": torch.ones(2)})
    torch.save({"a": Call(class_of_others("omegaconf.x", "float32", (), monkeypatch))}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="damaged or of another kind"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_dict_with_a_default_is_a_dict(tmp_path):
    for content in (defaultdict(dict, TENSORS), {"model": defaultdict(torch.Tensor, TENSORS)}):
        torch.save(content, tmp_path / "a.pt")
        torch.testing.assert_close(read_state_dict(tmp_path / "a.pt"), TENSORS)


def test_an_archive_may_be_without_checksums(tmp_path):
    choose = getattr(torch.serialization, "set_crc32_options", None) or pytest.skip("an option of newer versions")
    choose(False)
    try:
        torch.save(TENSORS, tmp_path / "a.pt")
    finally:
        choose(True)
    torch.testing.assert_close(read_state_dict(tmp_path / "a.pt"), TENSORS)


def test_numbers_in_big_endian_are_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "little.pt")
    with ZipFile(tmp_path / "little.pt") as little, ZipFile(tmp_path / "big.pt", "w") as big:
        for name in little.namelist():
            big.writestr(name, b"big" if name.endswith("/byteorder") else little.read(name))
    with pytest.raises(InputError, match=r"expected numbers in little endian, got .*big\.pt': save it on another"):
        read_checkpoint(tmp_path / "big.pt")


@pytest.mark.parametrize("key", ["net", "params"])
def test_settings_by_the_name_of_weights_do_not_hide_them(key, tmp_path):
    torch.save({key: {"depth": 3}, "params_ema": {}, "weights": TENSORS}, tmp_path / "a.pt")
    torch.testing.assert_close(read_state_dict(tmp_path / "a.pt"), TENSORS)
    other = {"conv.weight": torch.zeros(1)}
    torch.save({"model": {"a": {"b": TENSORS}}, "ema": other}, tmp_path / "c.pt")
    torch.testing.assert_close(read_state_dict(tmp_path / "c.pt"), TENSORS)
    torch.save({key: {"depth": 3}, "model_state_dict": TENSORS}, tmp_path / "b.pt")
    torch.testing.assert_close(read_state_dict(tmp_path / "b.pt"), TENSORS)


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


def saved(content: object) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def bytes_of(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        tensors = {"weight": torch.zeros(9000)}
        safetensors.torch.save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        path.write_bytes(change(path.read_bytes()))

    return make


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def header(text: bytes, data: bytes = b"") -> Callable[[Path], object]:
    return bytes_of(len(text).to_bytes(8, "little") + text + data)


ENTRY = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
DAMAGED = "is damaged or of another kind: copy it again"
SAVE = "save the model's state_dict()"
SPARSE = torch.ones(2, 2).to_sparse()


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        pytest.param("a.pt", lambda path: None, ["cannot read", MISSING, "check the path"], id="missing"),
        pytest.param("a.pt", Path.mkdir, ["expected a folder with", "name the file"], id="folder"),
        pytest.param(
            "a.pt", make_fifo, ["expected an ordinary file", "name a file"], id="fifo", marks=pytest.mark.posix
        ),
        pytest.param("a.pt", link_to_itself, ["cannot read", "symbolic links"], id="loop", marks=pytest.mark.posix),
        pytest.param("a.txt", saved(TENSORS), [".safetensors, .pt, .pth", "rename it"], id="suffix"),
        *(
            pytest.param(f"a.{suffix}", make, [DAMAGED], id=f"{kind}-{suffix}")
            for suffix in ("pt", "safetensors")
            for kind, make in [
                ("empty", bytes_of(b"")),
                ("text", bytes_of(b"<html>404: not found</html>")),
                ("noise", bytes_of(random.Random(0).randbytes(5000))),
                ("zeroed", damaged(lambda content: bytes(len(content)))),
                ("cut-to-4-bytes", damaged(lambda content: content[:4])),
                ("cut-in-the-header", damaged(lambda content: content[:1000])),
                ("cut-in-half", damaged(lambda content: content[: len(content) // 2])),
                ("cut-near-the-end", damaged(lambda content: content[:-40])),
                ("cut-by-one-byte", damaged(lambda content: content[:-1])),
            ]
        ),
        pytest.param(
            "a.pt",
            damaged(lambda content: content[:20000] + b"\1" + content[20001:]),
            ["expected an intact file", "fails its checksum: copy it again"],
            id="bit-flipped",
        ),
        pytest.param("a.safetensors", damaged(lambda content: content + b"\0"), [DAMAGED], id="longer"),
        pytest.param("a.safetensors", header(b"{%b,%b}" % (ENTRY, ENTRY), bytes(4)), ["repeats 'a'"], id="key-twice"),
        pytest.param(
            "a.safetensors", header(b'{"__metadata__":{"format":"pt"}}'), ["empty state dict"], id="metadata-alone"
        ),
        pytest.param("a.safetensors", bytes_of(b"\xff" * 16), [DAMAGED], id="header-too-long"),
        pytest.param("a.safetensors", header(b"[]"), [DAMAGED], id="header-no-object"),
        pytest.param("a.safetensors", header(b"{}"), ["empty state dict", SAVE], id="no-tensors-safetensors"),
        pytest.param(
            "a.safetensors",
            header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}', b"1234"),
            [DAMAGED],
            id="more-than-there-is",
        ),
        pytest.param("a.pt", saved({"a": Bomb()}), ["needs code to be run", "mkdir", "state_dict()"], id="code"),
        pytest.param("a.pt", saved(TENSORS | {"state_dict": Bomb()}), [f"{os.name}.mkdir"], id="code-beside"),
        pytest.param("a.pt", bytes_of(pickle.dumps(Bomb(), 2)), ["needs code to be run"], id="bare-pickle"),
        pytest.param("a.pt", saved(nn.Conv2d(1, 1, 1)), ["needs code", "Conv2d", "state_dict()"], id="module"),
        pytest.param(
            "a.pt", saved({"args": SimpleNamespace(), "model": TENSORS}), ["types.SimpleNamespace"], id="object"
        ),
        pytest.param(
            "a.pt", saved(TENSORS | {"args": Namespace()}), ["only tensors", "argparse.Namespace under"], id="namespace"
        ),
        pytest.param("a.pt", lambda p: torch.jit.save(torch.jit.script(nn.ReLU()), p), ["TorchScript"], id="script"),
        pytest.param("a.pt", saved([torch.ones(1)]), ["expected a state dict", "got list", SAVE], id="list"),
        pytest.param("a.pt", saved(torch.ones(1)), ["expected a state dict", "got Tensor", SAVE], id="tensor"),
        pytest.param("a.pt", saved(None), ["expected a state dict", "got NoneType", SAVE], id="none"),
        pytest.param("a.pt", saved({}), ["empty state dict", SAVE], id="no-tensors"),
        pytest.param("a.pt", saved({"model": {}}), ["empty state dict under 'model'", SAVE], id="wraps-nothing"),
        pytest.param("a.pt", saved({"a": torch.ones(1), "b": 3}), ["only tensors", "int under 'b'"], id="number"),
        pytest.param("a.pt", saved({"model": {"b": "x"}}), ["str under 'b' under 'model'"], id="wraps-text"),
        pytest.param("a.pt", saved({1: torch.ones(1)}), ["only tensors", "under 1"], id="key-no-text"),
        pytest.param("a.pt", saved({"a": np.ones(2)}), ["only tensors", "got numpy.ndarray under 'a'"], id="array"),
        pytest.param("a.pt", saved({"x" * 9999: 1}), ["only tensors", "xxx..."], id="long-key"),
        pytest.param(
            "a.pt",
            saved({"a": SPARSE}),
            ["dense tensors", "another kind ('torch._utils._rebuild_sparse_tensor'): save"],
            id="sparse",
        ),
        pytest.param(
            "a.pt", saved({"a": torch.ones(1), "_orig_mod.a": torch.ones(1)}), ["2 keys for 1 tensors"], id="collision"
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # of TorchScript
def test_what_cannot_be_read_is_refused_in_one_line(name, make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path(name))
    with pytest.raises(InputError) as caught:
        read_state_dict(name)
    message = str(caught.value)
    assert name in message
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 300
    assert not Path("exploded").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(TENSORS, path)
    path.chmod(0)
    with pytest.raises(InputError, match="expected a file that may be read"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_nothing_stays_in_a_file_that_could_then_not_be_replaced(name, tmp_path, monkeypatch):
    """As on Windows."""
    for module in (read, torch_files):
        monkeypatch.setattr(module, "MAPPED", False)
    path = tmp_path / name
    safetensors.torch.save_file(TENSORS, path) if path.suffix == ".safetensors" else torch.save(TENSORS, path)
    tensors = read_state_dict(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for key, tensor in TENSORS.items():
        assert torch.equal(tensors[key], tensor)
    path.unlink()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damage_anywhere_gives_tensors_or_one_line(name, tmp_path):
    path = tmp_path / name
    tensors = {"a.weight": torch.ones(3, 2, 2, 2), "b": torch.zeros(5)}
    safetensors.torch.save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    whole = path.read_bytes()
    chance = random.Random(1)
    refusals = []
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 1, 5])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), len(content), chance.randrange(len(content))])])
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_state_dict(path).values())
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert not [message for message in refusals if "\n" in message]


@pytest.mark.posix
@pytest.mark.parametrize("name", [b"\xff.pt", b"\xff.safetensors", b"\xff/a.pt"])
def test_a_path_that_is_no_text_is_not_called_damage(name, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(TENSORS, path, dtype=None)
    with pytest.raises(InputError, match="its path is not in UTF-8, as libraries expect; rename it"):
        read_checkpoint(path)


@pytest.mark.parametrize("key", [0, None, (1, 2)])
@pytest.mark.parametrize("inner", [False, True])
def test_keys_that_are_no_text_are_refused_in_one_line(key, inner, tmp_path):
    content = {key: {"weight": torch.ones(2, 3, 3, 3)}}
    torch.save({"model": content} if inner else content, tmp_path / "a.pt")
    for wanted in (None, "0", "None"):
        with pytest.raises(InputError, match="expected"):
            read_checkpoint(tmp_path / "a.pt", wanted)
