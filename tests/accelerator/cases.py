"""What is computed on an emulated accelerator, beside the same on the CPU: prints the error of each case as JSON."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import convsim_init as ci

DEVICES = ("cpu", "emulated")
SETTINGS = {
    "defaults": ci.Settings(steps=5),
    "all channels": ci.Settings(steps=5, channels="all"),
    "adjacent pairs": ci.Settings(steps=5, pairs="adjacent"),
    "paper": ci.Settings.paper(steps=5),
}
TERMS: dict[str, dict[str, Any]] = {
    "raw": {},
    "normalized": {"normalized": True},
    "all channels": {"channels": "all"},
    "adjacent pairs": {"pairs": "adjacent"},
}
BASES = ("kaiming_normal:fan_out", "kaiming_uniform", "xavier_normal", "orthogonal", "delta_orthogonal")


class Standardized(nn.Conv2d):
    """Convolves with filters of zero mean and unit variance."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Masked(nn.Conv2d):
    """Convolves with filters without a corner."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        mask = torch.ones_like(self.weight)
        mask[:, :, 2, 2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Cut(nn.Conv2d):
    """As `Masked`, but the mask is made in the forward pass, on the default device."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(3, 3)
        mask[2, 2] = 0
        return self._conv_forward(x, self.weight * mask, self.bias)


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Conv2d(4, 8, 3), "weight", 0.3)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 8, 3),
    "groups": lambda: nn.Conv2d(4, 8, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 8, 3),
    "7x7": lambda: nn.Conv2d(4, 8, 7),
    "standardized": lambda: Standardized(4, 8, 3),
    "masked": lambda: Masked(4, 8, 3),
    "pruned": pruned,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 8, 3)),
    "old weight_norm": lambda: weight_norm(nn.Conv2d(4, 8, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 8, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(4, 8, 3)),
    "half": lambda: nn.Conv2d(4, 8, 3, dtype=torch.float16),
    "double": lambda: nn.Conv2d(4, 8, 3, dtype=torch.float64),
}


def network(convolution: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    first = CONVOLUTIONS[convolution]()
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1)).to(next(first.parameters()).dtype)


def images(model: nn.Module, device: str) -> Tensor:
    numbers = torch.rand(4, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    return numbers.to(device, next(model.parameters()).dtype)


def outcome(model: nn.Module, report: ci.Report) -> list[Any]:
    """What became of each layer, the remarks, and the tensors of the model."""
    assert len({tensor.device for tensor in model.state_dict().values()}) == 1, "the model was divided"
    layers = [(layer.name, layer.outcome, layer.reason, layer.before, layer.after) for layer in report.layers]
    return [layers, report.remarks, model.state_dict()]


def initialized(convolution: str, settings: str, place: str, device: str) -> list[Any]:
    """The model, the computation or both are on the device."""
    model = network(convolution).to("cpu" if place == "computed there" else device)
    computed = None if place == "model there" else device
    report = ci.initialize_(model, settings=SETTINGS[settings], device=computed)
    assert report.device == str(torch.empty(0, device=computed or "cpu").device)
    return outcome(model, report)


def initialized_to_the_bit(convolution: str, device: str) -> list[Tensor]:
    model = network(convolution).to(device)
    ci.initialize_(model)
    return [parameter.detach().cpu().view(torch.uint8) for parameter in model.parameters()]


def by_default(convolution: Callable[[int, int, int], nn.Module], device: str) -> list[Any]:
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(convolution(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), convolution(8, 6, 3))
        return outcome(model, ci.initialize_(model, settings=SETTINGS["defaults"]))


def regularized(convolution: str, term: str, device: str) -> list[Any]:
    model = network(convolution).to(device)
    value = ci.ConvolutionalSimilarity(model, **TERMS[term])()
    value.backward()
    return [value, [parameter.grad for parameter in model.parameters()]]


def measured(convolution: str, device: str) -> list[Any]:
    model = network(convolution).to(device)
    return [
        [layer.before for layer in ci.measure(model).layers],
        ci.measure_feature_correlation(model, images(model, device)),
    ]


def drawn(convolution: str, base: str, device: str) -> dict[str, Tensor]:
    model = network(convolution).to(device)
    ci.draw_base_(model, base)
    return model.state_dict()


def calibrated(convolution: str, device: str) -> dict[str, Tensor]:
    model = network(convolution).to(device)
    ci.calibrate_(model, images(model, device))
    return model.state_dict()


def trained(convolution: str, device: str) -> list[Any]:
    with ci.initializing(settings=SETTINGS["defaults"]) as reports:
        model = network(convolution).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(images(model, device)).square().mean().backward()
            optimizer.step()
    (report,) = reports
    layers, remarks, _ = outcome(model, report)
    return [layers, remarks, list(model.parameters())]  # no running statistics: the emulation does not write them


def saved(convolution: str, device: str) -> list[Any]:
    model, other = network(convolution).to(device), network(convolution).to(device)
    report = ci.initialize_(model, settings=SETTINGS["defaults"])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "init.safetensors"
        ci.save_checkpoint(model, path, report=report)
        loaded = ci.load_checkpoint(other, path)
    return [len(loaded.matched), other.state_dict()]


def single_weight(dtype: torch.dtype, device: str) -> Tensor:
    torch.manual_seed(0)
    return ci.convsim_(torch.randn(8, 4, 3, 3).to(device, dtype), groups=2, settings=SETTINGS["defaults"])


def of_a_state_dict(device: str) -> dict[str, Tensor]:
    state = {key: value.to(device) for key, value in network().state_dict().items()}
    ci.initialize_(state, settings=SETTINGS["defaults"])
    return state


def of_two_devices(device: str) -> list[Any]:
    model = network("masked")
    model[0].to(device)
    report = ci.initialize_(model, settings=SETTINGS["defaults"])
    value = ci.ConvolutionalSimilarity(model)()
    value.backward()
    return [[layer.after for layer in report.layers], value, [parameter.grad for parameter in model.parameters()]]


PLACES = ("model there", "computed there", "both there")
CASES: dict[str, Callable[[str], Any]] = {
    **{
        f"initialize_, {convolution}, {settings}, {place}": partial(initialized, convolution, settings, place)
        for convolution, settings, place in product(CONVOLUTIONS, SETTINGS, PLACES)
    },
    **{
        f"initialize_ to the bit, {name}": partial(initialized_to_the_bit, name) for name in ("plain", "groups", "half")
    },
    **{f"on the default device, {kind.__name__}": partial(by_default, kind) for kind in (nn.Conv2d, Standardized, Cut)},
    **{f"term, {name}, {term}": partial(regularized, name, term) for name, term in product(CONVOLUTIONS, TERMS)},
    **{f"measure, {name}": partial(measured, name) for name in CONVOLUTIONS if name != "half"},
    **{f"draw_base_, {name}, {base}": partial(drawn, name, base) for name, base in product(CONVOLUTIONS, BASES)},
    **{f"calibrate_, {name}": partial(calibrated, name) for name in CONVOLUTIONS},
    **{f"initializing, {name}": partial(trained, name) for name in CONVOLUTIONS},
    **{f"save, load, {name}": partial(saved, name) for name in CONVOLUTIONS},
    **{f"convsim_, {dtype}": partial(single_weight, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)},
    "a state dict": of_a_state_dict,
    "a model of two devices": of_two_devices,
}


def check_equal(found: Any, expected: Any) -> None:
    """Raise an `AssertionError` if something differs by more than rounding."""
    if isinstance(found, dict) and isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(found, (list, tuple)):
        assert len(found) == len(expected), (found, expected)
        for each, other in zip(found, expected, strict=True):
            check_equal(each, other)
    elif isinstance(found, (Tensor, float)):
        found, expected = (torch.as_tensor(value).detach().cpu() for value in (found, expected))
        loose = {"rtol": 1e-2, "atol": 1e-2} if found.dtype in (torch.float16, torch.bfloat16) else {}
        torch.testing.assert_close(found, expected, equal_nan=True, **(loose or {"rtol": 1e-3, "atol": 2e-5}))
    else:
        assert found == expected


def main() -> None:
    import emulated

    emulated.register()
    warnings.simplefilter("ignore")
    errors: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            expected, found = (case(device) for device in DEVICES)
            check_equal(found, expected)
            errors[name] = None
        except Exception:
            errors[name] = traceback.format_exc()
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
