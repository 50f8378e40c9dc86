"""Why a layer is left alone: a sentence for people, and its cause for code to compare."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple


class Cause(Enum):
    """What leaves a layer alone."""

    UNTREATABLE = auto()  # its weight cannot be set or lowered, or was treated already
    FROZEN = auto()
    UNSELECTED = auto()  # by the patterns of this call
    UNSELECTED_BEFORE = auto()  # by those of an earlier call
    BUILT_ELSEWHERE = auto()
    LOADED = auto()
    RECEIVED = auto()  # from another process, perhaps


# Of layers that could be treated. Where a copy of one is, they part.
KEPT = (Cause.FROZEN, Cause.UNSELECTED, Cause.UNSELECTED_BEFORE, Cause.BUILT_ELSEWHERE, Cause.LOADED)


class Obstacle(NamedTuple):
    """Why a layer is left alone."""

    text: str  # as a report prints it; details and advice follow a colon
    cause: Cause = Cause.UNTREATABLE
    twin: str = ""  # the layer that the weight was seen in before, with which the text ends
