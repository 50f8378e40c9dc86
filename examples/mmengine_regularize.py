"""MMEngine: the similarity as a term of the loss, in the first third of the training, by a hook.

python examples/mmengine_regularize.py

A model's losses are summed by `parse_losses`, and each of them is logged; the hook adds one.
"""

import tempfile
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine_train import Classifier
from network import small
from torch.utils.data import DataLoader, TensorDataset

import convsim_init as ci


class Regularize(Hook):
    """Adds the layers' mean similarity to the losses, with a weight that decays to 0, and shows it each epoch."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.similarity = ci.ConvolutionalSimilarity(model, normalized=True)
        parse = model.parse_losses

        def parse_losses(losses: dict[str, torch.Tensor]) -> object:
            weight = self.weight * max(0, 1 - 3 * runner.iter / runner.max_iters)
            return parse(losses | {"loss_similarity": weight * self.mean()} if weight else losses)

        model.parse_losses = parse_losses

    def mean(self) -> torch.Tensor:
        return self.similarity() / len(self.similarity.layers)

    def before_train_epoch(self, runner: Runner) -> None:
        print(f"epoch {runner.epoch}: similarity {self.mean().item():.6f}")


def main(weight: float = 20) -> None:
    torch.manual_seed(0)
    model = Classifier({"type": "Kaiming", "layer": "Conv2d"})
    model.backbone = small()
    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,)))  # put yours here
    with tempfile.TemporaryDirectory() as folder:  # put yours here
        runner = Runner(
            model,
            work_dir=folder,
            experiment_name=Path(folder).name,  # else two runs of the same second share what logs them
            train_dataloader=DataLoader(data, batch_size=8),
            train_cfg={"by_epoch": True, "max_epochs": 6},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}},
            custom_hooks=[Regularize(weight)],
            default_hooks={"checkpoint": None},
            randomness={"seed": 0},
        )
        runner.train()


if __name__ == "__main__":
    main()
