"""A short run of `tests/fuzz/random_trainings.py`, and that it would see what it looks for."""

import pytest
import torch
from random_trainings import draw, violations

from convsim_init import context
from convsim_init.layers.obstacle import Obstacle

SEEDS = range(10**6, 10**6 + 48)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", range(4))
def test_what_must_hold_of_random_trainings(chunk):
    broken = [f"seed {seed} ({draw(seed)}): {what}" for seed in SEEDS[chunk::4] for what in violations(seed)]
    assert broken == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", ["nothing is left alone", "everything is left alone", "others change"])
def test_a_fault_is_found(fault, monkeypatch):
    if fault == "others change":
        monkeypatch.setattr(context, "initialize_layers", _spoiling(context.initialize_layers))
    else:
        reason = Obstacle("left") if fault.startswith("everything") else None
        monkeypatch.setattr(context, "left_alone", lambda part: reason)
    expected = {
        "nothing is left alone": "loaded, and treated",
        "everything is left alone": "drawn, and not treated",
        "others change": "head.bias has changed",
    }
    assert any(expected[fault] in what for seed in SEEDS for what in violations(seed))


def _spoiling(initialize_layers):
    def spoiling(model, *args, **kwargs):
        report = initialize_layers(model, *args, **kwargs)
        with torch.no_grad():
            next(part for name, part in model.named_parameters() if name.endswith("head.bias")).add_(1)
        return report

    return spoiling
