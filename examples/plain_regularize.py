"""The similarity as a term of the loss in plain PyTorch, and in a loop as timm's: in the first third of the training.

python examples/plain_regularize.py

In timm's train.py add it to `_loss` in `train_one_epoch`, before that is divided by `accum_steps`. There the network is
`task.trainable_module`: the task itself would count the copy that `--model-ema` makes, too.
"""

import torch
import torch.nn.functional as F
from network import small

import convsim_init as ci


def main(weight: float = 20, epochs: int = 6) -> None:
    torch.manual_seed(0)
    model = small()
    similarity = ci.ConvolutionalSimilarity(model, normalized=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        print(f"epoch {epoch}: similarity {similarity().item() / len(similarity.layers):.6f}")
        factor = weight * max(0, 1 - 3 * epoch / epochs) / len(similarity.layers)  # decays to 0; of the layers' mean
        for images, labels in made_data():
            loss = F.cross_entropy(model(images), labels)
            if factor:
                loss = loss + factor * similarity()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def made_data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches; put yours here."""
    return [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(3)]


if __name__ == "__main__":
    main()
