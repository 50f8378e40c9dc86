"""The arms of the training benchmark: what is done to a network's convolutions before, or while, it is trained.

Every arm is given the same base draw, He's normal distribution over the fan that a case names, and where it is not
about norms each filter ends with the norm that it had there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import convsim_init as ci

Start = Callable[[nn.Module, Tensor], object]
Term = Callable[[nn.Module], Callable[[], Tensor]]


@dataclass(frozen=True)
class Arm:
    """A way to start, and perhaps a term of the loss.

    Attributes:
        about: In a few words.
        start: Changes the convolutions of a network in place, given inputs for training.
        term: Given the network, what gives the term to add to the loss; None for no term.
        weight: Factor on the term.
        until: Share of the steps after which the term is left out.
        decay: Factor on the optimizer's weight decay.
    """

    about: str
    start: Start = lambda model, images: None
    term: Term | None = None
    weight: float = 1.0
    until: float = 1.0
    decay: float = 1.0


def draw_base(model: nn.Module, fan: str) -> None:
    """Draw every convolution from He's normal distribution over ``fan_in`` or ``fan_out``, with zero biases."""
    for conv in convolutions(model):
        nn.init.kaiming_normal_(conv.weight, mode=fan, nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Every convolution, in the order of the modules."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def _each(redraw: Callable[[Tensor], Tensor]) -> Start:
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


def _in_turn(*starts: Start) -> Start:
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

    handles = [conv.register_forward_pre_hook(whiten) for conv in convolutions(model)]
    model(images[:256])
    for handle in handles:
        handle.remove()


@torch.no_grad()
def unit_variance(model: nn.Module, images: Tensor) -> None:
    """Scale every layer so that its output has unit variance: LSUV's second half (Mishkin and Matas, arXiv 1511.06422).

    Layer by layer in one forward pass, each from what reaches it through the scaled ones before.
    """

    def scale(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        deviation = output.std()
        conv.weight /= deviation
        return output / deviation  # the biases are zero

    handles = [conv.register_forward_hook(scale) for conv in convolutions(model)]
    model(images[:256])
    for handle in handles:
        handle.remove()


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


def similarity_term(model: nn.Module, normalized: bool = True) -> Callable[[], Tensor]:
    """Convolutional Similarity, summed over layers, of each the mean over pairs if normalized."""
    return ci.ConvolutionalSimilarity(model, normalized=normalized)


def orthogonality_term(model: nn.Module, spectral: bool) -> Callable[[], Tensor]:
    """Distance of each layer's Gram matrix of filters from the identity, summed (Bansal et al., arXiv 1810.09102).

    Squared and by Frobenius norm ("soft"), or by spectral norm after two steps of the power method (SRIP).
    """

    def distance(conv: nn.Conv2d) -> Tensor:
        filters = conv.weight.flatten(1)
        excess = filters @ filters.T - torch.eye(len(filters), device=filters.device)
        if not spectral:
            return excess.square().sum()
        vector = torch.ones(len(filters), device=filters.device)
        for _ in range(2):
            vector = F.normalize(excess @ vector, dim=0)
        return (excess @ vector).norm()

    return lambda: torch.stack([distance(conv) for conv in convolutions(model)]).sum()


LONG = ci.Settings(steps=200, tolerance=0)
orthogonal = _each(lambda weight: nn.init.orthogonal_(torch.empty(weight.shape)))
matched_channels = partial(convsim, settings=ci.Settings(channels="matched"))
all_channels = partial(convsim, settings=ci.Settings(channels="all"))
raw_similarity = partial(similarity_term, normalized=False)
soft = partial(orthogonality_term, spectral=False)
srip = partial(orthogonality_term, spectral=True)

ARMS: dict[str, Arm] = {
    "base": Arm("He's normal distribution"),
    "convsim": Arm("Convolutional Similarity lowered, default settings", convsim),
    "one channel": Arm("control: each filter keeps one random channel", _each(one_channel)),
    "orthogonal": Arm("orthogonal filters", orthogonal),
    "patch-whitened": Arm("control that sees the data: orthogonal on whitened patches", patch_whitened),
    "kernel norms": Arm("control: random kernels with the norms of convsim's", kernel_norms),
    "signed permutations": Arm("control: 1×1 layers alone, one channel a filter", _each(signed_permutations)),
    "delta-orthogonal": Arm("an orthogonal matrix at the middle tap", _each(delta_orthogonal)),
    "convsim, 10 steps": Arm("10 steps at most", partial(convsim, settings=ci.Settings(steps=10))),
    "convsim, 200 steps": Arm("200 steps, never stopping early", partial(convsim, settings=LONG)),
    "convsim, matched channels": Arm("`channels=matched`, the default before", matched_channels),
    "convsim, all channels": Arm("`channels=all`", all_channels),
    "convsim, fixed kernel norms": Arm("patterns without a division among channels", fixed_kernel_norms),
    "convsim, not 1x1": Arm("1×1 layers left as they are", partial(convsim, ones=False)),
    "paper": Arm("about norms: the paper's recipe, 100 steps", partial(convsim, settings=ci.Settings.paper())),
    "paper, rescaled": Arm("the paper's recipe at the base's norms", paper_rescaled),
    "convsim, scrambled": Arm("control: convsim's kernels, the taps of each in another order", scrambled),
    "convsim, assigned 1x1": Arm("1×1 layers by assignment in place of a descent", assigned),
    "natural spectrum": Arm("similarity for inputs of power 1/|f|²", _each(natural)),
    "regularizer": Arm("normalized similarity added to the loss, weight 1", term=similarity_term),
    "regularizer, 0.1": Arm("the same, weight 0.1", term=similarity_term, weight=0.1),
    "regularizer, 10": Arm("the same, weight 10", term=similarity_term, weight=10),
    "regularizer, first third": Arm("the same, weight 1, in the first third", term=similarity_term, until=1 / 3),
    "regularizer, raw": Arm("raw similarity added to the loss, weight 0.001", term=raw_similarity, weight=1e-3),
    "convsim, regularizer": Arm("both", convsim, similarity_term),
    "convsim, regularizer, 0.1": Arm("both, weight 0.1", convsim, similarity_term, weight=0.1),
    "soft orthogonality, 0.001": Arm("as a term of the loss", term=soft, weight=1e-3),
    "soft orthogonality, 0.01": Arm("the same, weight 0.01", term=soft, weight=1e-2),
    "soft orthogonality, 0.1": Arm("the same, weight 0.1", term=soft, weight=1e-1),
    "SRIP, 0.001": Arm("as a term of the loss", term=srip, weight=1e-3),
    "SRIP, 0.01": Arm("the same, weight 0.01", term=srip, weight=1e-2),
    "SRIP, 0.1": Arm("the same, weight 0.1", term=srip, weight=1e-1),
    "base, a tenth of the decay": Arm("weight decay of 0.005 with AdamW", decay=0.1),
    "base, ten times the decay": Arm("weight decay of 0.5 with AdamW", decay=10),
    "PyTorch's default": Arm("about norms: what `nn.Conv2d` draws", pytorch_default),
    "fan in": Arm("about norms: He's distribution, fan in", partial(he, fan="fan_in")),
    "fan out": Arm("about norms: He's distribution, fan out, as in torchvision's ResNets", partial(he, fan="fan_out")),
    "unit variance": Arm("about norms: the base, each layer scaled on inputs", unit_variance),
    "LSUV": Arm("about norms: orthogonal filters, each layer scaled on inputs", _in_turn(orthogonal, unit_variance)),
    "convsim, unit variance": Arm("convsim, each layer scaled on inputs", _in_turn(convsim, unit_variance)),
    "convsim, matched channels, unit variance": Arm(
        "`channels=matched`, each layer scaled on inputs", _in_turn(matched_channels, unit_variance)
    ),
    "convsim, all channels, unit variance": Arm(
        "`channels=all`, each layer scaled on inputs", _in_turn(all_channels, unit_variance)
    ),
}  # fmt: skip
