"""MMEngine: its Runner draws the weights anew when training starts, so it has to load the file itself.

    convsim-init resnet18 --prefix backbone. --out init.pt
    python examples/mmengine_train.py init.pt

Before the first batch `Runner.train()` calls the model's `init_weights()`. That draws whatever the `init_cfg` of the
model and of its parts ask for, over any weights loaded or initialized before. What `load_from` names is loaded later.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18


class Classifier(BaseModel):
    """A network and its loss; like most OpenMMLab models it names its initialization."""

    def __init__(self, init_cfg: dict[str, str]) -> None:
        super().__init__(init_cfg=init_cfg)
        self.backbone = resnet18()

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Tensor | dict[str, Tensor]:
        scores = self.backbone(images)
        return {"loss": F.cross_entropy(scores, labels)} if mode == "loss" else scores


class ShowMatches(Hook):
    """Once the runner is set up: how many entries of the model hold exactly what the file holds."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def before_train(self, runner: Runner) -> None:
        state = runner.model.state_dict()
        same = sum(torch.equal(value.cpu(), self.weights[key]) for key, value in state.items() if key in self.weights)
        print(f"matched {same} of {len(state)}")


def train(model: nn.Module, weights: dict[str, Tensor], load_from: str | None = None) -> None:
    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,)))  # put yours here
    with tempfile.TemporaryDirectory() as folder:  # put yours here
        runner = Runner(
            model,
            work_dir=folder,
            train_dataloader=DataLoader(data, batch_size=8),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}},
            custom_hooks=[ShowMatches(weights)],
            default_hooks={"checkpoint": None},
            load_from=load_from,  # not strict, so look at what it reports, and count
            experiment_name=Path(folder).name,  # else two runs of the same second share what logs them
        )
        runner.train()


def main(file: str = "init.pt") -> None:
    weights = torch.load(file, weights_only=True)
    train(Classifier({"type": "Kaiming", "layer": "Conv2d"}), weights, load_from=file)
    train(Classifier({"type": "Pretrained", "checkpoint": file}), weights)  # the same by the model's configuration


if __name__ == "__main__":
    main(*sys.argv[1:])
