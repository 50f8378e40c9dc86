"""Convolutional Similarity as a term of the training loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convsim_init.backends.gradient import Layout, summed_similarity
from convsim_init.errors import InputError
from convsim_init.layers.find import count_obstacle, find_convolutions, find_layers
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.forward.owners import used_weight
from convsim_init.layers.forward.weight import ForwardWeight
from convsim_init.report.text import layer_name
from convsim_init.settings import CHANNELS, PAIRS, Channels, Pairs, check_choice


class ConvolutionalSimilarity:
    """The summed Convolutional Similarity of a model's convolutions, to be added to a loss (arXiv 2411.03226).

        L = L_task + λ Σ_layers CS(W)

    What counts is the weight that the forward pass uses, also behind a parametrization, weight_norm or a class that
    standardizes its weight; it is read anew at each call, on its own device. Make the term once the model is as it will
    be trained: layers that are frozen by then are left out. A weight used twice counts once. Under
    DistributedDataParallel add it to the loss before the one `backward`: every process adds the same gradient.

    Args:
        model: Any module; wrappers such as DistributedDataParallel and torch.compile are looked through.
        pairs: Filter pairs that count, as in `convolutional_similarity`.
        channels: Kernels compared, as in `convolutional_similarity`.
        normalized: Sum the layers' mean similarities of two filters, each blind to scale, instead of the raw ones. The
            raw sum grows with the square of the filters and falls when weights shrink: it is also a weight decay.
        include: Shell patterns of layer names; where any are given, layers that match none are left out.
        exclude: Shell patterns of layer names to leave out.

    Attributes:
        skipped: Reason why each other layer does not count, by its name.

    Raises:
        InputError: If an option is unknown, a pattern matches no layer, or no layer is left.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 10))
        >>> similarity = ci.ConvolutionalSimilarity(model, normalized=True)
        >>> loss = model(torch.randn(8, 3, 3, 3)).square().mean() + 0.1 * similarity()
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pairs: Pairs = "all",
        channels: Channels = "matched",
        normalized: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        check_choice("pairs", pairs, PAIRS)
        check_choice("channels", channels, CHANNELS)
        if not isinstance(model, nn.Module):
            raise InputError(f"expected a module to regularize, got {type(model).__name__}")
        self.skipped: dict[str, str] = {}
        with holding_weights_lock():
            convolutions = dict(find_convolutions(model))
        self._modules: dict[str, _ConvNd] = {}
        self._layouts: list[Layout] = []
        for layer in find_layers(model, include, exclude):
            module = convolutions.get(layer.name)
            if module is None:
                self.skipped[layer.name] = (
                    "no module of PyTorch's convolutions, such as a call in a graph: make the term of the model that a "
                    "graph was made from"
                )
                continue
            obstacle = layer.obstacle and layer.obstacle.text
            if isinstance(layer.weight, ForwardWeight) and layer.weight.module is not module:
                obstacle = obstacle or "the module around it uses another weight, which does not count here"
            if not layer.weight.made_of:
                obstacle = obstacle or "no gradient leads from the weight that is used to a parameter"
            # Over all channels filters of different groups are pairs, too.
            count = 1 if channels == "matched" else layer.groups
            reason = obstacle or count_obstacle(layer.filters * count, layer.groups)
            if reason is not None:
                self.skipped[layer.name] = reason
            else:
                self._modules[layer.name] = module
                self._layouts.append(Layout(layer.groups, layer.transposed))
        if not self._modules:
            name, reason = next(iter(self.skipped.items()))
            raise InputError(
                f"expected a model with a convolution to regularize, got none: {layer_name(name)}: {reason}"
            )
        self._pairs, self._channels, self._normalized = pairs, channels, normalized

    @property
    def layers(self) -> list[str]:
        """Names of the layers that count."""
        return list(self._modules)

    def __call__(self) -> Tensor:
        """The sum, a scalar on the device of the first layer that counts; differentiable once.

        ``torch.compile`` calls it as it is, between the graphs that it makes of the rest.
        """
        if not torch.compiler.is_compiling():
            return self._sum()
        total: Tensor = torch.compiler.disable(self._sum)()  # type: ignore[no-untyped-call]
        return total

    def _sum(self) -> Tensor:
        with holding_weights_lock():
            weights = [used_weight(module).compute() for module in self._modules.values()]
        return summed_similarity(weights, self._layouts, self._pairs, self._channels, normalized=self._normalized)
