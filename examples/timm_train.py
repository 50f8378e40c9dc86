"""timm: a model from the file, and timm's own optimizer and schedule.

    convsim-init resnet18 --out init.safetensors
    python examples/timm_train.py init.safetensors

timm's training script takes the file as `--initial-checkpoint init.safetensors` or, where the number of classes is not
the file's, as `--pretrained --pretrained-path init.safetensors`.
"""

import sys

import timm
import torch
from safetensors.torch import load_file
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn


def main(file: str = "init.safetensors") -> None:
    weights = load_file(file)
    train(timm.create_model("resnet18", checkpoint_path=file), weights)  # strict

    # Another number of classes: timm leaves the file's classifier out and draws a new one.
    model = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay={"file": file}, num_classes=7)
    train(model, weights, head=model.pretrained_cfg["classifier"])


def train(model: nn.Module, weights: dict[str, torch.Tensor], head: str = "") -> None:
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=5e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=3, warmup_epochs=1)
    print(matched(model, weights, head))
    for epoch in range(epochs):
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(7, (8,))  # put your data here
        optimizer.zero_grad()
        loss = LabelSmoothingCrossEntropy()(model(images), labels)
        loss.backward()
        optimizer.step()
        scheduler.step(epoch + 1)
        print(f"loss {loss.item():.3f}")


def matched(model: nn.Module, weights: dict[str, torch.Tensor], head: str) -> str:
    """How many entries of the model, a new head's aside, hold exactly what the file holds."""
    state = {key: value for key, value in model.state_dict().items() if not (head and key.startswith(f"{head}."))}
    same = sum(torch.equal(value, weights[key]) for key, value in state.items() if key in weights)
    return f"matched {same} of {len(state)}" + (f", {head} is new" if head else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
