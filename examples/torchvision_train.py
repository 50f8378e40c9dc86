"""torchvision, or any network of your own with the same keys: load the file strictly, then train.

convsim-init resnet18 --out init.safetensors
python examples/torchvision_train.py init.safetensors
"""

import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models import resnet18


def main(file: str = "init.safetensors") -> None:
    weights = load_file(file)
    model = resnet18()
    model.load_state_dict(weights)  # strict: a key that is missing, left over or of another shape is an error
    print(matched(model, weights))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in made_data():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")


def matched(model: nn.Module, weights: dict[str, torch.Tensor]) -> str:
    """How many entries of the model hold exactly what the file holds."""
    state = model.state_dict()
    same = sum(torch.equal(value, weights[key]) for key, value in state.items() if key in weights)
    return f"matched {same} of {len(state)}"


def made_data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches; put yours here."""
    return [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(3)]


if __name__ == "__main__":
    main(*sys.argv[1:])
