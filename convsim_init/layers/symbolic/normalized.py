"""Which channels are compared: it depends on whether a normalization follows before another layer.

That is told by forward passes on unknown values, which need no input.
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
NEAR = 300  # calls in which a value is computed from a statistic and from what that is of
ENDS: dict[str, set[bool | None]]  # of ways into the calls of modules, by what they count as
ENDS = {kinds.NORMALIZED: {True}, kinds.USED: {False}, kinds.FUSED: {False}, kinds.PASSED: set(), kinds.UNKNOWN: {None}}
NOT_NORMALIZED = "channels all: no normalization follows"
NOT_TOLD = "channels matched: whether a normalization follows could not be told"


def decide_channels(layers: Layers, settings: Settings) -> tuple[dict[str, tuple[Settings, str | None]], list[str]]:
    """The settings of each layer, with its channels matched or all; and what is to be said of the model.

    With ``channels="auto"`` all are compared where no normalization follows. Depthwise layers, which
    have no pairs of filters with matched channels, are left with none.

    Returns:
        The settings of the layers to treat by their names, each with the reason for its channels where
        it is not that a normalization follows; and remarks on the model.
    """
    if settings.channels != "auto":
        return {layer.name: (settings, None) for layer in layers}, []
    told = None if layers.followed is None else normalization_follows(layers.followed)
    decided: dict[str, tuple[Settings, str | None]] = {}
    for layer in (one for one in layers if one.obstacle is None):
        by_itself = not layer.name  # what it is used in is not there to be asked
        normalized = True if told is None or by_itself else told.get(layer.name)
        if normalized is False and layer.filters > 1:
            decided[layer.name] = replace(settings, channels="all"), NOT_NORMALIZED
        else:
            decided[layer.name] = replace(settings, channels="matched"), NOT_TOLD if normalized is None else None
    return decided, [] if told is not None else [f"{NOT_TOLD} from a state dict: the model itself tells it"]


def normalization_follows(followed: Followed) -> dict[str, bool]:
    """Of each convolution whether a normalization follows on every way to another layer or to the output.

    Activations, pooling, sums and concatenations on the way do not count. Left out are layers of which it cannot be
    told: those whose output leaves a part of the model, where the whole cannot be run, and a model that is a
    convolution itself, since what it is used in is not known.
    """
    told = dict[str, set[bool | None]]()
    for nodes, whole in followed.runs:
        told = ends_of_layers(nodes, followed, whole=whole) | told  # the first run that called a layer counts
    # One way without a normalization settles it, whatever is not known of the others.
    known = {name: False not in ends for name, ends in told.items() if False in ends or ends == {True}}
    return {bare_name(name): follows for name, follows in known.items() if name}


def ends_of_layers(nodes: Sequence[Node], followed: Followed, *, whole: bool) -> dict[str, set[bool | None]]:
    """How the ways end that begin at each layer: normalized, used without it, or not known."""
    ends: defaultdict[Node, set[bool | None]] = defaultdict(set)
    layers: defaultdict[str, set[bool | None]] = defaultdict(set)
    for node in reversed(nodes):  # after all that use it
        for name in followed.layers(node):
            layers[name] |= {True} if node.name == kinds.FUSED else ends[node]
        for before in () if node.name in kinds.SHAPES else node.inputs:
            ends[before] |= _end(node, whole=whole) or ends[node]
    return layers


def _end(node: Node, *, whole: bool) -> set[bool | None]:
    """How a way through a model ends in a call; empty if it goes on."""
    if node.name == OUTPUT:
        return {False if whole else None}
    if node.module is not None:
        return ENDS[node.name]
    if node.name in NORMALIZING or _divides_by_a_statistic(node):
        return {True}
    learned = node.name in kinds.PRODUCTS and (node.learned or any(map(_is_learned, node.inputs)))
    return {False} if learned or node.name in kinds.USING else set()


def _divides_by_a_statistic(node: Node) -> bool:
    """Whether it divides by a statistic of what the other factor is computed from, as in ``x / x.std()``."""
    if node.name not in kinds.MULTIPLYING | DIVIDING or len(node.inputs) < 2:
        return False
    factors = [origins(one, NEAR) for one in node.inputs]
    # In a product either factor may be the inverse, in a quotient only what is below.
    if node.name in kinds.MULTIPLYING:
        pairs = [(one, other) for one, other in permutations(factors, 2) if any(map(_is_inverse, other))]
    else:
        pairs = [(factors[0], factors[1])]
    return any(one & other and any(origin.name in STATISTICS for origin in other) for one, other in pairs)


def _is_inverse(node: Node) -> bool:
    """Whether it is a number or a parameter over a value."""
    of_a_parameter = node.name in DIVIDING and bool(node.learned) and len(node.inputs) == 1
    return of_a_parameter or node.name in ("rsqrt", "reciprocal")


def _is_learned(node: Node) -> bool:
    """Whether a value is computed from parameters alone."""
    return all(one.module is None and (one.inputs or one.learned) for one in origins(node))
