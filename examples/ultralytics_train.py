"""ultralytics: `load` takes the weights of a network; one put in the place of `model` would be lost.

python examples/ultralytics_train.py data.yaml
"""

import sys

import torch
from ultralytics import YOLO

import convsim_init as ci


def main(data: str = "data.yaml") -> None:
    network = YOLO("yolo11n.yaml").model
    ci.initialize_(network)
    yolo = YOLO("yolo11n.yaml").load(network)

    start = {key: value.clone() for key, value in network.state_dict().items() if value.dim() == 4}
    printed = []

    def compare(trainer) -> None:
        if not printed:  # before the first step; the head depends on the number of classes
            state = trainer.model.state_dict()
            fitting = {key: value for key, value in start.items() if state[key].shape == value.shape}
            same = sum(torch.equal(state[key].cpu(), value) for key, value in fitting.items())
            printed.append(f"matched {same} of {len(fitting)}")
            print(*printed)

    yolo.add_callback("on_train_batch_start", compare)
    yolo.train(data=data, epochs=1, imgsz=64, batch=2, device="cpu", workers=0, plots=False, val=False, amp=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
