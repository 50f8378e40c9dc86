"""The small pictures of each layer, read back by another program."""

import base64
import io

import numpy as np
import pytest
from torch import nn

from convsim_init import initialize_
from convsim_init.metrics.snapshot import take_snapshot
from convsim_init.plotting.images import layer_images, png


def read(address: str) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    head, data = address.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 7)])
def test_an_image_is_read_back_as_it_was(shape):
    image = np.random.default_rng(0).random((*shape, 4))
    np.testing.assert_array_equal(read(png(image)), (image * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 16, 5), nn.Conv2d(16, 80, (1, 3), groups=2)),
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 3, 1)),
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.Conv3d(2, 4, (3, 1, 2))),
    ],
    ids=["2d", "1d", "3d"],
)
def test_each_measured_layer_has_its_filters_and_correlations_before_and_after(model):
    before = take_snapshot("before", model, copy=True)
    initialize_(model)
    images = layer_images(before, take_snapshot("after", model), ["0", "1"])
    assert images.keys() == {"0", "1"}
    for pictures in images.values():
        captions = [f"{what} {when}" for what in ("filters", "correlations") for when in ("before", "after")]
        assert list(pictures) == captions
        assert all(read(address).shape[2] == 4 for address in pictures.values())
    assert read(images["0"]["filters before"]).shape == read(images["0"]["filters after"]).shape
    count = min(64, model[1].out_channels)
    assert read(images["1"]["correlations after"]).shape[:2] == (count, count)
