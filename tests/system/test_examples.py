"""The examples run with the real trainers, and once a trainer is set up the weights are still those of the file."""

import multiprocessing
import os
import re
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

import convsim_init as ci

pytestmark = pytest.mark.posix  # processes are forked
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def server() -> "multiprocessing.context.ForkServerContext":
    """Forks processes that have what all examples need loaded already, which saves seconds for each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "torchvision"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(server, tmp_path, folder) -> Callable[..., Callable[[], str]]:
    """Start a process of its own in that folder: trainers leave signal handlers, loggers and patches behind.

    What it returns waits for the process, sees that it ended well and returns what it printed.
    """

    def start(target: Callable[..., None], *arguments: str, **environment: str) -> Callable[[], str]:
        log = tmp_path / f"log-{environment.get('RANK', '0')}"
        process = server.Process(target=run_there, args=(target, arguments, folder, environment, log), daemon=True)
        process.start()

        def finish() -> str:
            process.join(300)  # one of two that wait for each other would wait for ever
            text = log.read_text()
            assert process.exitcode == 0, text
            return text

        return finish

    return start


def run_there(target, arguments, folder, environment, log) -> None:
    os.chdir(folder)
    os.environ |= environment
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # so small a network gains nothing from more, and loses much where others run beside it
    target(*arguments)
    sys.stdout.flush()


def run_script(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def matches(text: str) -> list[tuple[int, int]]:
    return [(int(matched), int(expected)) for matched, expected in re.findall(r"matched (\d+) of (\d+)", text)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of init files of ResNet-18, as the command writes them."""
    folder = tmp_path_factory.mktemp("files")
    model = ci.build_model("resnet18")
    ci.initialize_(model, settings=ci.Settings(steps=2))
    ci.save_checkpoint(model, folder / "bare.safetensors")
    ci.save_checkpoint(model, folder / "bare.pt")
    ci.save_checkpoint(model, folder / "backbone.pt", prefix="backbone.")
    ci.save_checkpoint(model, folder / "model.safetensors", prefix="model.")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where an example runs."""
    path = tmp_path / "here"
    path.mkdir()
    return path


ALL, NO_HEAD = 122, 120  # entries of a ResNet-18, and those that a new head leaves


@pytest.mark.parametrize(
    ("trainer", "file", "expected"),
    [
        pytest.param("torchvision", "bare.safetensors", [ALL], id="torchvision"),
        pytest.param("timm", "bare.safetensors", [ALL, NO_HEAD], id="timm"),
        pytest.param("transformers", "bare.safetensors", [38, ALL], id="transformers"),
        pytest.param("lightning", "bare.safetensors", [ALL], id="lightning"),
        pytest.param("mmengine", "backbone.pt", [ALL, ALL], id="mmengine"),
        pytest.param("fastai", "bare.pt", [ALL, NO_HEAD], id="fastai"),
        pytest.param("accelerate", "bare.safetensors", [ALL], id="accelerate"),
        pytest.param("hubmixin", "model.safetensors", [ALL], id="hubmixin"),
    ],
)
def test_a_trainer_starts_from_the_file(trainer, file, expected, files, start, folder):
    pytest.importorskip({"hubmixin": "huggingface_hub"}.get(trainer, trainer))
    text = start(run_script, f"{trainer}_train.py", str(files / file))()
    assert matches(text) == [(count, count) for count in expected]
    assert list(folder.iterdir()) == []


def test_lightning_cli_starts_from_the_file(files, start, folder):
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    text = start(run_script, "lightningcli_train.py", "fit", "--model.weights", str(files / "bare.safetensors"))()
    assert matches(text) == [(ALL, ALL)]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("script", "ranks"), [("ddp_train.py", [1, 1]), ("fsdp_train.py", [1, 0])])
def test_processes_in_parallel_start_from_the_file(script, ranks, files, start, folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    arguments = (run_script, script, str(files / "bare.safetensors"))
    processes = [start(*arguments, RANK=rank, **shared) for rank in ("0", "1")]
    for finish, tellings in zip(processes, ranks, strict=True):
        assert matches(finish()) == [(ALL, ALL)] * tellings
    assert list(folder.iterdir()) == []


def test_an_own_initialization_uses_it(start, folder):
    text = start(run_script, "apply.py")()
    similarities = re.findall(r"(\S+) -> (\S+)$", text, re.MULTILINE)
    assert len(similarities) == 3
    assert all(float(after) < 0.5 * float(before) for before, after in similarities)
    assert list(folder.iterdir()) == []


def train_in_place(file: str) -> None:
    example = runpy.run_path(str(EXAMPLES / "mmengine_train.py"))
    weights = torch.load(file, weights_only=True)
    model = example["Classifier"]({"type": "Kaiming", "layer": "Conv2d"})
    model.load_state_dict(weights)
    example["train"](model, weights)


def test_mmengine_overwrites_what_is_loaded_before(files, start):
    pytest.importorskip("mmengine")
    text = start(train_in_place, str(files / "backbone.pt"))()
    assert matches(text) == [(ALL - 20, ALL)]  # its 20 convolutions are drawn anew: the example is needed


def train_without_and_with(name: str) -> None:
    sys.path.insert(0, str(EXAMPLES))
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    main(weight=0)
    main()


@pytest.mark.parametrize("trainer", ["plain", "lightning", "transformers", "fastai", "mmengine"])
def test_the_regularizer_lowers_the_similarity(trainer, start, folder):
    if trainer != "plain":
        pytest.importorskip(trainer)
    text = start(train_without_and_with, f"{trainer}_regularize.py")()
    shown = [float(value) for value in re.findall(r"epoch \d: similarity (\S+)", text)]
    without, under = shown[:6], shown[6:]
    assert len(under) == 6
    assert under[0] == without[0]
    assert under[0] > under[1] > under[2]  # the first third
    assert without[2] > 0.999 * without[0]
    assert all(a < b for a, b in zip(under[2:], without[2:], strict=True))
    assert list(folder.iterdir()) == []


# Scripts that know nothing of this package. What they build is a ResNet-18 drawn from seed 0.
LOOK = """
import sys
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

class Stop(Exception):
    pass

def look(module, images):  # before the first forward pass of the training
    torch.save(module.state_dict(), "first.pt")
    raise Stop

data = TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
torch.manual_seed(0)
"""
SCRIPTS = {
    "torchvision": """
import torchvision
model = torchvision.models.get_model("resnet18", weights=None)
model.register_forward_pre_hook(look)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(data.tensors[0])
""",
    "timm": """
import timm
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
model = timm.create_model("resnet18", num_classes=1000)
model.register_forward_pre_hook(look)
optimizer = create_optimizer_v2(model, opt="lamb", lr=0.05)
ema = ModelEmaV3(model)
assert all(map(torch.equal, ema.module.state_dict().values(), model.state_dict().values()))
model(data.tensors[0])
""",
    "transformers": """
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
model = ResNetForImageClassification(ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], layer_type="basic"))
model.register_forward_pre_hook(look)
examples = [{"pixel_values": image, "labels": label % 2} for image, label in data]
Trainer(model, TrainingArguments("out", report_to="none"), train_dataset=examples).train()
""",
    "lightning": """
import lightning
import torchvision
class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torchvision.models.resnet18()
        self.model.register_forward_pre_hook(look)
    def training_step(self, batch, _):
        return F.cross_entropy(self.model(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)
trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), DataLoader(data, batch_size=8))
""",
    "mmengine": """
import torchvision
from mmengine.model import BaseModel
from mmengine.runner import Runner
class Classifier(BaseModel):  # its weights are drawn after the optimizer is made
    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.register_forward_pre_hook(look)
    def init_weights(self):
        torch.manual_seed(0)
        for new, old in zip(torchvision.models.resnet18().parameters(), self.backbone.parameters()):
            old.data = new.data
    def forward(self, images, labels, mode="tensor"):
        return {"loss": F.cross_entropy(self.backbone(images), labels)}
loader = DataLoader(data, batch_size=8)
wrapper = {"optimizer": {"type": "SGD", "lr": 0.05}}
Runner(Classifier(), "out", loader, train_cfg={"by_epoch": True, "max_epochs": 1}, optim_wrapper=wrapper).train()
""",
}


def run_treated(script: str) -> None:
    from convsim_init.cli.main import main

    with pytest.raises(SystemExit):
        main(["run", "--steps", "2", script])


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_a_script_that_builds_its_network_is_run(trainer, start, folder):
    pytest.importorskip(trainer)
    (folder / "train.py").write_text(LOOK + SCRIPTS[trainer])
    text = start(run_treated, "train.py")()
    assert "Stop" in text.splitlines()
    first = torch.load(folder / "first.pt")
    torch.manual_seed(0)
    if trainer == "transformers":
        transformers = pytest.importorskip("transformers")
        config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], layer_type="basic")
        model = transformers.ResNetForImageClassification(config)
    else:
        model = ci.build_model(f"{'timm' if trainer == 'timm' else 'torchvision'}:resnet18", seed=0)
    report = ci.initialize_(model, settings=ci.Settings(steps=2))
    assert f"{len(report.layers)} convolutions: {len(report.layers)} initialized" in text
    same = [torch.equal(value, first[key]) for key, value in model.state_dict().items()]
    assert all(same), f"{sum(same)} of {len(same)}"


def run_ultralytics(data: str) -> None:
    from ultralytics.engine.trainer import BaseTrainer

    # These need torchvision's own compiled operators.
    BaseTrainer.validate, BaseTrainer.final_eval = lambda trainer: ({}, 0.0), lambda trainer: None
    run_script("ultralytics_train.py", data)


def test_ultralytics_starts_from_a_network_that_was_loaded(start, folder):
    pytest.importorskip("ultralytics", reason="without ultralytics: pip install ultralytics")
    image = pytest.importorskip("PIL.Image")
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for index in range(4):
        image.new("RGB", (64, 64), (60 * index, 120, 200)).save(folder / "images" / f"{index}.png")
        (folder / "labels" / f"{index}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [a, b]\n")
    text = start(run_ultralytics, "data.yaml", YOLO_CONFIG_DIR=str(folder), YOLO_OFFLINE="1")()
    ((matched, expected),) = matches(text)
    assert matched == expected > 80


def test_every_example_is_tested():
    tested = {"torchvision", "timm", "transformers", "lightning", "mmengine", "fastai", "ddp"}
    tested |= {"accelerate", "hubmixin", "lightningcli", "fsdp", "ultralytics"}
    assert {path.name.removesuffix("_train.py") for path in EXAMPLES.glob("*_train.py")} == tested
    tested = {"plain", "lightning", "transformers", "fastai", "mmengine"}
    assert {path.name.removesuffix("_regularize.py") for path in EXAMPLES.glob("*_regularize.py")} == tested
