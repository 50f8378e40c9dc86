"""Files of every release stay readable: `tests/data` keeps a small one of each, in both formats."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from convsim_init import measure
from convsim_init.checkpoint.read import read_checkpoint

FILES = sorted((Path(__file__).parents[1] / "data").glob("*.*.*.*"))


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 2, bias=False)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_of_each_release_is_read(path):
    state = read_checkpoint(path).tensors
    made = model()
    made.load_state_dict(state, strict=True)
    assert len(measure(made).layers) == 3
    assert made[1].num_batches_tracked.dtype is torch.int64
    assert float(made[0].weight.detach().double().sum()) == pytest.approx(SUMS[path.stem])


SUMS = {"0.1.0": -2.5316338130573968}


def test_there_is_a_file_of_each_release_in_both_formats():
    assert {path.stem for path in FILES} == set(SUMS)
    assert len(FILES) == 2 * len(SUMS)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".safetensors"], ids=lambda path: path.name)
def test_its_metadata_carry_the_version_of_their_format(path):
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["convsim_init"])
    assert about["format_version"] == 1
    assert about["version"] == path.stem
    assert about["totals"]["after"]["normalized_similarity"] < about["totals"]["before"]["normalized_similarity"]
