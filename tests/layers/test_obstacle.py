"""Obstacles are told apart by their causes, whatever their texts say."""

from torch import nn

from convsim_init.layers.find import find_layers
from convsim_init.layers.obstacle import Cause


def test_causes_of_layers_that_are_left_alone():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)), nn.Conv2d(4, 4, 3, device="meta"))
    model[1].requires_grad_(False)
    causes = [layer.obstacle and layer.obstacle.cause for layer in find_layers(model, exclude=["2"])]
    assert causes == [None, Cause.FROZEN, Cause.UNSELECTED, Cause.UNTREATABLE]
