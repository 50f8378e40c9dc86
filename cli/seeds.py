"""Seeds as a user types them: ``0:100`` or ``0,3,5``."""

from __future__ import annotations

import re

from convsim_init.errors import InputError

LARGEST = 2**63 - 1  # that torch takes
MOST = 100_000  # in one command


def parse_seeds(text: str) -> list[int]:
    """The seeds, in the order given; ``0:4`` is 0, 1, 2 and 3, as in a slice.

    Args:
        text: Whole numbers and ranges, with commas between them.

    Raises:
        InputError: If it is not of that form, a seed is too large or there twice, or there are none or far too many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,19})(?::([0-9]{1,19}))?\s*", part)
        if found is None:
            raise InputError(f"--seeds: expected whole numbers such as 0,3,5 or a range such as 0:100, got {text!r}")
        first, end = int(found[1]), int(found[2] or found[1]) + (found[2] is None)
        if end <= first or end - 1 > LARGEST:
            raise InputError(
                f"--seeds: expected a range that rises and ends by {LARGEST}, got {part.strip()!r}: its end is left out"
            )
        if len(seeds) + end - first > MOST:
            raise InputError(f"--seeds: expected at most {MOST} seeds, got more in {text!r}: use several commands")
        seeds += range(first, end)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds: expected each seed once, got {text!r}: leave out what is there twice")
    return seeds
