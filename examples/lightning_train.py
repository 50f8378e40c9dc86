"""Lightning: load the file into the network, before or after the LightningModule wraps it.

    convsim-init resnet18 --out init.safetensors
    python examples/lightning_train.py init.safetensors

`load_from_checkpoint` is for Lightning's own checkpoints and does not take a plain state dict.
"""

import sys

import lightning
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18


class Classifier(lightning.LightningModule):
    """A network, its loss and its optimizer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class ShowMatches(lightning.Callback):
    """Once the trainer is set up: how many entries of the network hold exactly what the file holds."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        state = module.model.state_dict()
        same = sum(torch.equal(value.cpu(), self.weights[key]) for key, value in state.items() if key in self.weights)
        print(f"matched {same} of {len(state)}")


def main(file: str = "init.safetensors") -> None:
    weights = load_file(file)
    module = Classifier(resnet18())
    module.model.load_state_dict(weights)  # strict; `module` itself would need the keys of `--prefix model.`

    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,)))  # put yours here
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[ShowMatches(weights)], logger=False, enable_checkpointing=False, log_every_n_steps=1
    )
    trainer.fit(module, DataLoader(data, batch_size=8))


if __name__ == "__main__":
    main(*sys.argv[1:])
