"""Plain PyTorch with FSDP2: the network is sharded without weights, then each process takes its part of the file's.

convsim-init resnet18 --out init.safetensors
torchrun --nproc-per-node 2 examples/fsdp_train.py init.safetensors

`initialize_` cannot treat a weight of which each process holds a part: initialize before sharding, as the file does.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision.models import resnet18


def main(file: str = "init.safetensors") -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    weights = load_file(file)
    with torch.device("meta"):
        model = resnet18()
    fully_shard(model, mesh=mesh)
    model.to_empty(device=kind)
    # A copy, because it puts shards in the place of the tensors of the dict that it is given.
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # the others get no full state dict
        same = sum(torch.equal(value, weights[key]) for key, value in state.items() if key in weights)
        print(f"matched {same} of {len(state)}", flush=True)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))  # put your data here
        optimizer.zero_grad()
        F.cross_entropy(model(images.to(kind)), labels.to(kind)).backward()
        optimizer.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
