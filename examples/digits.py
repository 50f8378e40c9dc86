"""Does it help? A small network on scikit-learn's digits, trained from three starts with the same seeds.

    pip install scikit-learn
    python examples/digits.py [--seeds 8] [--epochs 6] [--train 400]

Every start has the same filter norms, layer by layer: PyTorch users' Kaiming draw; the same with each layer's filters
made orthogonal; a control in which each filter sees one random channel; and the first decorrelated by convsim-init.
Mean test accuracy in percent after each epoch, and its standard error over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import convsim_init as ci


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--train", type=int, default=400, help="training images; the other ones test")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate")
    options = parser.parse_args()
    print(f"{'start':12}" + "".join(f"  epoch {epoch + 1:<5}" for epoch in range(options.epochs)))
    for start in (kaiming, orthogonal, one_channel, convsim):
        runs = [train(start, seed, options) for seed in range(options.seeds)]
        print(f"{start.__name__:12}" + "".join(f"  {summary(epoch):11}" for epoch in zip(*runs, strict=True)))


def kaiming(weight: Tensor) -> None:
    """Draw a convolution's weight from He's normal distribution."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def orthogonal(weight: Tensor) -> None:
    """The same, then make the filters orthogonal and give them back their norms."""
    kaiming(weight)
    norms = weight.flatten(1).norm(dim=1)
    nn.init.orthogonal_(weight)
    weight.mul_((norms / weight.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1))


def one_channel(weight: Tensor) -> None:
    """A control: the same draw, but each filter sees one input channel, chosen at random, at its full norm."""
    kaiming(weight)
    norms = weight.flatten(1).norm(dim=1)
    chosen = torch.randint(weight.shape[1], (len(weight),))
    weight.mul_(F.one_hot(chosen, weight.shape[1])[:, :, None, None])
    weight.mul_((norms / weight.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1))


def convsim(weight: Tensor) -> None:
    """The same, then lower the Convolutional Similarity of the filters; norms stay."""
    kaiming(weight)
    ci.convsim_(weight)


def train(start, seed: int, options: argparse.Namespace) -> list[float]:
    """Test accuracy in percent after each epoch."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3  # [N, 1, 8, 8]
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    learn, test = order[: options.train], order[options.train :]

    widths, batch_norm = [1, 32, 64, 64], partial(nn.BatchNorm2d, track_running_stats=False)
    # An epoch is 13 steps, too few for batch norm's running averages: tests use the test images' own statistics.
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), batch_norm(b), nn.ReLU()) for a, b in pairwise(widths)
    ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    with torch.no_grad():
        for block in blocks:
            start(block[0].weight)

    torch.manual_seed(1000 + seed)  # the same batches from every start
    optimizer = torch.optim.SGD(model.parameters(), lr=options.rate, momentum=0.9)
    accuracies = []
    for _ in range(options.epochs):
        for batch in learn[torch.randperm(len(learn))].split(32):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append(100 * (model(images[test]).argmax(1) == labels[test]).float().mean().item())
    return accuracies


def summary(values: tuple[float, ...]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.1f}±{error:.1f}"


if __name__ == "__main__":
    main()
