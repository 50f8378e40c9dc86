"""transformers: the similarity as a term of the loss, in the first third of the training, by a callback.

python examples/transformers_regularize.py

It adds the gradient just before the optimizer's step, once for several accumulated batches and after they are clipped.
With fp16 (not bf16) gradients may be scaled there: then write a `compute_loss_func` of your own.
"""

import tempfile

import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers_train import made_data

import convsim_init as ci


class Regularize(TrainerCallback):
    """Adds the gradient of the layers' mean similarity, with a weight that decays to 0, and shows it each epoch."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def on_train_begin(self, *_: object, model: torch.nn.Module, **__: object) -> None:
        self.similarity = ci.ConvolutionalSimilarity(model, normalized=True)

    def mean(self) -> torch.Tensor:
        return self.similarity() / len(self.similarity.layers)

    def on_epoch_begin(self, arguments: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        print(f"epoch {state.epoch:.0f}: similarity {self.mean().item():.6f}")

    def on_pre_optimizer_step(
        self, arguments: TrainingArguments, state: TrainerState, *_: object, **__: object
    ) -> None:
        weight = self.weight * max(0, 1 - 3 * state.global_step / state.max_steps)
        if weight:
            (weight * self.mean()).backward()


def main(weight: float = 20) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:  # put yours here
        arguments = TrainingArguments(
            folder, num_train_epochs=6, learning_rate=1e-3, save_strategy="no", report_to="none"
        )
        Trainer(model, arguments, train_dataset=made_data(), callbacks=[Regularize(weight)]).train()


if __name__ == "__main__":
    main()
