"""PyTorchModelHubMixin: a folder with model.safetensors, whose keys have the prefix that the class gives them.

convsim-init resnet18 --prefix model. --out init.safetensors
python examples/hubmixin_train.py init.safetensors

Without the prefix `from_pretrained` loads no convolution and says nothing, unless it is told to be strict.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet18


class Classifier(nn.Module, PyTorchModelHubMixin):
    """A network that can be pushed to the Hub."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.model = resnet18(num_classes=num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def main(file: str = "init.safetensors") -> None:
    weights = load_file(file)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, Path(folder, "model.safetensors"))
        model = Classifier.from_pretrained(folder, strict=True)
    state = model.state_dict()
    same = sum(torch.equal(value, weights[key]) for key, value in state.items() if key in weights)
    print(f"matched {same} of {len(state)}")

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))  # put your data here
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
