"""The examples in the docstrings of the public names run."""

import doctest

import pytest
import torch
from torch import nn

import convsim_init as ci

NAMES = sorted(set(ci.__all__) - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner()
    report: list[str] = []
    tests = finder.find(getattr(ci, name), name, globs={"ci": ci, "nn": nn, "torch": torch})
    for test in tests:
        runner.run(test, out=report.append)
    assert any(test.examples for test in tests), "a public name without an example"
    assert runner.failures == 0, "".join(report)
