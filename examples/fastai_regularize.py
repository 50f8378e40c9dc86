"""fastai: the similarity as a term of the loss, in the first third of the training, by a callback.

python examples/fastai_regularize.py
"""

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from network import small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import convsim_init as ci


class Regularize(Callback):
    """Adds the layers' mean similarity to the loss, with a weight that decays to 0, and shows it each epoch."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def before_fit(self) -> None:
        self.similarity = ci.ConvolutionalSimilarity(self.model, normalized=True)

    def mean(self) -> torch.Tensor:
        return self.similarity() / len(self.similarity.layers)

    def before_train(self) -> None:
        print(f"epoch {self.epoch}: similarity {self.mean().item():.6f}")

    def after_loss(self) -> None:
        weight = self.weight * max(0, 1 - 3 * self.pct_train)
        if self.training and weight:
            self.learn.loss_grad = self.loss_grad + weight * self.mean()


def main(weight: float = 20) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,)))  # put yours here
    loader = DataLoader(data, batch_size=8)
    loaders = DataLoaders(loader, loader, device="cuda" if torch.cuda.is_available() else "cpu")
    learner = Learner(loaders, small(), loss_func=nn.CrossEntropyLoss(), cbs=[Regularize(weight)])
    learner.fit(6, lr=0.003)


if __name__ == "__main__":
    main()
