"""Convolutions that are calls in a graph: in a module of TorchScript or in an exported program.

No modules of `torch.nn` are left there, so the weight of each call is looked up in the graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from convsim_init.layers.layer import Layer
from convsim_init.layers.names import bare_name
from convsim_init.layers.weights import ComputedWeight, StoredWeight, Weight

CALLS = re.compile(r"aten::conv(_transpose)?[123]d|aten::_?convolution(_mode)?|prim::mkldnn_convolution")
WEIGHT = 1  # position of the weight among the arguments of these calls
FROZEN_NAME = re.compile(r"(?:self\.)?(.*?weight)(?:_fused_bn)?(?:_mkldnn)?")  # constant that was a parameter


def graph_layers(name: str, module: nn.Module) -> list[Layer]:
    """The convolutions that a module's own graph calls, each once; none if it has no graph.

    A call is a layer if its weight is a parameter called ``weight``, is computed from one, or is a constant, which
    freezing makes of parameters. Other calls, such as those with fixed filters, are no layers.
    """
    found: dict[str, Layer] = {}
    for operator, path, weight, arguments in _calls(module):
        owner, _, attribute = f".{path}".rpartition(".")
        layer_name = f"{name}{bare_name(owner)}".removeprefix(".")
        if attribute == "weight" and layer_name not in found:
            found[layer_name] = _layer(layer_name, operator, weight, arguments)
    return list(found.values())


def _layer(name: str, operator: str, weight: Weight, arguments: Sequence[Any]) -> Layer:
    either = operator in ("aten::convolution", "aten::_convolution")  # an argument says whether they are transposed
    transposed = bool(arguments[6]) if either else "transpose" in operator
    groups = arguments[8 if either else 6]
    if not isinstance(groups, int):
        groups, weight = 1, ComputedWeight(weight.sources[0], None, "its graph computes the number of groups")
    # The shape of a computed weight is that of its source here, which may be a matrix.
    kind = f"Conv{'Transpose' if transposed else ''}{max(len(weight.shape) - 2, 1)}d"
    return Layer(name, kind, weight, groups=groups, transposed=transposed)


def _calls(module: nn.Module) -> Iterator[tuple[str, str, Weight, Sequence[Any]]]:
    """The operator of each call, the path of its weight, the weight, and all arguments."""
    if isinstance(module, torch.jit.ScriptModule) and hasattr(module, "forward"):
        graph = module.inlined_graph  # this reference keeps its nodes alive
        for node in _script_nodes(graph):
            if CALLS.fullmatch(node.kind()):
                source = node.inputsAt(WEIGHT).node()
                found = _constant(source) or _parameter(module, source, _script_node)
                yield node.kind(), *found, [value.toIValue() for value in node.inputs()]
    elif isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if CALLS.fullmatch(operator := _operator(node)):
                # Arguments may be given by name, or be left out if they have defaults.
                schema = node.target._schema.arguments
                given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
                arguments = [given.get(argument.name, argument.default_value) for argument in schema]
                yield operator, *_parameter(module, arguments[WEIGHT], _exported_node), arguments


def _parameter(module: nn.Module, source: Any, look: Callable[[Any], tuple[str, list[Any]]]) -> tuple[str, Weight]:
    """Path and weight of the nearest parameter called ``weight`` that a node is or is computed from; or no path."""
    pending = [source]
    for node in pending:  # grows in the loop
        path, inputs = look(node)
        if path.rpartition(".")[2] == "weight":
            tensor: Any = reduce(getattr, path.split("."), module)
            reason = "its graph computes the weight: initialize the model that the graph was made from"
            return path, StoredWeight(tensor) if node is source else ComputedWeight(tensor, None, reason)
        pending += [before for before in inputs if before not in pending]
    return "", StoredWeight(torch.empty(()))


def _constant(node: Any) -> tuple[str, Weight] | None:
    if "Constant" not in node.kind():
        return None
    tensor, name = node.t("value"), node.output().debugName()
    dense = tensor.to_dense() if tensor.is_mkldnn else tensor
    known = FROZEN_NAME.fullmatch(name)
    reason = "a constant of its graph: initialize the model before it is frozen"
    return known[1] if known else f"constant_{name}.weight", ComputedWeight(dense, lambda: dense, reason)


def _script_nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _script_nodes(inner)


def _script_node(node: Any) -> tuple[str, list[Any]]:
    """The path of the attribute that a node reads, empty if it reads none; and the nodes of its inputs."""
    names, inputs = list[str](), [value.node() for value in node.inputs()]
    # What another convolution is computed from are weights of other layers.
    if CALLS.fullmatch(node.kind()):
        return "", []
    while node.kind() == "prim::GetAttr":
        names.insert(0, node.s("name"))
        node = node.inputsAt(0).node()
    return ".".join(names), inputs


def _exported_node(node: Any) -> tuple[str, list[Any]]:
    """The same as `_script_node` for a node of an exported program."""
    if CALLS.fullmatch(_operator(node)):
        return "", []
    return str(node.target) if node.op == "get_attr" else "", node.all_input_nodes


def _operator(node: Any) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", "")
