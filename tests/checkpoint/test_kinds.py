"""The files that people have: told by what they hold, not by what they are called."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from convsim_init import InputError, build_model, load_checkpoint
from convsim_init.checkpoint.read import read_checkpoint

TENSORS = {"a.weight": torch.ones(3, 2, 2, 2), "b": torch.zeros(5)}


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "last.ckpt", "pytorch_model.bin", "model_best.pth.tar", "net.th"])
@pytest.mark.parametrize("written", ["zip", "legacy", "safetensors"])
def test_the_content_decides_how_a_file_is_read(name, written, tmp_path):
    if written == "safetensors":
        safetensors.torch.save_file(TENSORS, tmp_path / name)
    else:
        torch.save({"state_dict": TENSORS}, tmp_path / name, _use_new_zipfile_serialization=written == "zip")
    found = read_checkpoint(tmp_path / name)
    torch.testing.assert_close(found.tensors, TENSORS)
    assert found.wrapper == ("" if written == "safetensors" else "state_dict")


@pytest.mark.parametrize("entry", ["net", "module", "params", "params_ema", "my own name"])
def test_the_only_state_dict_is_opened_whatever_it_is_called(entry, tmp_path):
    torch.save({entry: TENSORS, "acc": 91.2, "epoch": 3, "optimizer": {"state": {}, "groups": [1]}}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").wrapper == entry


def test_of_several_state_dicts_one_is_chosen_by_key(tmp_path):
    other = {"a.weight": torch.zeros(1)}
    torch.save({"generator": TENSORS, "discriminator": other}, tmp_path / "gan.pth")
    with pytest.raises(InputError, match=r"expected one state dict in .*, got generator, discriminator: choose one"):
        read_checkpoint(tmp_path / "gan.pth")
    torch.testing.assert_close(read_checkpoint(tmp_path / "gan.pth", "discriminator").tensors, other)
    with pytest.raises(InputError, match=r"'encoder' in .*: there is generator, discriminator"):
        read_checkpoint(tmp_path / "gan.pth", "encoder")


def test_a_state_dict_beside_a_tensor_is_to_be_chosen(tmp_path):
    torch.save({"loss": torch.tensor(3.0), "best": TENSORS}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="got dict under 'best': choose it with key"):
        read_checkpoint(tmp_path / "a.pt")
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pt", "best").tensors, TENSORS)


def test_a_key_with_a_dot_is_found_beside_one_that_is_its_beginning(tmp_path):
    other = {"a.weight": torch.zeros(1)}
    torch.save({"net": TENSORS, "net.ema": other}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").others == ("net.ema",)
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pt", "net.ema").tensors, other)
    torch.save({"net": {"ema": other}, "net.ema": 0.999}, tmp_path / "b.pt")
    torch.testing.assert_close(read_checkpoint(tmp_path / "b.pt", "net.ema").tensors, other)
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pt", "net").tensors, TENSORS)


def test_which_one_was_read_and_which_others_there_are_is_said(tmp_path):
    torch.save({"state_dict_ema": TENSORS, "state_dict": TENSORS}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert (found.wrapper, found.others) == ("state_dict", ("state_dict_ema",))
    assert read_checkpoint(tmp_path / "a.pth", "state_dict_ema").wrapper == "state_dict_ema"


COPY = {f"module.{key}": value for key, value in TENSORS.items()}
OPTIMIZER = {"state": {"a.weight": {"exp_avg": torch.zeros(3)}, 0: {"step": torch.zeros(())}}, "lr": 0.1}


@pytest.mark.parametrize(
    ("content", "wrapper", "others"),
    [
        (
            {"model": TENSORS, "model_ema": {"module": COPY, "decay": 0.9}, "optimizer": OPTIMIZER},
            "model",
            ["model_ema.module"],
        ),
        ({"app": {"model": {"module": TENSORS}, "ema": {"shadow": COPY}}}, "app.model.module", ["app.ema.shadow"]),
        ({"run": {"model": TENSORS, "ema": {"b": torch.ones(5)}}}, "run.model", ["run.ema"]),
        ({"epoch": 3, "model_ema": {"module": COPY, "decay": 0.9}}, "model_ema.module", []),
    ],
    ids=["beside", "deeper", "siblings", "alone"],
)
def test_copies_further_inside_are_found_and_named(content, wrapper, others, tmp_path, command):
    torch.save(content, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert (found.wrapper, list(found.others)) == (wrapper, others)
    for key in others:
        assert read_checkpoint(tmp_path / "a.pth", key).wrapper == key
    more = f"; --key takes another: {others[0]}" if others else ""
    assert f"the weights are those under '{wrapper}'{more}\n" in command("inspect", "a.pth")[1]


def test_two_copies_of_which_none_has_a_usual_name_are_chosen_from(tmp_path):
    torch.save({"epoch": 3, "mine": {"now": TENSORS}, "yours": {"now": COPY}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"expected one state dict in .*, got mine, yours: choose one with key"):
        read_checkpoint(tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth", "yours").wrapper == "yours.now"


def test_a_key_may_go_through_several_dicts(tmp_path):
    torch.save({"states": {"model": TENSORS, "ema": {"b": torch.ones(5)}}}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth", "states.ema").tensors["b"].sum() == 5
    assert read_checkpoint(tmp_path / "a.pth", "states.ema").wrapper == "states.ema"


def test_a_file_of_which_several_parts_have_the_keys_of_a_model_but_other_shapes_is_another_models(tmp_path):
    torch.save(build_model("resnet18").state_dict(), tmp_path / "a.pt")  # each of three downsamplings has a 0.weight
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8))
    with pytest.raises(InputError, match="none of which fits"):
        load_checkpoint(model, tmp_path / "a.pt")


def test_a_file_with_two_copies_of_a_network_asks_which(tmp_path, command):
    state = build_model("cifar_resnet18", seed=1).state_dict()
    copies = {"encoder_q": state, "encoder_k": build_model("cifar_resnet18", seed=2).state_dict()}
    moco = {f"module.{name}.{key}": value for name, one in copies.items() for key, value in one.items()}
    torch.save({"state_dict": moco | {"module.queue": torch.zeros(3)}}, tmp_path / "moco.pth")
    one_of_two = "2: choose one with key .*: state_dict.module.encoder_q, state_dict.module.encoder_k"
    other = build_model("cifar_resnet18", seed=3)
    with pytest.raises(InputError, match=one_of_two):
        load_checkpoint(other, tmp_path / "moco.pth")
    for arguments in (["verify", "moco.pth", "cifar_resnet18"], ["moco.pth", "--like", "cifar_resnet18", "--dry-run"]):
        status, _, err = command(*arguments)
        assert (status, "choose one with key" in err) == (2, True)
        assert command(*arguments, "--key", "state_dict.module.encoder_k")[0] == 0
    assert load_checkpoint(other, tmp_path / "moco.pth", key="state_dict.module.encoder_q").exact
    assert torch.equal(other.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_hugging_face(name, tmp_path):
    model = build_model("cifar_resnet18", seed=3)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        safetensors.torch.save_file(state, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    other = build_model("cifar_resnet18", seed=4)
    assert load_checkpoint(other, tmp_path).exact
    assert torch.equal(other.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize("arguments", [["inspect"], ["--dry-run"], ["inspect", "--like", "cifar_resnet18"]])
def test_which_of_a_folders_files_was_read_is_told(arguments, tmp_path, command):
    state = {key: value.contiguous() for key, value in build_model("cifar_resnet18").state_dict().items()}
    (tmp_path / "hf").mkdir()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    assert "was read" not in command(*arguments, "hf", "--json")[1]
    safetensors.torch.save_file(state, tmp_path / "hf" / "model.safetensors")
    remarks = json.loads(command(*arguments, "hf", "--json")[1])["remarks"]
    assert "model.safetensors was read, and not pytorch_model.bin" in remarks


def test_a_folder_of_several_files_with_an_index(tmp_path):
    for name, key in (("model-1.safetensors", "a.weight"), ("model-2.safetensors", "b")):
        safetensors.torch.save_file({key: TENSORS[key]}, tmp_path / name)
    index = {"weight_map": {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(read_checkpoint(tmp_path).tensors, TENSORS)
    for name in ("../outside.safetensors", "x" * 2000 + ".safetensors"):
        index["weight_map"]["b"] = name
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="expected names of files beside") as caught:
            read_checkpoint(tmp_path)
        assert len(str(caught.value)) < 400


def test_what_is_damaged_is_named(tmp_path):
    index, shard = tmp_path / "model.safetensors.index.json", tmp_path / "model-2.safetensors"
    safetensors.torch.save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model-1.safetensors")
    shard.write_bytes(b"\x08\0\0\0\0\0\0\0{garbage")
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-1.safetensors", "b": shard.name}}))
    with pytest.raises(InputError, match=r"written by safetensors, got '[^']*model-2\.safetensors', which is damaged"):
        read_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(InputError, match=r"written by Hugging Face, got '[^']*index\.json', which is damaged"):
        read_checkpoint(tmp_path)


def test_an_index_says_which_file_a_tensor_is_in(tmp_path):
    stale = {"a.weight": torch.zeros_like(TENSORS["a.weight"]), "b": TENSORS["b"]}
    safetensors.torch.save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model-1.safetensors")
    safetensors.torch.save_file(stale, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(read_checkpoint(tmp_path).tensors, TENSORS)
    index["weight_map"]["c"] = "model-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"expected c in '.*model-1\.safetensors', as its index says"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("inside", ["model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json"])
def test_a_folder_without_weights_says_what_is_in_it(inside, tmp_path):
    (tmp_path / "logs.txt").touch()
    path = tmp_path / inside
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value).endswith(f"name the file, such as {str(tmp_path / Path(inside).parts[0])!r}")


@pytest.mark.parametrize("name", ["hf", "runs/hf"])
def test_a_folder_without_weights_says_which_file_it_lacks(name, tmp_path, command):
    (tmp_path / name).mkdir(parents=True)
    name = str(Path(name))
    for arguments in (["inspect", name], ["verify", name, "cifar_resnet18"]):
        status, _, err = command(*arguments)
        assert (status, "expected a folder with model.safetensors, model.safetensors.index.json, " in err) == (2, True)
        assert f"got {name!r}, which has none of them" in err


def test_an_empty_name_is_not_that_of_the_folder(tmp_path, command):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    assert "got '': name one" in command("inspect", "")[2]
    refusal = "expected the path of a checkpoint, got an empty text: name a file"
    assert command("verify", "", "cifar_resnet18") == (2, "", f"Error: {refusal}\n")
    with pytest.raises(InputError, match=refusal):
        load_checkpoint(torch.nn.Conv2d(3, 4, 3), "")


def write_distributed(folder: Path, **entries: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(entries, checkpoint_id=folder)


def test_a_folder_of_torch_distributed_checkpoint(tmp_path, command):
    model = build_model("cifar_resnet18", seed=3)
    write_distributed(tmp_path / "flat", **model.state_dict())
    write_distributed(
        tmp_path / "nested",
        app={"model": model.state_dict(), "epoch": 3, "optim": {"state": {"0": {"step": torch.ones(())}}, "lr": [0.1]}},
    )
    for folder, entry in (("flat", ""), ("nested", "app.model")):
        found = read_checkpoint(tmp_path / folder)
        assert found.wrapper == entry
        torch.testing.assert_close(found.tensors, dict(model.state_dict()), rtol=0, atol=0)
        assert load_checkpoint(build_model("cifar_resnet18", seed=4), tmp_path / folder).exact
        assert command("verify", folder, "cifar_resnet18")[0] == 0
    status, out, err = command("inspect", "nested", "--key", "app.model", "--like", "cifar_resnet18")
    assert (status, err) == (0, "")
    assert "the file's tensors are under 'app.model'" in out
    assert "the weights are those under 'app.model'" in command("inspect", "nested")[1]


@pytest.mark.posix
def test_parts_of_tensors_that_several_processes_wrote(tmp_path):
    (tmp_path / "save.py").write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "save.py"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "saved")) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    weight = torch.arange(5 * 3 * 2 * 2.0).reshape(5, 3, 2, 2)  # three rows in one process, two in the other
    found = read_checkpoint(tmp_path / "saved").tensors
    torch.testing.assert_close(found, {"weight": weight, "bias": torch.ones(5)}, rtol=0, atol=0)


SHARDED = """
import os, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
model = torch.nn.Conv2d(3, 5, 2)
with torch.no_grad():
    model.weight.copy_(torch.arange(60.0).reshape(5, 3, 2, 2))
    model.bias.fill_(1)
fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
dcp.save({"model": model.state_dict()}, checkpoint_id="saved")
dist.barrier()
os._exit(0)  # an end in order aborts now and then, over a thread of gloo's that still runs
"""


def test_distributed_checkpoints_that_lack_or_hide_something_are_refused(tmp_path):
    folder = tmp_path / "saved"
    write_distributed(folder, **TENSORS, epoch=3)
    with pytest.raises(InputError, match=r"BytesStorageMetadata under 'epoch'"):
        read_checkpoint(folder)
    write_distributed(folder, **TENSORS)
    whole = (folder / ".metadata").read_bytes()
    (folder / "__0_0.distcp").rename(tmp_path / "outside")
    for name in (b"__0_0.distcp", b"../outside", b"/dev/zero"):
        (folder / ".metadata").write_bytes(whole.replace(b"\x0c__0_0.distcp", bytes([len(name)]) + name))
        with pytest.raises(InputError, match=rf"expected the file '{name.decode()}' beside"):
            read_checkpoint(folder)


@pytest.mark.parametrize(
    ("part", "whole", "offsets"),
    [
        ((2, 3), (4, 3), [(0, 0), (1, 0)]),
        ((2, 3), (3, 3), [(0, 0), (1, 0)]),
        ((2,), (2, 2), [(0,)]),
    ],
    ids=["overlap with a hole", "overlap without", "of another rank"],
)
def test_parts_that_do_not_make_up_the_whole_are_refused(part, whole, offsets, tmp_path):
    write_distributed(tmp_path, weight=torch.ones(part), other=torch.ones(9, 9))
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["weight"].size = torch.Size(whole)
    index, place = next(one for one in metadata.storage_data.items() if one[0].fqn == "weight")
    metadata.storage_data = {dataclasses.replace(index, offset=torch.Size(offset)): place for offset in offsets}
    del metadata.state_dict_metadata["other"]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *((name, "another program's") for name in ("net.onnx", "net.gguf", "net.h5")),
        ("net.pt2", "an exported program"),
    ],
)
def test_other_programs_files_say_what_to_do(name, what, tmp_path, command):
    for prepare in (lambda path: None, lambda path: path.write_bytes(b"\x08\x07")):  # its name alone tells
        prepare(tmp_path / name)
        status, _, err = command("inspect", name)
        assert status == 2
        assert f"got '{name}', which is {what}: save the PyTorch model's state_dict()" in err


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"GGUF" + bytes(50), "another program's: save the PyTorch model's state_dict()"),
        (b"\x89HDF\r\n" + bytes(50), "another program's: save the PyTorch model's state_dict()"),
        (b"\x1f\x8b\x08" + bytes(50), "an archive: unpack it first"),
        (b"model_weights.ckpt" + bytes(239) + b"ustar" + bytes(250), "an archive: unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS: `git lfs pull` gets the file itself"),
    ],
    ids=["gguf", "hdf5", "gzip", "tar", "lfs"],
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.nemo"])
def test_what_a_file_begins_with_says_what_it_is(content, what, name, tmp_path, command):
    (tmp_path / name).write_bytes(content)
    for arguments in (["inspect", name], ["verify", name, "cifar_resnet18"]):
        assert command(*arguments) == (
            2,
            "",
            f"Error: expected weights of PyTorch, got '{name}', which is {what}"
            f"{' as .safetensors' * what.startswith('another')}\n",
        )


def test_a_part_of_a_distributed_checkpoint_says_what_to_name(tmp_path, command):
    dcp.save({"model": TENSORS}, checkpoint_id=tmp_path / "saved")
    path = str(Path("saved", "__0_0.distcp"))
    assert f"got {path!r}, which is a part of a checkpoint: name its folder" in command("inspect", path)[2]


def test_an_archive_of_other_files_says_what_is_in_it(tmp_path):
    np.savez(tmp_path / "a.npz", weight=np.ones(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"an archive of other files such as 'weight.npy': save"):
        read_checkpoint(tmp_path / "a.pt")


def test_the_command_takes_an_index_by_its_name(tmp_path, command):
    safetensors.torch.save_file({"conv.weight": torch.randn(8, 3, 3, 3)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"conv.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    status, out, err = command("inspect", "model.safetensors.index.json", "--json")
    assert (status, err, json.loads(out)["layers"][0]["shape"]) == (0, "", [8, 3, 3, 3])


def test_a_key_that_is_not_made_is_told_as_one(tmp_path):
    torch.save({b"conv.weight": torch.ones(8, 3, 3, 3)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"got Tensor under a key that is no text: save"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("subcommand", [["inspect"], ["compare", "a.pth"], []], ids=["inspect", "compare", "init"])
def test_the_command_takes_a_key(subcommand, tmp_path, command):
    state = build_model("cifar_resnet18").state_dict()
    torch.save({"generator": state, "critic": state}, tmp_path / "a.pth")
    status, _, err = command(*subcommand, "a.pth")
    assert (status, "choose one with key (--key NAME" in err) == (2, True)
    quick = ["--steps", "1", "--include", "conv1"] if not subcommand else []
    status, out, err = command(*subcommand, "a.pth", "--key", "critic", *quick)
    assert (status, err) == (0, "")
    if subcommand != ["compare", "a.pth"]:
        assert "the weights are those under 'critic'; --key takes another: generator" in out
