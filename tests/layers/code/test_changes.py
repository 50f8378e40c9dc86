"""What code changes in place, by names: alike in all versions of Python, and nothing that is only computed from it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convsim_init.layers.code.changes import ARGUMENT, GLOBAL, ITEM, REPLACED, RESULT, changed_in_place


def by_method(self, x):
    self.conv.weight.data.clamp_(min=0)


def by_function(self, x):
    torch.clamp_(self.conv.weight, min=0)


def by_imported_function(self, x):
    from torch.nn.init import zeros_

    zeros_(self.conv.weight)


def by_operator(self, x):
    self.conv.weight *= 2


def by_item(self, x):
    self.conv.weight.data[x > 0] = 0


def by_variable(self, x):
    weight = self.conv.weight if x is None else self.other(x)
    with torch.no_grad():
        for _ in range(2):
            weight.abs_()


def by_loop(self, x):
    for name, one in dict(self.named_parameters()).items():
        if name.startswith("conv") or not name:
            one.data = one.data.abs()


def by_list(self, x):
    parameters = list(self.conv.parameters())
    torch._foreach_abs_(parameters)


def by_pairs(self, x):
    for one, scale in zip(self.convs, self.scales, strict=True):
        one.weight.data.mul_(scale if scale is not None else self.scale)


def by_call(self, x):
    return torch.func.functional_call(self.conv, {"weight": self.other.weight, "bias": None}, (x,))


def by_loading(self, x):
    self.conv.load_state_dict({"weight": self.other})


def by_setting(self, x):
    name = "weight"
    setattr(self.conv, name, x)


def of_an_argument(conv, scale, *more):
    conv.weight.data.mul_(scale)


def of_a_global(x):
    MODEL.weight.data.mul_(2)


MODEL = nn.Conv2d(1, 1, 1)
FOUND = {
    by_method: {"conv", "weight", "data"},
    by_function: {"conv", "weight"},
    by_imported_function: {"conv", "weight"},
    by_operator: {"conv", "weight"},
    by_item: {"conv", "weight", "data"},
    by_variable: {"conv", "weight", RESULT},
    by_loop: {"named_parameters", "items", "data", ITEM},
    by_list: {"conv", "parameters"},
    by_pairs: {"convs", "scales", "weight", "data", ITEM},
    by_call: {"conv", "weight", REPLACED},
    by_loading: {"conv", "weight", REPLACED},
    by_setting: {"conv", "weight", REPLACED},
    of_an_argument: {"weight", "data", ARGUMENT},
    of_a_global: {"weight", "data", GLOBAL},
}


@pytest.mark.parametrize("function", FOUND, ids=lambda function: function.__name__)
def test_what_is_changed_is_told_by_its_names(function):
    assert FOUND[function] in changed_in_place(function.__code__)
    assert len(changed_in_place(function.__code__)) <= 2


def forward(self, x, y):
    """Changes what is computed, an argument, and a dict."""
    x = F.relu_(self.conv(x)) * self.gain.weight
    x.add_(y).mul_(self.conv.weight.sum()).clamp_(min=0)
    x[0] = self.conv.weight[0]
    x += self.gain.weight
    y.data.mul_(2)
    weights = {name: one.clone() for name, one in self.named_parameters()}
    weights["a"] = 1
    parts = list(self.parameters())
    parts += list(self.conv.parameters())
    copy = torch.empty_like(self.conv.weight).normal_() + self.conv.weight.clone().zero_()
    for one in self.parameters():
        one.requires_grad_()
    return [part(copy).relu_() for part in self.children()], weights, torch.relu_(x if x.ok else y)


def test_what_is_computed_from_weights_is_none():
    assert changed_in_place(forward.__code__) <= {frozenset({RESULT}), frozenset({"data"})}
