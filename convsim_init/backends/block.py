"""What a backend supplies to the conjugate gradients: the two passes of a step over a part of a layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from convsim_init.backends import compiled, gpu
from convsim_init.backends.compiled import CompiledBlock
from convsim_init.backends.torch_ops import TorchBlock
from convsim_init.functional.fourier import Fourier, Part
from convsim_init.functional.similarity import weights_at_once
from convsim_init.settings import Settings, may_use_kernels


class Block(Protocol):
    """Some groups of a filter bank, or some of its channels: weights, direction, and two gradients.

    Tensors per filter are ``[g, 1, M]``, for g groups of M filters. Results live until the next
    call.

    Attributes:
        max_weights: Weights of a block, about, where a bank is cut into several.
        part: Index of the block's weights in the bank.
    """

    max_weights: int
    part: Part

    def __init__(
        self, part: Part, weights: Tensor, fourier: Fourier, settings: Settings, memory: threading.local
    ) -> None:
        """The block at its weights, with a direction of zeros; implementations take what they need of the arguments.

        Args:
            part: Index of the block's weights in the bank.
            weights: The weights ``[T, g, c, M]``, in the coordinates of ``fourier``; the block may write to them.
            fourier: The transforms of kernels of this size, on the device of the weights.
            settings: The pairs of filters and the channels that are compared.
            memory: Holds each thread's scratch memory, which the blocks that it works on share.
        """

    @property
    def weights(self) -> Tensor:
        """The weights ``[T, g, c, M]``, in the coordinates of `Fourier`."""

    def evaluate(self, keep: Tensor, add: Tensor, shift: Tensor) -> tuple[Tensor, float]:
        """Move the weights to ``keep * weights + add * direction`` and take the gradient there.

        Args:
            keep: Factor of the weights, per filter.
            add: Factor of the direction, per filter.
            shift: The gradient g is kept as ``g - shift * weights``, per filter.

        Returns:
            Sums per filter ``[4, g, M]``: the inner products of the shifted gradient with the
            weights, with itself and with the direction, and the squared norms of the weights. And
            the inner product of the whole gradient with the one that the last `turn` used; it
            holds at the first call after `turn` only.
        """

    def turn(self, beta: float, weight_coefficient: Tensor, curvature: Tensor) -> Tensor:
        """Turn the direction to ``gradient + beta * direction + weight_coefficient * weights``.

        Then expand the loss along it: with P0, P1 and P2 the power of the weights, their
        cross-power with the direction, and the power of the direction plus ``curvature * P0``, the
        power at step t is ``P0 - 2 t P1 + t^2 P2``. It is seen on the coarse lattice, where
        correlations wrap around: the lowest loss lies at nearly the same step.

        Args:
            beta: Factor of the direction.
            weight_coefficient: Factor of the weights, per filter.
            curvature: What the retraction adds to P2, in units of P0, per filter.

        Returns:
            The coefficients ``<P_i, partner_power(P_j)>`` of the loss, ``[3, 3]``, up to a common
            factor; that of the loss itself may be missing, and those below the diagonal.
        """


def cut_into_blocks(
    bank: Tensor, scale: Tensor, fourier: Fourier, settings: Settings, mask: Tensor | None = None
) -> Iterator[Block]:
    """The blocks of a filter bank ``[G, M, C, *kernel_size]`` over ``scale`` ``[G, M]``.

    Compiled or fused ones where they can be. On the CPU they are small enough for a core's cache,
    and several threads may work on them; on an accelerator one block is the whole bank. How a bank
    is cut depends on its shape alone, never on the number of threads. With a mask, of the bank's
    shape, taps where it is zero stay zero.
    """
    # Neither step.c nor the fused kernels project a gradient to the taps of a mask.
    kind = _kind(bank, settings) if mask is None else TorchBlock
    max_weights = weights_at_once(bank, settings.compared_channels, kind.max_weights)
    # Blocks share the scratch memory of the thread that works on them; two threads share none.
    memory = threading.local()
    for part, weights in fourier.blocks(bank, scale, max_weights):
        if mask is None:
            yield kind(part, weights, fourier, settings, memory)
        else:
            taps = mask.flatten(3)[part].permute(3, 0, 2, 1).to(weights)
            yield TorchBlock(part, weights, fourier, settings, memory, mask=taps)


def _kind(bank: Tensor, settings: Settings) -> type[Block]:
    if compiled.fits(bank.dtype, bank.device, settings.pairs, settings.compared_channels):
        return CompiledBlock
    if may_use_kernels() and gpu.fits(bank.shape, bank.dtype, bank.device, settings.pairs, settings.compared_channels):
        # Only where it is used: it imports Triton, which torch's builds for the CPU do not bring.
        from convsim_init.backends.fused import FusedBlock

        return FusedBlock
    return TorchBlock
