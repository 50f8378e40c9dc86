"""The weights that convolutions are given, seen from outside, and what a report should say of them."""

import pytest
import torch.nn.functional as F

import convsim_init as ci


def given(model, *inputs):
    """The weights that ``F.conv*`` is given in a forward pass, in order."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("conv1d", "conv2d", "conv3d", "conv_transpose2d"):
            plain = getattr(F, name)

            def watched(x, weight, *rest, plain=plain, **options):
                seen.append(weight.detach().clone())
                return plain(x, weight, *rest, **options)

            patch.setattr(F, name, watched)
        model(*inputs)
    return seen


def similarity_of(weight, *, normalized=True, **options):
    """What is to be reported of a weight, to four digits."""
    similarity = ci.convolutional_similarity(weight.detach(), normalized=normalized, **options)
    return pytest.approx(float(similarity), rel=1e-4)
