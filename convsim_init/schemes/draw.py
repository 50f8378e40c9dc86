"""The weights to start from: drawn anew by a scheme of `torch.nn.init` before they are decorrelated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from convsim_init.errors import InputError
from convsim_init.functional.bank import bank_weight
from convsim_init.layers.find import Layer, find_layers
from convsim_init.layers.weights import RefusedError
from convsim_init.report.text import layer_name
from convsim_init.settings import BASES, Base, check_choice

SCHEMES: Mapping[str, Callable[..., Tensor]] = {
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
}


@torch.no_grad()
def draw_base_(
    model: nn.Module | Mapping[str, object],
    base: Base,
    *,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Draw the weights of a model's convolutions anew, in place, with the default arguments of `torch.nn.init`.

    Unlike there, the fans of grouped, depthwise and transposed convolutions are those of their filters, and neither
    memory format, device nor dtype changes what is drawn: it is drawn in float32 on the CPU. Left as they are: layers
    that are not selected, that are frozen or cannot be set, and those of zeros, which a model's author has meant so.

    Args:
        model: Any module, wrapped or not, or a state dict.
        base: ``"kaiming_normal"``, ``"kaiming_uniform"``, ``"xavier_normal"`` or ``"orthogonal"``; ``"model"`` draws
            nothing.
        seed: Seed of the draws; the caller's random state is left as it was.
        include: Shell patterns of layer names; where any are given, others are left alone.
        exclude: Shell patterns of layer names to leave alone.

    Returns:
        Names of the layers that were drawn.

    Raises:
        InputError: If the scheme is unknown, the model has no convolution, or a pattern matches none.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        >>> ci.draw_base_(model, "orthogonal", seed=1, exclude=["0"])
        ['1']
    """
    check_choice("base", base, BASES)
    if base == "model":
        return []
    generator = torch.Generator().manual_seed(seed)
    return [layer.name for layer in find_layers(model, include, exclude) if _draw(layer, SCHEMES[base], generator)]


def _draw(layer: Layer, scheme: Callable[..., Tensor], generator: torch.Generator) -> bool:
    if layer.obstacle is not None:
        return False
    bank = layer.bank()  # [G, M, C, *kernel_size]
    if not bank.any():
        return False
    drawn = torch.empty(bank.shape, dtype=torch.float32, device="cpu")
    for group in drawn:
        scheme(group, generator=generator)  # [M, C, *kernel_size]: the fans are right
    try:
        layer.weight.write(bank_weight(drawn, groups=layer.groups, transposed=layer.transposed))
    except RefusedError as error:
        raise InputError(f"base: {layer_name(layer.name)} cannot be drawn anew: {error}; exclude it") from error
    return True
