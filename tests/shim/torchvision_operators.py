"""Lets a torchvision wheel built for CUDA be imported beside a CPU torch."""

import importlib.util
from pathlib import Path


def declare() -> None:
    """Declare the operators that only torchvision's extension declares.

    The extension does not load there, and the import stops at them. Where it does load, declaring them first would
    clash with it.
    """
    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    for library in Path(found.origin).parent.glob("_C*.*"):  # _C_stable since torchvision 0.29
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
