"""The regularizer on a GPU in torch's operations: it never waits, and launches little."""

import pytest
import torch
from card import OnCard

from convsim_init.backends.gradient import Layout, summed_similarity
from convsim_init.functional.similarity import convolutional_similarity


@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("pairs", ["all", "adjacent"])
@pytest.mark.parametrize("channels", ["matched", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_forward_pass_never_waits_and_launches_little(pairs, channels, normalized, dtype, card):
    weights, layouts = [torch.randn(8, 3, 3, 3).to(dtype), torch.randn(6, 2, 5).to(dtype)], [Layout(), Layout(2)]

    def similarity() -> torch.Tensor:
        with torch.no_grad():
            return summed_similarity(list(map(OnCard, weights)), layouts, pairs, channels, normalized=normalized)

    similarity()  # the bases are made, and copied to the GPU
    card.launches = card.waits = 0
    found = similarity()
    assert isinstance(found, OnCard)
    assert card.waits == 0
    assert card.launches <= len(weights) * (43 if normalized else 16)
    wanted = sum(
        convolutional_similarity(w, groups=g, pairs=pairs, channels=channels, normalized=normalized)
        for w, (g, _) in zip(weights, layouts, strict=True)
    )
    torch.testing.assert_close(found.held, wanted)
