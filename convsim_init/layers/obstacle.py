"""Why a layer is left alone: a sentence for people, and its cause for code to compare."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple


class Cause(Enum):
    """The cause of an obstacle."""

    UNTREATABLE = auto()  # the weight cannot be set, its similarity cannot be lowered, or it was treated before
    FROZEN = auto()
    UNSELECTED = auto()  # by the patterns of this call
    UNSELECTED_BEFORE = auto()  # by the patterns of an earlier call
    BUILT_ELSEWHERE = auto()
    LOADED = auto()
    RECEIVED = auto()  # from another process, perhaps


# Causes that leave a treatable layer as it is. It is no longer equal to a copy of it that is treated.
KEPT = (Cause.FROZEN, Cause.UNSELECTED, Cause.UNSELECTED_BEFORE, Cause.BUILT_ELSEWHERE, Cause.LOADED)


class Obstacle(NamedTuple):
    """Why a layer is left alone."""

    text: str  # as a report prints it; details and advice follow a colon
    cause: Cause = Cause.UNTREATABLE
    twin: str = ""  # name of the layer that had the weight before; the text ends with it
