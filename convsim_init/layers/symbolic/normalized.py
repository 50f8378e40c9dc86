"""Which channels are compared in each layer: all of them, unless a normalization follows before the next layer.

Symbolic forward passes, which need no input, show whether one follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

from convsim_init.layers.layer import Layers
from convsim_init.layers.names import bare_name
from convsim_init.layers.symbolic import kinds
from convsim_init.layers.symbolic.follow import Followed, origins
from convsim_init.layers.symbolic.passes import OUTPUT
from convsim_init.layers.symbolic.symbols import Node
from convsim_init.settings import Settings

NORMALIZING = {f"{kind}_norm" for kind in ("batch", "layer", "group", "instance", "rms")}  # names of functions
NORMALIZING |= {"native_batch_norm", "native_layer_norm", "native_group_norm", "normalize"}
STATISTICS = {"var", "std", "var_mean", "std_mean", "sqrt", "rsqrt", "norm", "vector_norm"}
STATISTICS |= {"linalg_norm", "linalg_vector_norm"}
DIVIDING = {"div", "divide", "truediv", "true_divide"}
NEAR = 300  # calls that are searched for a statistic and its operand
# Whether a path that leads into the call of a module is normalized there, by what the call counts as; None: unknown.
ENDS: dict[str, set[bool | None]]
ENDS = {kinds.NORMALIZED: {True}, kinds.USED: {False}, kinds.FUSED: {False}, kinds.PASSED: set(), kinds.UNKNOWN: {None}}
NOT_NORMALIZED = "channels all: no normalization follows"
NOT_TOLD = "channels matched: whether a normalization follows could not be told"


def decide_channels(layers: Layers, settings: Settings) -> tuple[dict[str, tuple[Settings, str | None]], list[str]]:
    """The settings of the layers to treat, by name, each with the reason for its channels; and remarks on the model.

    With ``channels="auto"`` all channels are compared where no normalization follows, else matched ones, for which no
    reason is given. Layers with one filter a group, such as depthwise ones, keep matched channels, and have no pairs.
    """
    if settings.channels != "auto":
        return {layer.name: (settings, None) for layer in layers}, []
    normalized_by_layer = None if layers.followed is None else normalization_follows(layers.followed)
    decided: dict[str, tuple[Settings, str | None]] = {}
    for layer in (candidate for candidate in layers if candidate.obstacle is None):
        by_itself = not layer.name  # the model is a single convolution, and its surroundings are unknown
        normalized = True if normalized_by_layer is None or by_itself else normalized_by_layer.get(layer.name)
        if normalized is False and layer.filters > 1:
            decided[layer.name] = replace(settings, channels="all"), NOT_NORMALIZED
        else:
            decided[layer.name] = replace(settings, channels="matched"), NOT_TOLD if normalized is None else None
    remark = f"{NOT_TOLD} from a state dict: the model itself tells it"
    return decided, [remark] if normalized_by_layer is None else []


def normalization_follows(followed: Followed) -> dict[str, bool]:
    """For each convolution, by name, whether a normalization follows on every path to another layer or to the output.

    Activations, pooling, sums and concatenations do not end a path. Layers for which it is unknown are left out: those
    whose output leaves a part of the model that cannot be run as a whole, and a model that is a convolution itself.
    """
    ends_by_layer = dict[str, set[bool | None]]()
    for nodes, whole in followed.runs:
        # Entries on the right go first, so the first run that called a layer counts.
        ends_by_layer = ends_of_layers(nodes, followed, whole=whole) | ends_by_layer
    # A single path without a normalization decides it, even if other paths are unknown.
    known = {name: False not in ends for name, ends in ends_by_layer.items() if False in ends or ends == {True}}
    return {bare_name(name): follows for name, follows in known.items() if name}


def ends_of_layers(nodes: Sequence[Node], followed: Followed, *, whole: bool) -> dict[str, set[bool | None]]:
    """How the paths end that begin at each layer: normalized (True), used without that (False), or unknown (None)."""
    ends: defaultdict[Node, set[bool | None]] = defaultdict(set)
    layers: defaultdict[str, set[bool | None]] = defaultdict(set)
    for node in reversed(nodes):  # a node comes after all that use it
        for name in followed.layers(node):
            layers[name] |= {True} if node.name == kinds.FUSED else ends[node]
        for before in () if node.name in kinds.SHAPES else node.inputs:
            ends[before] |= _end(node, whole=whole) or ends[node]
    return layers


def _end(node: Node, *, whole: bool) -> set[bool | None]:
    """How a path through a model ends in a call; empty if it goes on."""
    if node.name == OUTPUT:
        return {False if whole else None}
    if node.module is not None:
        return ENDS[node.name]
    if node.name in NORMALIZING or _divides_by_a_statistic(node):
        return {True}
    learned = node.name in kinds.PRODUCTS and (node.learned or any(map(_is_learned, node.inputs)))
    return {False} if learned or node.name in kinds.USING else set()


def _divides_by_a_statistic(node: Node) -> bool:
    """Whether a call divides by a statistic of what its other operand is computed from, as in ``x / x.std()``."""
    if node.name not in kinds.MULTIPLYING | DIVIDING or len(node.inputs) < 2:
        return False
    operands = [origins(before, NEAR) for before in node.inputs]
    # In a product either factor may be the inverse, in a quotient only the denominator.
    if node.name in kinds.MULTIPLYING:
        pairs = [(a, b) for a, b in permutations(operands, 2) if any(map(_is_inverse, b))]
    else:
        pairs = [(operands[0], operands[1])]
    return any(a & b and any(origin.name in STATISTICS for origin in b) for a, b in pairs)


def _is_inverse(node: Node) -> bool:
    """Whether a call divides a number or a parameter by a value."""
    of_a_parameter = node.name in DIVIDING and bool(node.learned) and len(node.inputs) == 1
    return of_a_parameter or node.name in ("rsqrt", "reciprocal")


def _is_learned(node: Node) -> bool:
    """Whether a value is computed from parameters alone."""
    return all(origin.module is None and (origin.inputs or origin.learned) for origin in origins(node))
