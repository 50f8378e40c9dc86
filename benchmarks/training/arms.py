"""The arms of the training benchmark: what is done to a network's convolutions before, or while, it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import convsim_init as ci
from benchmarks.training.starts import (
    LONG,
    Start,
    all_channels,
    assigned,
    convsim,
    delta_orthogonal,
    each_weight,
    first_layer,
    fixed_kernel_norms,
    he,
    in_turn,
    kernel_norms,
    matched_channels,
    natural,
    one_channel,
    orthogonal,
    paper_rescaled,
    patch_whitened,
    pytorch_default,
    scrambled,
    signed_permutations,
    unit_variance,
)
from benchmarks.training.terms import Term, raw_similarity, similarity_term, soft, srip


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


ARMS: dict[str, Arm] = {
    "base": Arm("He's normal distribution"),
    "convsim": Arm("Convolutional Similarity lowered, default settings", convsim),
    "one channel": Arm("control: each filter keeps one random channel", each_weight(one_channel)),
    "orthogonal": Arm("orthogonal filters", orthogonal),
    "patch-whitened": Arm("control that sees the data: orthogonal on whitened patches", patch_whitened),
    "kernel norms": Arm("control: random kernels with the norms of convsim's", kernel_norms),
    "signed permutations": Arm("control: 1×1 layers alone, one channel a filter", each_weight(signed_permutations)),
    "delta-orthogonal": Arm("an orthogonal matrix at the middle tap", each_weight(delta_orthogonal)),
    "convsim, 10 steps": Arm("10 steps at most", partial(convsim, settings=ci.Settings(steps=10))),
    "convsim, 200 steps": Arm("200 steps, never stopping early", partial(convsim, settings=LONG)),
    "convsim, matched channels": Arm("`channels=matched`, the default before", matched_channels),
    "convsim, all channels": Arm("`channels=all`", all_channels),
    "convsim, fixed kernel norms": Arm("patterns without a division among channels", fixed_kernel_norms),
    "convsim, first layer": Arm("other layers left as they are", first_layer),
    "convsim, not 1x1": Arm("1×1 layers left as they are", partial(convsim, ones=False)),
    "paper": Arm("about norms: the paper's recipe, 100 steps", partial(convsim, settings=ci.Settings.paper())),
    "paper, rescaled": Arm("the paper's recipe at the base's norms", paper_rescaled),
    "convsim, scrambled": Arm("control: convsim's kernels, the taps of each in another order", scrambled),
    "convsim, assigned 1x1": Arm("1×1 layers by assignment in place of a descent", assigned),
    "natural spectrum": Arm("similarity for inputs of power 1/|f|²", each_weight(natural)),
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
    "convsim, PyTorch's default": Arm("about norms: convsim from there", in_turn(pytorch_default, convsim)),
    "fan in": Arm("about norms: He's distribution, fan in", partial(he, fan="fan_in")),
    "fan out": Arm("about norms: He's distribution, fan out, as in torchvision's ResNets", partial(he, fan="fan_out")),
    "unit variance": Arm("about norms: the base, each layer scaled on inputs", unit_variance),
    "LSUV": Arm("about norms: orthogonal filters, each layer scaled on inputs", in_turn(orthogonal, unit_variance)),
    "convsim, unit variance": Arm("convsim, each layer scaled on inputs", in_turn(convsim, unit_variance)),
    "convsim, matched channels, unit variance": Arm(
        "`channels=matched`, each layer scaled on inputs", in_turn(matched_channels, unit_variance)
    ),
    "convsim, all channels, unit variance": Arm(
        "`channels=all`, each layer scaled on inputs", in_turn(all_channels, unit_variance)
    ),
}  # fmt: skip
