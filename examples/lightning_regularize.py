"""Lightning: the similarity as a term of the loss, in the first third of the training, by a callback.

python examples/lightning_regularize.py

It adds the gradient just before the optimizer's step, once for several accumulated batches and in units of the loss.
"""

import lightning
import torch
from lightning_train import Classifier
from network import small
from torch.utils.data import DataLoader, TensorDataset

import convsim_init as ci


class Regularize(lightning.Callback):
    """Adds the gradient of the layers' mean similarity, with a weight that decays to 0, and logs it each epoch."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.similarity = ci.ConvolutionalSimilarity(module, normalized=True)

    def mean(self) -> torch.Tensor:
        return self.similarity() / len(self.similarity.layers)

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        mean = self.mean().item()
        module.log("similarity", mean)
        print(f"epoch {trainer.current_epoch}: similarity {mean:.6f}")

    def on_before_optimizer_step(self, trainer: lightning.Trainer, *_: object) -> None:
        weight = self.weight * max(0, 1 - 3 * trainer.global_step / trainer.estimated_stepping_batches)
        if weight:
            (weight * self.mean()).backward()


def main(weight: float = 20) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,)))  # put yours here
    trainer = lightning.Trainer(max_epochs=6, callbacks=[Regularize(weight)], logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(small()), DataLoader(data, batch_size=8))


if __name__ == "__main__":
    main()
