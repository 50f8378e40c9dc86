"""accelerate: load the file into the network before `prepare`, on every process.

convsim-init resnet18 --out init.safetensors
accelerate launch examples/accelerate_train.py init.safetensors
"""

import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18


def main(file: str = "init.safetensors") -> None:
    accelerator = Accelerator()
    weights = load_file(file)
    model = resnet18()
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,)))  # put yours here
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8))

    state = accelerator.unwrap_model(model).state_dict()
    same = sum(torch.equal(value.cpu(), weights[key]) for key, value in state.items() if key in weights)
    accelerator.print(f"matched {same} of {len(state)}")
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
