"""LightningCLI: the file is a hyperparameter of the module.

    convsim-init resnet18 --out init.safetensors
    python examples/lightningcli_train.py fit --model.weights init.safetensors

`--ckpt_path` is for Lightning's own checkpoints, with the state of an optimizer, and takes no file of ours.
"""

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from lightning_train import Classifier, ShowMatches
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18


class StartingFromFile(Classifier):
    """A classifier that loads its weights when it is made."""

    def __init__(self, weights: str = "init.safetensors") -> None:
        super().__init__(resnet18())
        self.weights = load_file(weights)
        self.model.load_state_dict(self.weights)

    def configure_callbacks(self) -> list[lightning.Callback]:
        return [ShowMatches(self.weights)]


class MadeData(lightning.LightningDataModule):
    """Random images; put yours here."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,))), batch_size=8)


if __name__ == "__main__":
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    LightningCLI(StartingFromFile, MadeData, trainer_defaults=defaults, save_config_callback=None)
