"""The weights to start from: drawn anew by a scheme of `torch.nn.init` before they are decorrelated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from convsim_init.errors import InputError
from convsim_init.layers.find import find_layers
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.layer import Layer
from convsim_init.layers.weights import RefusedError
from convsim_init.report.text import layer_name
from convsim_init.settings import FAN_SCHEMES, MAX_SEED, Activation, check_whole, parse_base


def delta_orthogonal_(filters: Tensor, *, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix at the middle tap of filters ``[M, C, *kernel_size]``, zeros elsewhere."""
    taps = filters.zero_()
    for size in filters.shape[2:]:
        taps = taps.select(2, (size - 1) // 2)
    nn.init.orthogonal_(taps, generator=generator)  # [M, C]
    return filters


DRAWS: Mapping[str, Callable[..., Tensor]] = {
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
    "delta_orthogonal": delta_orthogonal_,
}


@torch.no_grad()
def draw_base_(
    model: nn.Module | Mapping[str, object],
    base: str,
    *,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Draw the weights of a model's convolutions anew, in place, by a scheme of `torch.nn.init`.

    Unlike there, the fans of grouped, depthwise and transposed convolutions are those of their filters, and what is
    drawn does not depend on memory format, device and dtype: it is drawn in float32 on the CPU.

    - ``kaiming_normal`` and ``kaiming_uniform`` divide by the fan in, or by the fan that is named, as in
      ``kaiming_normal:fan_out``. A stride divides the fan out, because a value reaches that many fewer outputs, and the
      fan in of a transposed convolution. The strides of state dicts and of graphs are not known.
    - An activation, as in ``orthogonal:tanh``, multiplies by its `torch.nn.init.calculate_gain`. Without one the gain
      is that of `torch.nn.init` by default: ReLU's for the two Kaiming schemes, 1 for the others.
    - ``delta_orthogonal`` (Xiao et al., arXiv 1806.05393) is an orthogonal matrix at the middle tap and zero elsewhere.

    Left as they are: layers that are not selected, that are frozen or cannot be set, and layers of zeros, which are
    meant to be zero.

    Args:
        model: Any module, wrapped or not, or a state dict.
        base: ``"kaiming_normal"``, ``"kaiming_uniform"``, each with ``":fan_in"`` or ``":fan_out"`` or neither,
            ``"xavier_normal"``, ``"orthogonal"`` or ``"delta_orthogonal"``; then perhaps ``":linear"``, ``":relu"``,
            ``":leaky_relu"``, ``":selu"``, ``":sigmoid"`` or ``":tanh"``. ``"model"`` draws nothing.
        seed: Seed of the draws; the caller's random state is left as it was.
        include: Shell patterns of layer names; where any are given, others are left alone.
        exclude: Shell patterns of layer names to leave alone.

    Returns:
        Names of the layers that were drawn.

    Raises:
        InputError: If the scheme is unknown, the model has no convolution, a pattern matches none, or somebody put a
            function that draws nothing in the place of that of `torch.nn.init`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        >>> ci.draw_base_(model, "orthogonal", seed=1, exclude=["0"])
        ['1']
    """
    scheme, fan, activation = parse_base(base)
    if scheme == "model":
        return []
    generator = torch.Generator().manual_seed(check_whole("seed", seed, 0, MAX_SEED))
    return [
        layer.name for layer in find_layers(model, include, exclude) if _draw(layer, scheme, fan, activation, generator)
    ]


@holding_weights_lock()
def _draw(layer: Layer, scheme: str, fan: str, activation: Activation | None, generator: torch.Generator) -> bool:
    if layer.obstacle is not None:
        return False
    bank = layer.bank()  # [G, M, C, *kernel_size]
    if not bank.any():
        return False
    drawn = torch.full(bank.shape, math.nan, dtype=torch.float32, device="cpu")
    for group in drawn:
        DRAWS[scheme](group, generator=generator)  # [M, C, *kernel_size]: the fans are right but for strides
    if not (drawn.isfinite().all() and drawn.any()):  # a function that does nothing leaves NaN, or zeros around a tap
        raise InputError(
            f"base: expected {scheme} of torch.nn.init to draw, got a function in its place that does not: import "
            "convsim_init before it is replaced"
        )
    by_fan = scheme in FAN_SCHEMES
    if by_fan:
        fan_in, fan_out = bank.shape[2], bank.shape[1]  # over the number of taps
        # Kaiming's deviation is gain / sqrt(fan), drawn here over the fan in.
        wanted = fan_out if fan == "fan_out" else fan_in
        strided = layer.transposed != (fan == "fan_out")
        drawn *= math.sqrt(fan_in / wanted * (layer.strides if strided else 1))
    if activation:  # in place of the gain that it is drawn with
        # That is ReLU's for Kaiming's: they draw for a leaky ReLU of slope 0, which is the same.
        drawn *= nn.init.calculate_gain(activation) / nn.init.calculate_gain("relu" if by_fan else "linear")
    try:
        layer.write(drawn)
    except RefusedError as error:
        raise InputError(f"base: {layer_name(layer.name)} cannot be drawn anew: {error}; exclude it") from error
    return True
