"""Files and choices made to do harm: nothing is run, and nothing allocated because a number claims it."""

import ast
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from convsim_init import Settings, calibrate_, draw_base_, initializing, load_checkpoint, measure, save_checkpoint
from convsim_init.checkpoint.read import read_checkpoint
from convsim_init.cli.arguments import WORDS, parse_arguments
from convsim_init.errors import InputError
from convsim_init.files.writing import check_target
from convsim_init.initialize import plan
from convsim_init.models.build import check_model

GIGA = 10**9
quick = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def peak() -> int:
    """The most memory so far, in KiB; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def pickled_tensor(numel: int, offset: int, size: int, stride: int, *, legacy: bool) -> bytes:
    """What `torch.save` pickles of ``{"a": tensor}``, with the numbers given."""
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value  # noqa: E731
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + integer(numel)
    storage += b"NtQ" if legacy else b"tQ"
    shape = b"(" + integer(size) + b"t(" + integer(stride) + b"t"
    rest = b"\x89ccollections\nOrderedDict\n)RtRs."
    return (
        b"\x80\x02}" + text(b"a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(offset) + shape + rest
    )


def archive(content: bytes, compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("a/data.pkl", content)
            file.writestr("a/byteorder", b"little")
            file.writestr("a/version", b"3\n")
            file.writestr("a/data/0", bytes(64))

    return write


def legacy(content: bytes, numel: int | None = None) -> Callable[[Path], object]:
    """A file from before PyTorch 1.6 whose storage is nowhere, or claims that many numbers and has 16."""
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    end = pickle.dumps([], 2) if numel is None else pickle.dumps(["0"], 2) + struct.pack("<q", numel) + bytes(64)
    return lambda path: path.write_bytes(b"".join(start) + content + end)


def nested(depth: int, *, value: bool = False) -> bytes:
    """A dict with a tuple in a tuple, and so on, for a key or a value."""
    deep = b")" + b"\x85" * depth
    return b"\x80\x02}" + (b"X\1\0\0\0a" + deep if value else deep + b"K\1") + b"s."


def safetensors_file(header: bytes, length: int | None = None) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickle.dumps({}, 2))
        file.writestr("b/data.pkl", pickle.dumps({}, 2))
    path.write_bytes(path.read_bytes().replace(b"b/data.pkl", b"a/data.pkl"))


DAMAGED = "is damaged or of another kind: copy it again"
CODE = "needs code to be run"
LARGE = "expected tensors no larger than the file"
EXPANDED_COPY = (
    b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n."  # would copy every row that is but claimed
)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        pytest.param("a.pt", archive(pickled_tensor(GIGA, 0, GIGA, 1, legacy=False)), DAMAGED, id="storage"),
        pytest.param("a.pt", archive(pickled_tensor(16, 0, GIGA, 1, legacy=False)), DAMAGED, id="size"),
        pytest.param("a.pt", archive(pickled_tensor(16, GIGA, 16, 1, legacy=False)), DAMAGED, id="offset"),
        pytest.param("a.pt", archive(pickled_tensor(16, 0, GIGA, 0, legacy=False)), LARGE, id="expanded"),
        pytest.param("a.pt", legacy(pickled_tensor(GIGA, 0, GIGA, 1, legacy=True)), DAMAGED, id="legacy-no-storage"),
        pytest.param("a.pt", legacy(pickled_tensor(GIGA, 0, GIGA, 1, legacy=True), 16), DAMAGED, id="legacy-storage"),
        pytest.param("a.pt", legacy(pickled_tensor(16, 0, GIGA, 1, legacy=True), 16), DAMAGED, id="legacy-size"),
        pytest.param("a.pt", legacy(pickled_tensor(16, GIGA, 16, 1, legacy=True), 16), DAMAGED, id="legacy-offset"),
        pytest.param("a.pt", legacy(pickled_tensor(GIGA, GIGA, 16, 1, legacy=True)), DAMAGED, id="legacy-past-all"),
        pytest.param("a.pt", legacy(pickled_tensor(16, 0, GIGA, 0, legacy=True), 16), LARGE, id="legacy-expanded"),
        pytest.param("a.pt", legacy(pickled_tensor(16, 0, 16, 1, legacy=True), GIGA), DAMAGED, id="legacy-data"),
        pytest.param("a.pt", archive(pickled_tensor(16, 0, -1, 1, legacy=False)), DAMAGED, id="negative-extent"),
        pytest.param("a.pt", archive(pickled_tensor(16, 15, 2, -1, legacy=False)), DAMAGED, id="negative-stride"),
        pytest.param("a.pt", archive(pickled_tensor(16, -1, 1, 1, legacy=False)), DAMAGED, id="negative-offset"),
        pytest.param("a.pt", archive(pickle.dumps(bytearray(9), 2)), CODE, id="bytearray"),
        pytest.param("a.pt", legacy(pickle.dumps(bytearray(9), 2)), CODE, id="legacy-bytearray"),
        pytest.param("a.pt", archive(EXPANDED_COPY), CODE, id="expanded-copy"),
        pytest.param(
            "a.pt",
            archive(b"\x80\x02ctorch.storage\nUntypedStorage\n."),
            "got torch.storage.UntypedStorage",
            id="bare-storage",
        ),
        pytest.param("a.pt", archive(nested(200_000)), DAMAGED, id="nested-key"),
        pytest.param("a.pt", archive(nested(3000)), DAMAGED, id="nested-key-that-is-not-too-deep"),
        pytest.param("a.pt", legacy(nested(200_000)), DAMAGED, id="legacy-nested-key"),
        pytest.param("a.pt", archive(nested(200_000, value=True)), "got tuple under 'a'", id="nested-value"),
        pytest.param("a.pt", archive(b"\x80\x02" + bytes(10**7), zipfile.ZIP_DEFLATED), DAMAGED, id="bomb"),
        pytest.param("a.pt", twice, DAMAGED, id="two-of-a-name"),
        pytest.param("a.pt", lambda path: path.write_bytes(b"\x80\x02X\xff\xff\xff\x7fa"), DAMAGED, id="text"),
        pytest.param("a.safetensors", safetensors_file(b"{}", 90_000_000), DAMAGED, id="header-length"),
        pytest.param("a.safetensors", safetensors_file(b"{}", 2**63), DAMAGED, id="header-length-absurd"),
        pytest.param(
            "a.safetensors",
            safetensors_file(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
            DAMAGED,
            id="shape-that-overflows",
        ),
    ],
)
def test_claims_are_refused_and_never_allocated(name, make, message, tmp_path):
    make(tmp_path / name)
    torch.save({"a": torch.ones(3)}, tmp_path / "plain.pt")
    read_checkpoint(tmp_path / "plain.pt")  # what is imported and mapped on first use
    before = peak()
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path / name)
    assert message in str(caught.value)
    assert peak() - before < 10**5  # KiB; each claims a gigabyte


class Call:
    """What a pickle is to call, and with what."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[object, ...]:
        return self.parts


def with_metadata(metadata: object) -> dict[str, object]:
    state = OrderedDict(a=PLAIN)
    state._metadata = metadata
    return state


PLAIN = torch.ones(2, 2)
STATE = {"data": torch.ones(1).expand(9), "detach": torch.Size, "shape": 3, 0: 1}
STORAGE = torch.storage.TypedStorage(wrap_storage=PLAIN.untyped_storage(), dtype=PLAIN.dtype, _internal=True)
PARTS = (STORAGE, 0, (2, 2), (2, 1), True, OrderedDict())
TYPED = (torch._utils._rebuild_tensor_v2, nn.Parameter, PARTS, STATE)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"a": Call(torch._utils._rebuild_parameter_with_state, (PLAIN, True, {}, STATE))}, id="state"),
        pytest.param({"a": Call(torch._tensor._rebuild_from_type_v2, TYPED)}, id="state-of-a-type"),
        pytest.param({"a": Call(torch._utils._rebuild_tensor_v2, (*PARTS[:5], STATE))}, id="hooks"),
        pytest.param(with_metadata({3: 4, ("a",): {}}), id="metadata-of-no-names"),
        pytest.param(with_metadata({"": {"version": {}, 3: PLAIN}, "a": 3, "b": [PLAIN]}), id="metadata-of-no-numbers"),
        pytest.param(with_metadata("text"), id="metadata-of-text"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_odd_states_and_metadata_leave_plain_tensors(content, zipped, tmp_path):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "a.pt")
    (tensor,) = found.tensors.values()
    assert (type(tensor), vars(tensor), tensor.requires_grad, tensor._backward_hooks) == (torch.Tensor, {}, False, None)
    assert torch.equal(tensor.detach(), PLAIN)
    model = nn.Module()
    model.register_buffer("a", torch.zeros(2, 2))
    assert load_checkpoint(model, tmp_path / "a.pt").exact
    save_checkpoint(model, tmp_path / "b.pt")


@pytest.mark.parametrize("name", ["a\ud800", "\udfff"], ids=ascii)
def test_lone_surrogates_in_names_are_refused(name, tmp_path, command):
    torch.save({"b": PLAIN, name: PLAIN}, tmp_path / "a.pt")
    text = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    safetensors_file(text)(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for path, message in [("a.pt", "names of Unicode"), ("a.safetensors", DAMAGED), (".", "rename it")]:
        status, out, err = command("inspect", path)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err


READ = """
import os, resource, sys
from convsim_init.checkpoint.read import read_checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def warm_up():
    for path in "plain.pt", "plain.safetensors":
        read_checkpoint(path)
warm_up()
for path in sys.argv[1:]:
    if os.fork() == 0:  # each with a peak of its own
        warm_up()  # a new process has yet to map the pages of the libraries: tens of MiB with those of CUDA
        before, outcome = peak(), "read"
        try:
            kept = read_checkpoint(path)
        except Exception as error:
            outcome = str(error)
        print(os.path.getsize(path), peak() - before, outcome, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.posix
def test_memory_is_in_proportion_to_the_file(tmp_path):
    """Many small things, just below and far above what is taken: at most 64 MiB and four times the file."""
    torch.save({"a": PLAIN}, tmp_path / "plain.pt")
    safetensors.torch.save_file({"a": PLAIN}, tmp_path / "plain.safetensors")
    kinds = {
        "dicts": 600_000,
        "tensors": 25_000,
        "names": 300_000,
        "entries": 20_000,
        "header": 20_000,
        "index": 300_000,
    }
    suffix = {"index": ".index.json"}
    files = {f"{kind}{suffix.get(kind, '.bin')}": (kind, count) for kind, count in kinds.items()}
    files |= {f"more-{kind}.bin": (kind, 3 * kinds[kind]) for kind in ("dicts", "header")}
    for name, (kind, count) in files.items():
        many_small_things(kind, count)(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == len(files), done.stderr
    for name, line in zip(files, lines, strict=True):
        size, taken, outcome = line.split(maxsplit=2)
        assert int(taken) < 64 * 2**20 + 4 * int(size), name
        assert ("memory could run out" in outcome) == name.startswith("more"), (name, outcome)


def test_overlapping_and_repeated_tensors_are_refused_or_read_as_they_are(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = f'{{"a":{entry},"b":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(InputError, match=DAMAGED):
        read_checkpoint(path)


def many_small_things(kind: str, count: int) -> Callable[[Path], object]:
    """A file that holds nothing but objects without a number in them."""
    if kind == "header":
        entry = '"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        return safetensors_file(("{" + ",".join(entry % number for number in range(count)) + "}").encode())
    if kind == "index":
        return lambda path: path.write_text('{"weight_map":[' + "[]," * count + "[]]}")
    if kind == "entries":
        return lambda path: path.write_bytes(archive_of_entries(count))
    unit = {"dicts": b"}", "names": b"X\4\0\0\0\xf0\x9f\x98\x80", "tensors": b"h\1h\2R"}[kind]
    tensor = pickled_tensor(16, 0, 16, 1, legacy=True)
    tensor = tensor.replace(b"rebuild_tensor_v2\n", b"rebuild_tensor_v2\nq\1").replace(b"RtRs.", b"Rtq\2Rs")
    return legacy(tensor + b"X\1\0\0\0b](" + unit * count + b"es.", 16)


def archive_of_entries(count: int) -> bytes:
    """A zip archive of empty entries."""
    names = [b"a/data.pkl", *(b"%06x" % number for number in range(count))]
    local = b"PK\3\4" + bytes(22)
    entry, end = struct.Struct("<4s24xH12xL"), struct.Struct("<4s4xHHLLH")
    size = sum(entry.size + len(name) for name in names)
    body = b"".join(local + struct.pack("<HH", len(name), 0) + name for name in names)
    directory, place = [], 0
    for name in names:
        directory.append(entry.pack(b"PK\1\2", len(name), place) + name)
        place += 30 + len(name)
    return body + b"".join(directory) + end.pack(b"PK\5\6", 0, 0, size, len(body), 0)


names = st.text(max_size=8) | st.sampled_from(["a.weight", "weight", "__metadata__", "module.a.weight"])
numbers = st.integers(-1, 2**65) | st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E4M3", "F4", "?"]),
        "shape": st.lists(numbers, max_size=5),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2),
    }
)
whole_entries = st.lists(st.integers(0, 3), max_size=5).map(
    lambda shape: {
        "dtype": "U8",
        "shape": shape,
        "data_offsets": [0, int(torch.tensor([1, *shape]).prod())],
    }
)


@quick
@given(
    header=st.dictionaries(names, entries | whole_entries | st.dictionaries(names, names), max_size=2),
    size=st.integers(0, 128),
)
def test_any_header_gives_tensors_or_one_line(header, size, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    check_reading(path)


@quick
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.pt", "a.safetensors"]))
def test_any_bytes_give_tensors_or_one_line(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    check_reading(tmp_path / name)


def check_reading(path: Path) -> None:
    message = ""
    try:
        tensors = read_checkpoint(path).tensors
        assert sum(tensor.nbytes for tensor in tensors.values()) <= path.stat().st_size
        measure(tensors)
    except InputError as error:
        message = str(error)
    assert "\n" not in message


MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(4, 2, 1)))


@quick
@given(patterns=st.lists(st.text("[]!*?^-.01\\ab") | st.text(max_size=20), max_size=3), excluded=st.booleans())
def test_any_pattern_chooses_layers_or_is_refused(patterns, excluded):
    message = ""
    try:
        report = plan(MODEL, **{"exclude" if excluded else "include": patterns})
        assert [layer.name for layer in report.layers] == ["0", "1.0", "1.1"]
    except InputError as error:
        message = str(error)
    assert "\n" not in message


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=3)


@quick
@given(choices=st.dictionaries(st.sampled_from(list(Settings.__dataclass_fields__)), anything, max_size=3))
def test_any_settings_are_valid_or_refused(choices):
    try:
        made = Settings(**choices)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert made.steps >= 1
        assert 0 <= made.tolerance < 1


@quick
@given(name=st.text(max_size=300), suffix=st.sampled_from([".pt", ".safetensors", ".json", ""]))
def test_any_path_is_a_target_or_refused(name, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        check_target(name + suffix)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        str(error).encode()
    assert not list(tmp_path.iterdir())


parts = st.sampled_from(
    ["timm:", "torchvision:", "net.py:", "os:", "os.path:", "resnet18", "a.pt", ".", ":", "\0", "__"]
)
CALLS = ("os.system", "os.remove", "builtins.eval", "builtins.exec", "builtins.open", "subprocess.Popen")


@quick
@given(spec=st.lists(parts | st.text(max_size=6), max_size=4).map("".join))
def test_any_model_is_told_apart_without_running_anything(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("raise SystemError('run')")
    modules = set(sys.modules)
    try:
        check_model(spec)
    except InputError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        str(error).encode()
    assert {name.partition(".")[0] for name in set(sys.modules) - modules} <= {"timm", "torchvision"}


@quick
@given(
    key=st.sampled_from(["width", "seed", "", "a b", "__class__"]) | st.text(max_size=5),
    value=st.sampled_from([f"{call}('touch planted')" for call in CALLS])
    | st.text("[](){}'\"_.0-9,xe", max_size=40)
    | st.text(),
)
def test_any_argument_is_a_literal_or_text(key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        arguments = parse_arguments([f"{key}={value}"])
    except InputError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        str(error).encode()
    else:
        (parsed,) = arguments.values()
        name, _, value = f"{key}={value}".partition("=")
        assert list(arguments) == [name]
        assert not callable(parsed)
        assert (
            parsed == value or ast.literal_eval(value) == parsed or value.strip().lower() in WORDS or parsed != parsed
        )
    assert not list(tmp_path.iterdir())


# Arguments of the Python API


def treated_by_an_optimizer(**choices: object) -> None:
    with initializing(**choices):
        torch.optim.SGD(small_network().parameters(), 0.1)


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize(
    "value", [-1.5, b"x", [3], {"a": 1}, object(), torch.zeros(2)], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize(
    ("call", "argument", "expected"),
    [
        (lambda given: save_checkpoint(small_network(), "x.safetensors", **given), "prefix", "of type str"),
        (lambda given: save_checkpoint(small_network(), "x.safetensors", **given), "report", "of type Report"),
        (lambda given: load_checkpoint(small_network(), "x.safetensors", **given), "key", "of type str"),
        (lambda given: calibrate_(small_network(), input_shape=(3, 8, 8), **given), "seed", "a whole number"),
        (lambda given: draw_base_(small_network(), "orthogonal", **given), "seed", "a whole number"),
        (lambda given: treated_by_an_optimizer(**given), "settings", "of type Settings"),
        (lambda given: treated_by_an_optimizer(**given), "on_report", "of type Callable"),
    ],
    ids=["prefix", "report", "key", "calibrate-seed", "draw-seed", "settings", "on_report"],
)
def test_arguments_of_another_type_are_refused_in_one_line(call, argument, expected, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{argument}.*{expected}.*, got .*") as caught:
        call({argument: value})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
