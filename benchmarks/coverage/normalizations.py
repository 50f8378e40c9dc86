"""What is told of each layer without an input, whether a normalization follows, against a real forward pass.

    python -m benchmarks.coverage.normalizations LIBRARY [--every 14] [--largest 100]

LIBRARY is one of the census, such as torchvision-tasks. Each way from a layer of a network is followed through what a
forward pass computes from data, by the same rules. Layers of which the pass itself does not tell, and networks for
which no input is known, are left out.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from benchmarks.coverage.checks import build
from benchmarks.coverage.sources import SOURCES, Architecture
from convsim_init.layers.forward.calls import CONVOLUTIONS, convolution_arguments
from convsim_init.layers.names import bare_name
from convsim_init.layers.symbolic import passes as symbolic
from convsim_init.layers.symbolic.follow import Followed, follow
from convsim_init.layers.symbolic.kinds import call_name
from convsim_init.layers.symbolic.normalized import ends_of_layers, normalization_follows

TOLD = ("right", "wrong", "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=SOURCES)
    parser.add_argument("--every", type=int, default=1, help="take one network of so many")
    parser.add_argument("--largest", type=float, default=100, help="million parameters; larger networks are left out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    total, networks = Counter[str](), 0
    for architecture in list(SOURCES[options.library]())[:: options.every]:
        try:
            counts, others = examine(architecture, options.largest * 1e6)
        except Exception as error:  # whatever a library raises
            print(f"{architecture.name}: left out, {type(error).__name__}: {' '.join(str(error).split())[:100]}")
            continue
        total += counts
        networks += 1
        for line in others:
            print(f"{architecture.name}: {line}")
    print(f"{options.library}: {networks} networks, " + ", ".join(f"{total[one]:,} {one}" for one in TOLD))


def examine(architecture: Architecture, largest: float) -> tuple[Counter[str], list[str]]:
    """How many layers of a network are told right, wrong and not at all; a line on each of the latter."""
    model = build(architecture).eval()
    if sum(one.numel() for one in model.parameters()) > largest:
        raise ValueError("too large")
    told = normalization_follows(follow(model))
    names = {
        id(one): name
        for name, module in reversed(list(model.named_modules()))
        for one in (module, *module.parameters(recurse=False))
    }
    counts, lines = Counter[str](), []
    for name, ends in ends_of_layers(real_calls(model, architecture), Followed(names=names), whole=True).items():
        if isinstance(model.get_submodule(name), _ConvNd) and name and (False in ends or ends == {True}):
            follows, answer = False not in ends, told.get(bare_name(name))
            outcome = "unknown" if answer is None else "right" if answer == follows else "wrong"
            counts[outcome] += 1
            lines += [] if outcome == "right" else [f"{name} is {outcome}: {answer}, really {follows}"]
    return counts, lines


def real_calls(model: nn.Module, architecture: Architecture) -> list[symbolic.Node]:
    """The calls of a forward pass on the first inputs that the model takes, the last of them its output."""
    watch, error = _Watch(model), ValueError("no input")
    for inputs in architecture.inputs(model):
        watch.begin(inputs)
        try:
            with torch.no_grad(), watch:
                output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        except Exception as raised:  # whatever it raises at an input that it does not take
            error = raised
            continue
        watch.note(symbolic.OUTPUT, output, None)
        return watch.nodes
    raise error


class _Watch(TorchFunctionMode):
    """Context that notes what each tensor is computed from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[symbolic.Node] = []
        self._kept: dict[int, tuple[Tensor, symbolic.Node]] = {}  # by the tensor's id, which stays its own
        self._inside = False
        for module in model.modules():
            name, single = call_name(module)
            if single and not isinstance(module, torch.jit.ScriptModule):
                module.forward = functools.wraps(module.forward)(
                    functools.partial(self._call, module, name, module.forward)
                )

    def begin(self, inputs: object) -> None:
        """Forget what was noted before."""
        self.nodes.clear()
        self._kept.clear()
        self.note("", None, inputs)

    def note(self, name: str, given: object, returned: object, module: nn.Module | None = None) -> symbolic.Node:
        """Note a call."""
        tensors = list(symbolic.tensors_in(given))
        inputs = dict.fromkeys(self._kept[id(one)][1] for one in tensors if id(one) in self._kept)
        learned = frozenset(id(one) for one in tensors if isinstance(one, nn.Parameter))
        node = symbolic.Node(name, tuple(inputs), learned, module)
        self.nodes.append(node)
        self._kept |= {id(one): (one, node) for one in symbolic.tensors_in(returned)}
        return node

    def _call(self, module: nn.Module, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return forward(*args, **kwargs)
        self._inside = True
        try:
            returned = forward(*args, **kwargs)
        finally:
            self._inside = False
        self.note(name, (args, kwargs), returned, module)
        return returned

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        if not self._inside:
            in_place = symbolic.is_in_place(getattr(func, "__name__", ""))
            changed = args[0] if in_place and args else None
            node = self.note(symbolic.name_of(func), (args, kwargs), (returned, changed))
            if func in CONVOLUTIONS:
                node.weight = self.note("weight", convolution_arguments(func, args, kwargs)[1], None)
        return returned


if __name__ == "__main__":
    main()
