"""A short run of `tests/fuzz/random_modules.py`, and that it would see what it looks for."""

import pytest
import torch
from random_modules import draw, violations
from torch import nn

import convsim_init as ci
from convsim_init.layers.forward import isolation

SEEDS = range(10**6, 10**6 + 60)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", range(4))
def test_what_must_hold_of_random_modules(chunk):
    broken = [f"seed {seed}: {violation}" for seed in SEEDS[chunk::4] for violation in violations(seed)]
    assert broken == []


@pytest.mark.filterwarnings("ignore")
def test_equal_seeds_draw_equal_modules_of_many_kinds():
    drawn = [draw(seed) for seed in SEEDS]
    assert len({kind for _, _, kinds in drawn for kind in kinds}) > 35
    for (a, *_), seed in zip(drawn[:5], SEEDS, strict=False):
        pairs = zip(a.parameters(), draw(seed)[0].parameters(), strict=True)
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", ["not put back", "other figures", "others change"])
def test_a_fault_is_found(fault, monkeypatch):
    if fault == "not put back":
        monkeypatch.setattr(isolation, "backup_tensor", lambda tensor, copy: lambda: None)
    elif fault == "other figures":
        monkeypatch.setattr(ci, "measure", lambda model: _with_figures(MEASURE(model), 0.9))
    else:
        monkeypatch.setattr(ci, "initialize_", _spoiling)
    assert any(True for seed in SEEDS[:12] for _ in violations(seed))


MEASURE, INITIALIZE = ci.measure, ci.initialize_


def _with_figures(report, factor):
    for layer in report.layers:
        if layer.before:
            layer.before["normalized_similarity"] *= factor
    return report


def _spoiling(model, **options):
    report = INITIALIZE(model, **options)
    with torch.no_grad():
        next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).weight.add_(1)
    return report
