"""What is done to a network's convolutions before it is trained.

Every start is given the same base draw, He's normal distribution over the fan that a case names, and where it is not
about norms each filter ends with the norm that it had there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import convsim_init as ci

Start = Callable[[nn.Module, Tensor], object]


def draw_base(model: nn.Module, fan: str) -> None:
    """Draw every convolution from He's normal distribution over ``fan_in`` or ``fan_out``, with zero biases."""
    for conv in convolutions(model):
        nn.init.kaiming_normal_(conv.weight, mode=fan, nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Every convolution, in the order of the modules."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def each_weight(redraw: Callable[[Tensor], Tensor]) -> Start:
    """Redraw each weight, and give each filter the norm it had."""

    @torch.no_grad()
    def start(model: nn.Module, images: Tensor) -> None:
        for conv in convolutions(model):
            conv.weight.copy_(with_norms_of(conv.weight, redraw(conv.weight.clone())))

    return start


def with_norms_of(weight: Tensor, other: Tensor) -> Tensor:
    """The filters of ``other``, each with the norm of that of ``weight``."""
    norms, old = (w.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for w in (weight, other))
    return other * (norms / old)


def in_turn(*starts: Start) -> Start:
    """One start after another."""

    def start(model: nn.Module, images: Tensor) -> None:
        for each in starts:
            each(model, images)

    return start


def one_channel(weight: Tensor) -> Tensor:
    """Keep one input channel of each filter, chosen at random."""
    chosen = torch.randint(weight.shape[1], (len(weight),))
    return weight * F.one_hot(chosen, weight.shape[1])[:, :, None, None]


def delta_orthogonal(weight: Tensor) -> Tensor:
    """An orthogonal matrix at the middle tap, zeros elsewhere (Xiao et al., arXiv 1806.05393).

    A layer with one input channel stays: all its filters would be the same.
    """
    if weight.shape[1] == 1:
        return weight
    middle = tuple(size // 2 for size in weight.shape[2:])
    filters = torch.zeros_like(weight)
    filters[(..., *middle)] = nn.init.orthogonal_(torch.empty(weight.shape[:2]))
    return filters


def signed_permutations(weight: Tensor) -> Tensor:
    """Each filter of a 1x1 layer keeps one channel, no channel twice before all have been kept; others stay."""
    filters, channels = weight.shape[:2]
    if weight.shape[2:] != (1, 1):
        return weight
    rounds = [torch.randperm(channels) for _ in range(0, filters, channels)]
    return weight * F.one_hot(torch.cat(rounds)[:filters], channels)[:, :, None, None]


def run_hooked(model: nn.Module, images: Tensor, hooks: Sequence[RemovableHandle]) -> None:
    """A forward pass over some images, after which the hooks are removed."""
    model(images[:256])
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def patch_whitened(model: nn.Module, images: Tensor) -> None:
    """Orthogonal filters for whitened patches: feature maps of training images do not correlate before activations.

    Layer by layer in one forward pass, each from the patches that reach it; grouped layers stay.
    """

    def whiten(conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        if conv.groups > 1:
            return
        patches = F.unfold(inputs[0], conv.kernel_size, padding=conv.padding, stride=conv.stride)
        patches = patches.transpose(1, 2).flatten(0, 1)  # [N, C kH kW]
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        values += 1e-2 * values.mean()
        filters = nn.init.orthogonal_(torch.empty(len(conv.weight), len(values)))
        filters = filters @ (vectors / values.sqrt()) @ vectors.T
        conv.weight.copy_(with_norms_of(conv.weight, filters.view_as(conv.weight)))

    run_hooked(model, images, [conv.register_forward_pre_hook(whiten) for conv in convolutions(model)])


@torch.no_grad()
def unit_variance(model: nn.Module, images: Tensor) -> None:
    """Scale every layer so that its output has unit variance: LSUV's second half (Mishkin and Matas, arXiv 1511.06422).

    Layer by layer in one forward pass, each from what reaches it through the scaled ones before.
    """

    def scale(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        deviation = output.std()
        conv.weight /= deviation
        return output / deviation  # the biases are zero

    run_hooked(model, images, [conv.register_forward_hook(scale) for conv in convolutions(model)])


@torch.no_grad()
def kernel_norms(model: nn.Module, images: Tensor) -> None:
    """Random kernels with the norms of convsim's: how it divides a filter among channels, without its patterns."""
    drawn = [conv.weight.clone() for conv in convolutions(model)]
    ci.initialize_(model)
    for conv, kernels in zip(convolutions(model), drawn, strict=True):
        norms, old = (w.flatten(2).norm(dim=2)[..., None, None] for w in (conv.weight, kernels))
        conv.weight.copy_(kernels * (norms / old))


@torch.no_grad()
def fixed_kernel_norms(model: nn.Module, images: Tensor) -> None:
    """Convolutional Similarity lowered while every kernel keeps its norm: patterns without a division among channels.

    With matched channels and such norms each input channel is a bank of filters for itself. Grouped layers stay.
    """
    for conv in convolutions(model):
        if conv.groups == 1 and conv.kernel_size != (1, 1):
            by_channel = conv.weight.transpose(0, 1)  # [C, M, kH, kW]
            banks = by_channel.flatten(0, 1)[:, None].clone(memory_format=torch.contiguous_format)  # [C M, 1, kH, kW]
            ci.convsim_(banks, groups=conv.in_channels)
            conv.weight.copy_(banks.view(by_channel.shape).transpose(0, 1))


def convsim(model: nn.Module, images: Tensor, settings: ci.Settings | None = None, ones: bool = True) -> None:
    """Convolutional Similarity lowered, with or without the 1x1 layers."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    exclude = [] if ones else [name for name in names if model.get_submodule(name).kernel_size == (1, 1)]
    ci.initialize_(model, settings=settings, exclude=exclude)


def first_layer(model: nn.Module, images: Tensor) -> None:
    """Convolutional Similarity lowered in the layer that sees the images, and in no other."""
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    ci.initialize_(model, include=[first])


@torch.no_grad()
def paper_rescaled(model: nn.Module, images: Tensor) -> None:
    """The paper's recipe, its filters then rescaled to their first norms."""
    before = [conv.weight.clone() for conv in convolutions(model)]
    convsim(model, images, ci.Settings.paper())
    for conv, weight in zip(convolutions(model), before, strict=True):
        conv.weight.copy_(with_norms_of(weight, conv.weight))


def pytorch_default(model: nn.Module, images: Tensor) -> None:
    """What `torch.nn.Conv2d` draws by itself, of its own smaller norms."""
    for conv in convolutions(model):
        conv.reset_parameters()


def he(model: nn.Module, images: Tensor, fan: str) -> None:
    """He's normal distribution over another fan than the base's."""
    draw_base(model, fan)


@torch.no_grad()
def scrambled(model: nn.Module, images: Tensor) -> None:
    """Convsim's weights, the taps of every kernel in another order: its values and channels without its patterns."""
    ci.initialize_(model)
    for conv in convolutions(model):
        taps = conv.weight.flatten(2)
        conv.weight.copy_(taps.gather(2, torch.rand_like(taps).argsort(2)).view_as(conv.weight))


@torch.no_grad()
def assigned(model: nn.Module, images: Tensor) -> None:
    """Convsim, but a 1x1 layer's filters keep one channel each, equally many a channel, as much of each as can be.

    For filters of one norm no weights have less similarity over matched channels: with p the shares of the filters'
    squared norms, [M, C], it goes with the sum over channels of (sum_i p_ic)^2 - sum_i p_ic^2, which is linear in each
    filter's shares: the least is at a corner, one channel a filter, and there at equal numbers.
    """
    drawn = {conv: conv.weight.clone() for conv in convolutions(model) if conv.kernel_size == (1, 1)}
    ci.initialize_(model)
    for conv, weight in drawn.items():
        rounds = -(-len(weight) // weight.shape[1])
        squares = weight.flatten(1).square().repeat(1, rounds)  # each channel so many times
        _, chosen = linear_sum_assignment(squares.numpy(), maximize=True)
        channels = torch.as_tensor(chosen) % weight.shape[1]
        conv.weight.copy_(with_norms_of(weight, weight * F.one_hot(channels, weight.shape[1])[:, :, None, None]))


def natural(weight: Tensor) -> Tensor:
    """Filters that are dissimilar for inputs of power 1/|f|^2: matched channels, L-BFGS, norms kept."""
    sizes = [2 * size for size in weight.shape[2:]]  # room for every shift
    frequencies = torch.meshgrid(*(torch.fft.fftfreq(size) for size in sizes), indexing="ij")
    power = 1 / sum(f.square() for f in frequencies).clamp_min((0.5 / max(sizes)) ** 2)
    free = weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    search = torch.optim.LBFGS([free], max_iter=30, line_search_fn="strong_wolfe")

    def similarity() -> Tensor:
        search.zero_grad()
        maps = torch.fft.fft2(with_norms_of(weight, free), s=sizes).abs().square() * power / power.mean()
        loss = (maps.sum(0).square() - maps.square().sum(0)).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(similarity)
    return free.detach()


LONG = ci.Settings(steps=200, tolerance=0)
orthogonal = each_weight(lambda weight: nn.init.orthogonal_(torch.empty(weight.shape)))
matched_channels = partial(convsim, settings=ci.Settings(channels="matched"))
all_channels = partial(convsim, settings=ci.Settings(channels="all"))
