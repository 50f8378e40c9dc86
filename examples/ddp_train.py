"""Plain PyTorch on several processes: DistributedDataParallel sends the first process's weights to the others.

convsim-init resnet18 --out init.safetensors
torchrun --nproc-per-node 2 examples/ddp_train.py init.safetensors
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18


def main(file: str = "init.safetensors") -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(rank)

    weights = load_file(file)
    model = resnet18()
    if rank == 0:  # or every process, which does no harm; the wrapped model's keys start with "module."
        model.load_state_dict(weights)
    parallel = DistributedDataParallel(model.to(device))
    print(f"process {rank}: {matched(parallel.module, weights)}\n", end="", flush=True)

    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))  # put your data here
        optimizer.zero_grad()
        F.cross_entropy(parallel(images.to(device)), labels.to(device)).backward()
        optimizer.step()
    dist.destroy_process_group()


def matched(model: nn.Module, weights: dict[str, torch.Tensor]) -> str:
    """How many entries of the model hold exactly what the file holds."""
    state = model.state_dict()
    same = sum(torch.equal(value.cpu(), weights[key]) for key, value in state.items() if key in weights)
    return f"matched {same} of {len(state)}"


if __name__ == "__main__":
    main(*sys.argv[1:])
