"""Layers scaled to unit variance in one forward pass, on noise or on a user's batch."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from convsim_init.errors import InputError
from convsim_init.functional.bank import full_precision
from convsim_init.functional.fourier import squared_frequencies
from convsim_init.layers import tree
from convsim_init.layers.find import find_convolutions, find_layers, refuse_lazy
from convsim_init.layers.forward.calls import convolution_outputs
from convsim_init.layers.forward.isolation import holding_weights_lock, isolated
from convsim_init.layers.layer import Layer
from convsim_init.layers.memory import is_wrapper, memories
from convsim_init.layers.names import unwrap
from convsim_init.layers.weights import RefusedError, StoredWeight
from convsim_init.report.text import error_text, layer_name, some
from convsim_init.settings import MAX_SEED, check_whole

IMAGES = 16  # a batch of noise
OWN_CLASS = "no convolution of torch.nn"
FIXED = "what computes the weight keeps its scale"
UNREACHED = "the model's output does not depend on its scale"
UNCALLED = "the model does not call it, though a module around it may take its weight"


def calibrate_(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, float]:
    """Scale the weight of every convolution, in place, so that its output, without its bias, has unit variance.

    This is the second half of LSUV (Mishkin and Matas, arXiv 1511.06422): one forward pass in evaluation mode scales
    layer after layer, each from what reaches it through the layers scaled before it. The input is ``images`` from the
    training set, as in LSUV, or noise with the power 1/|f|² of photographs. It is for networks without normalization;
    elsewhere it only changes the effective learning rate.

    Left as they are

    - layers on whose scale the model's output does not depend, because what follows multiplies it by zero, as at the
      end of residual branches (zero-initialized layers, Fixup, SkipInit, a batch norm of factor zero), or because
      ``detach`` cuts off its gradient;
    - layers that are not selected, frozen or not called;
    - with a warning, layers whose weight cannot be scaled, such as a standardized one, and convolutions that are
      modules of your own;
    - everything that is no convolution's weight, and the caller's random state.

    A weight that several layers share has one factor, which gives the first of them that is called unit variance.

    Args:
        model: Any module; wrappers such as DistributedDataParallel and torch.compile are looked through.
        images: Batch that the model takes as its only argument, on its device. If it takes more, such as a time step,
            pass a module around it whose ``forward`` adds them.
        input_shape: Shape of one input without the batch, such as ``(3, 224, 224)``, for noise.
        seed: Seed of the noise.
        include: Shell patterns of layer names; where any are given, others are left alone.
        exclude: Shell patterns of layer names to leave alone.

    Returns:
        The factors on the weights that were scaled, by the names of their layers. They have four significant digits, so
        that they do not depend on how a machine rounds.

    Raises:
        InputError: If not just one of ``images`` and ``input_shape`` is given, the images are none or not finite, a
            pattern matches no layer, or the model has lazy parameters, does not take such an input or gives nothing
            that is differentiable.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        >>> factors = ci.calibrate_(model, input_shape=(3, 32, 32))
        >>> list(factors), all(factor > 1 for factor in factors.values())
        (['0', '2'], True)
    """
    factors, left = scale_layers(model, images, input_shape, seed=seed, include=include, exclude=exclude)
    for reason, names in left.items():
        if reason != UNREACHED or not factors:
            warnings.warn(f"not scaled: {some(names)}: {reason}", stacklevel=2)
    return factors


def scale_layers(
    model: nn.Module,
    images: Tensor | None,
    input_shape: Sequence[int] | None,
    *,
    seed: int,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """As `calibrate_`; also the names of the layers that were left as they are, by the reason, without a warning."""
    if (images is None) == (input_shape is None):
        raise InputError("expected either images or an input_shape to calibrate on, got both or neither")
    if images is not None and not isinstance(images, Tensor):
        raise InputError(
            f"expected images as one tensor, got {type(images).__name__}: of a data loader's batch pass the images "
            "alone, a shape as input_shape, and a model of several inputs within a module that adds the others"
        )
    seed = check_whole("seed", seed, 0, MAX_SEED)
    model, modules = unwrap(model), dict(find_convolutions(model))
    refuse_lazy(model)
    found = find_layers(model, include, exclude)
    chosen = [layer for layer in found if layer.obstacle is None]
    layers = [layer for layer in chosen if layer.name in modules and _is_scalable(layer)]
    left = {layer.name: FIXED if layer.name in modules else OWN_CLASS for layer in chosen if layer not in layers}
    if not layers:
        return {}, _by_reason(left)
    if images is None:
        assert input_shape is not None
        images = natural_noise(input_shape, seed).to(layers[0].weight.sources[0])
    if images.numel() == 0 or not images.isfinite().all():
        raise InputError("expected images of finite numbers, got infinities or NaN, or none at all: leave those out")
    # Without shapes and strides, because two layers may share numbers by different views.
    places = {layer.name: tuple(memory[:4] for memory in memories(layer.weight.sources)) for layer in found}
    owners = {places[layer.name]: layer.name for layer in layers}
    owner = {layer.name: owners.get(places[layer.name]) for layer in found}
    scaled = [(name, module) for key, module in modules.items() if (name := owner.get(key)) is not None]
    called = _find_factors(model, scaled, images)
    factors = {name: factor for name, factor in called.items() if factor is not None}
    with holding_weights_lock(), torch.no_grad():
        for layer in layers:
            if layer.name in factors:
                layer.weight.write(layer.weight.read() * factors[layer.name])
    missed = [layer.name for layer in layers if layer.name not in factors]
    left |= {name: UNREACHED if name in called else UNCALLED for name in missed}
    return factors, _by_reason(left)


def natural_noise(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Gaussian noise of unit variance and power 1/|f|², zero at f = 0, for a shape of channels and sizes.

    It is ``[N, *shape]``, and its channels are independent.
    """
    try:
        sizes = tuple(map(operator.index, shape))
    except TypeError:  # a text, a fraction
        sizes = ()
    if len(sizes) < 2 or min(sizes) < 1 or math.prod(sizes[1:]) < 2:
        raise InputError(f"expected an input shape of channels and sizes such as (3, 224, 224), got {shape!r}")
    generator, kind = torch.Generator().manual_seed(seed), torch.float32  # whatever the defaults are
    try:
        white = torch.randn(IMAGES, *sizes, generator=generator, dtype=kind, device="cpu")
    except (RuntimeError, TypeError) as error:  # the latter of a size beyond 64 bits
        raise InputError(
            f"expected an input shape of which {IMAGES} fit in memory, got {shape!r}: choose smaller sizes"
        ) from error
    axes = tuple(range(2, white.dim()))
    frequencies = squared_frequencies(sizes[1:], kind).sqrt()  # [*shape[1:]]
    amplitudes = torch.where(frequencies > 0, 1 / frequencies, 0)
    noise: Tensor = torch.fft.ifftn(torch.fft.fftn(white, dim=axes) * amplitudes, dim=axes).real
    noise /= noise.std()
    return noise


def _find_factors(model: nn.Module, modules: Sequence[tuple[str, _ConvNd]], images: Tensor) -> dict[str, float | None]:
    """The factors of modules that are called, by name, from a pass that multiplies outputs by them.

    A factor is None if the output does not depend on it. The unwrapped model is left as it was.
    """
    scales: dict[str, Tensor] = {}
    reached: list[Tensor] = []

    def scaled(name: str, output: Tensor, added: Tensor | None) -> Tensor:
        bias: Tensor | float = 0.0
        if added is not None:
            bias = added.detach().reshape(-1, *[1] * (output.dim() - 2))  # [M, 1, ...]
        plain = output - bias
        if name not in scales:
            deviation = float(plain.detach().float().std())
            factor = float(f"{1 / deviation:.3e}") if 0 < deviation < math.inf else 1.0
            # A leaf: its gradient tells whether the output depends on the scale of this layer.
            scales[name] = output.new_tensor(factor).requires_grad_()
        return plain * scales[name] + bias

    with (
        isolated(model),
        convolution_outputs(modules, scaled),
        torch.inference_mode(False),
        torch.enable_grad(),
        full_precision(images.device),
    ):
        for part in tree.modules(model):
            # A classifier of zeros hides what enters it.
            if isinstance(part, nn.Linear) and not (is_wrapper(part.weight) or part.weight.any()):
                part.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
        try:
            reached += tree_leaves(model(images))
        except Exception as error:  # whatever the model's own code raises
            raise InputError(
                f"expected a model that takes {list(images.shape)}, got {error_text(error)}: "
                "give the shape of its inputs, and a model of several inputs within a module that adds the others"
            ) from error
        ends = [end for end in reached if isinstance(end, Tensor) and end.requires_grad]
        if not ends:
            raise InputError(
                "expected a model with an output that is differentiable, got one that has none to calibrate"
            )
        if not scales:
            return {}
        # Weighted, lest a sum cancel what a layer does to it.
        weighted = (end * torch.linspace(1, 2, end.numel(), device=end.device).view_as(end).to(end) for end in ends)
        total = torch.stack([end.sum().float() for end in weighted]).sum()
        gradients = torch.autograd.grad(total, list(scales.values()), allow_unused=True)
    factors = {
        # Four digits once more, which the model's dtype may have rounded.
        name: float(f"{scale.item():.3e}")
        for (name, scale), slope in zip(scales.items(), gradients, strict=True)
        if slope is not None and slope.isfinite() and slope != 0
    }
    if len(factors) not in (0, len(scales)):
        # Those that stay may have reached others all the same, by a way without a gradient.
        again = [(name, module) for name, module in modules if name in factors]
        return dict.fromkeys(scales) | _find_factors(model, again, images)
    return dict.fromkeys(scales) | factors


def _by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    reasons = dict.fromkeys(left.values())
    return {reason: [layer_name(name) for name, its in left.items() if its == reason] for reason in reasons}


def _is_scalable(layer: Layer) -> bool:
    """Whether twice its weight can be set; it is left as it was."""
    if isinstance(layer.weight, StoredWeight):
        return True
    with holding_weights_lock(), torch.no_grad():
        put_back = layer.weight.backup()
        try:
            return layer.weight.write(2 * layer.weight.read()) is None
        except RefusedError:
            return False
        finally:
            put_back()
