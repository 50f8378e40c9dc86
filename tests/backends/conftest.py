from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

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
    for name in ("device", "device_of"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    with PretendedCard() as pretended:
        yield pretended
    fourier._cached_basis.cache_clear()  # it holds tensors of the pretended GPU


@pytest.fixture
def answer_with(monkeypatch) -> Callable[[Callable[[], SimpleNamespace]], None]:
    """Have Triton say what the GPU is that it compiles for."""
    triton = pytest.importorskip("triton", reason="without Triton: pip install --no-deps triton")

    def answer(current_target: Callable[[], SimpleNamespace]) -> None:
        active = SimpleNamespace(get_current_target=current_target)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))

    return answer


@pytest.fixture
def fused_card(card, answer_with, monkeypatch) -> Iterator[PretendedCard]:
    """The pretended GPU, on which Triton's kernels are interpreted."""
    from convsim_init.backends import fused, fused_similarity

    for module, names in (
        (fused, ("_evaluate", "_turn")),
        (fused_similarity, ("_fold", "_evaluate", "_unfold")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, card.launcher(getattr(module, name)))
    answer_with(lambda: SimpleNamespace(backend="cuda", arch=90))
    yield card
    fused_similarity._basis.cache_clear()
