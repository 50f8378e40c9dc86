"""transformers: a folder with config.json and model.safetensors, `from_pretrained` and the Trainer.

    convsim-init resnet18 --out init.safetensors
    python examples/transformers_train.py init.safetensors

First a network of transformers' own, initialized in Python; then a timm network, initialized by the command.
"""

import shutil
import sys
import tempfile

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import convsim_init as ci


class ShowMatches(TrainerCallback):
    """Once the trainer is set up: how many entries of the model hold exactly what the file holds."""

    def __init__(self, file: str) -> None:
        self.weights = load_file(file)

    def on_train_begin(self, *_: object, model: PreTrainedModel, **__: object) -> None:
        state = {key.removeprefix("timm_model."): value.cpu() for key, value in model.state_dict().items()}
        same = sum(torch.equal(value, self.weights[key]) for key, value in state.items() if key in self.weights)
        print(f"matched {same} of {len(state)}")


def main(file: str = "init.safetensors") -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
        model = ResNetForImageClassification(config)
        ci.initialize_(model)
        model.save_pretrained(folder)
        train(ResNetForImageClassification, folder)

    with tempfile.TemporaryDirectory() as folder:
        TimmWrapperConfig(architecture="resnet18", num_labels=1000).save_pretrained(folder)
        shutil.copy(file, f"{folder}/model.safetensors")
        train(TimmWrapperForImageClassification, folder)


def train(kind: type[PreTrainedModel], folder: str) -> None:
    model = kind.from_pretrained(folder)  # reports keys that are missing or left over, and goes on
    arguments = TrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=8, save_strategy="no", report_to="none"
    )
    show = ShowMatches(f"{folder}/model.safetensors")
    # `model`, not `model_init`: the Trainer would call that when training starts.
    Trainer(model, arguments, train_dataset=made_data(), callbacks=[show]).train()


def made_data() -> list[dict[str, Tensor]]:
    """Images and their labels; put yours here."""
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i % 2)} for i in range(24)]


if __name__ == "__main__":
    main(*sys.argv[1:])
