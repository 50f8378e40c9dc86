"""Networks for pixels of libraries for reinforcement learning, one function a library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from benchmarks.coverage.sources.architecture import Architecture, noise

FRAMES = (noise(1, 4, 84, 84),)
ACTIONS = 6


def _architecture(name: str, build, *inputs) -> Architecture:
    return Architecture(name, build, lambda model: inputs or [FRAMES])


def cleanrl_models() -> Iterator[Architecture]:
    """As its single files write them: that library is no package."""

    def layer_init(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
        nn.init.orthogonal_(layer.weight, std)
        nn.init.constant_(layer.bias, 0.0)
        return layer

    def nature() -> nn.Module:
        layers = [nn.Conv2d(4, 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3)]
        blocks = [one for layer in layers for one in (layer_init(layer), nn.ReLU())]
        return nn.Sequential(*blocks, nn.Flatten(), layer_init(nn.Linear(3136, 512)), nn.ReLU())

    class Residual(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv0, self.conv1 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv1(self.conv0(x.relu()).relu())

    def impala() -> nn.Module:
        layers, channels = [], 4
        for width in (16, 32, 32):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.MaxPool2d(3, 2, 1),
                Residual(width),
                Residual(width),
            ]
            channels = width
        return nn.Sequential(*layers, nn.Flatten(), nn.ReLU(), nn.Linear(32 * 11 * 11, 256))

    yield _architecture("cleanrl:nature", nature)
    yield _architecture("cleanrl:impala", impala)


def _spaces():
    from gymnasium import spaces

    pixels = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    both = spaces.Dict({"pixels": pixels, "vector": spaces.Box(-1, 1, (5,))})
    return pixels, both, spaces.Discrete(ACTIONS), spaces.Box(-1, 1, (2,))


def stable_baselines3_models() -> Iterator[Architecture]:
    from stable_baselines3 import dqn, ppo, sac, td3

    pixels, both, discrete, continuous = _spaces()
    frames = torch.randint(256, (1, 4, 84, 84), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for library, algorithm, actions in (
        ("ppo", ppo, discrete),
        ("ppo-continuous", ppo, continuous),
        ("dqn", dqn, discrete),
        ("sac", sac, continuous),
        ("td3", td3, continuous),
    ):
        arguments = (actions, lambda progress: 1e-4)
        name = f"stable_baselines3:{library}"
        yield _architecture(f"{name}-CnnPolicy", partial(algorithm.CnnPolicy, pixels, *arguments), (frames,))
        inputs = ({"pixels": frames, "vector": noise(1, 5)},)
        yield _architecture(f"{name}-MultiInputPolicy", partial(algorithm.MultiInputPolicy, both, *arguments), inputs)


def sb3_contrib_models() -> Iterator[Architecture]:
    from sb3_contrib import ppo_mask, qrdqn, tqc

    pixels, _, discrete, continuous = _spaces()
    frames = torch.zeros(1, 4, 84, 84, dtype=torch.uint8)
    for name, algorithm, actions in (
        ("qrdqn", qrdqn, discrete),
        ("tqc", tqc, continuous),
        ("ppo_mask", ppo_mask, discrete),
    ):
        build = partial(algorithm.CnnPolicy, pixels, actions, lambda progress: 1e-4)
        yield _architecture(f"sb3_contrib:{name}-CnnPolicy", build, (frames,))


def tianshou_models() -> Iterator[Architecture]:
    from tianshou.env.atari import atari_network

    for name in ("DQNet", "C51Net", "RainbowNet", "QRDQNet"):
        build = partial(getattr(atari_network, name), c=4, h=84, w=84, action_shape=ACTIONS)
        yield _architecture(f"tianshou:{name}", build)


def torchrl_models() -> Iterator[Architecture]:
    from torchrl import modules

    yield _architecture("torchrl:ConvNet", partial(modules.ConvNet, in_features=4, num_cells=[32, 64]))
    yield _architecture(
        "torchrl:Conv3dNet", partial(modules.Conv3dNet, in_features=4, num_cells=[8, 16]), (noise(1, 4, 8, 32, 32),)
    )
    cells = {"in_features": 4, "num_cells": [32, 64, 64], "kernel_sizes": [8, 4, 3], "strides": [4, 2, 1]}
    heads = {"out_features": ACTIONS, "cnn_kwargs": cells, "mlp_kwargs": {"in_features": 3136, "num_cells": 64}}
    yield _architecture("torchrl:DuelingCnnDQNet", partial(modules.DuelingCnnDQNet, **heads))
    actor = {"action_dim": 2, "conv_net_kwargs": {"in_features": 4}, "mlp_net_kwargs": {"in_features": 5184}}
    yield _architecture("torchrl:DdpgCnnActor", partial(modules.DdpgCnnActor, **actor))
    critic = {"conv_net_kwargs": {"in_features": 4}, "mlp_net_kwargs": {"in_features": 130}}
    yield _architecture("torchrl:DdpgCnnQNet", partial(modules.DdpgCnnQNet, **critic), (*FRAMES, noise(1, 2)))
    yield _architecture("torchrl:ObsEncoder", partial(modules.ObsEncoder, in_channels=3), (noise(1, 3, 64, 64),))


def sample_factory_models() -> Iterator[Architecture]:
    from sample_factory.model import encoder

    pixels, *_ = _spaces()
    for name in ("convnet_simple", "convnet_impala", "convnet_atari", "resnet_impala"):
        config = SimpleNamespace(
            encoder_conv_architecture=name,
            encoder_conv_mlp_layers=[512],
            nonlinearity="elu",
            encoder_load_pretrained=None,
            normalize_input=False,
        )
        yield _architecture(f"sample_factory:{name}", partial(encoder.make_img_encoder, config, pixels))


def pfrl_models() -> Iterator[Architecture]:
    from pfrl import nn as networks
    from pfrl.q_functions import dueling_dqn

    yield _architecture("pfrl:LargeAtariCNN", networks.LargeAtariCNN)
    yield _architecture("pfrl:SmallAtariCNN", networks.SmallAtariCNN)
    yield _architecture("pfrl:DuelingDQN", partial(dueling_dqn.DuelingDQN, ACTIONS))
