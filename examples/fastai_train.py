"""fastai: a Learner of a network that has the weights, and `vision_learner`, which cuts it and adds a head.

convsim-init resnet18 --out init.pt
python examples/fastai_train.py init.pt
"""

import sys

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_model
from fastai.vision.learner import vision_learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18


def main(file: str = "init.pt") -> None:
    def network(pretrained: bool = False) -> nn.Module:
        model = resnet18()
        load_model(file, model, None, with_opt=False)  # strict; the file must be one of torch.save
        return model

    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,)))  # put yours here
    loader = DataLoader(data, batch_size=8)
    loaders = DataLoaders(loader, loader, device="cuda" if torch.cuda.is_available() else "cpu")
    learner = Learner(loaders, network(), loss_func=nn.CrossEntropyLoss())
    print(matched(learner.model, network()))
    learner.fit(1, lr=0.01)

    # A function as the architecture, not its name: the body is then cut from a network that has the weights. Never with
    # pretrained=True: fastai would freeze the body.
    learner = vision_learner(loaders, network, pretrained=False, n_out=10, loss_func=nn.CrossEntropyLoss())
    print(f"{matched(learner.model[0], nn.Sequential(*list(network().children())[:-2]))}, the head is new")
    learner.fit(1, lr=0.01)


def matched(model: nn.Module, loaded: nn.Module) -> str:
    """How many entries of the model hold exactly what the loaded network holds."""
    state, weights = model.state_dict(), loaded.state_dict()
    same = sum(torch.equal(value.cpu(), weights[key]) for key, value in state.items() if key in weights)
    return f"matched {same} of {len(state)}"


if __name__ == "__main__":
    main(*sys.argv[1:])
