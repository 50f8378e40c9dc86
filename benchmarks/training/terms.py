"""What is added to a network's loss while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convsim_init as ci
from benchmarks.training.starts import convolutions

Term = Callable[[nn.Module], Callable[[], Tensor]]


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


raw_similarity = partial(similarity_term, normalized=False)
soft = partial(orthogonality_term, spectral=False)
srip = partial(orthogonality_term, spectral=True)
