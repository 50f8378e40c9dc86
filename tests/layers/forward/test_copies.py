"""Copies of what modules hold leave the originals as they are, also when they go."""

import gc
import os

import pytest
import torch.nn.functional as F
from torch import nn

import convsim_init as ci


class Opened:
    """Closes its file when it goes, as a reader of a data base does."""

    def __init__(self):
        self.file = os.open(os.devnull, os.O_RDONLY)

    def __del__(self):
        os.close(self.file)


class Reading(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)
        self.reader = {"reader": Opened()}

    def forward(self, x):
        os.fstat(self.reader["reader"].file)
        return F.conv2d(x, self.weight * 2)


class Owning(nn.Sequential):
    """Removes its folder when it goes."""

    removed = 0

    def __del__(self):
        Owning.removed += 1


@pytest.mark.parametrize("look", [ci.measure, ci.initialize_, ci.load_checkpoint])
def test_no_finalizer_of_a_copy_runs(look, tmp_path):
    gc.collect()  # what other tests left, too
    Owning.removed = 0
    model = Owning(Reading(), nn.Conv2d(4, 4, 3))
    ci.save_checkpoint(model, tmp_path / "a.safetensors")
    look(model, *[tmp_path / "a.safetensors"] * (look is ci.load_checkpoint))
    gc.collect()
    os.fstat(model[0].reader["reader"].file)
    assert Owning.removed == 0
