from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from card import PretendedCard

from convsim_init.functional import fourier


@pytest.fixture
def card(monkeypatch) -> Iterator[PretendedCard]:
    """A pretended GPU; everything in the test runs on it that is given its tensors."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    with PretendedCard() as pretended:
        yield pretended
    fourier._basis.cache_clear()  # it holds tensors of the pretended GPU
