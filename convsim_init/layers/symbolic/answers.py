"""What code is told that asks for a truth, a number or a length of an unknown value, and tries again with another."""

from __future__ import annotations

import dis
import os
import sys
import traceback
from collections.abc import Hashable, Iterable
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType

import torch

ELSEWHERE = tuple(str(path) + os.sep for path in (Path(__file__).parent, Path(torch.__file__).parent))
MOST = 64  # dimensions of a tensor of PyTorch

Place = tuple[CodeType, int]  # code, and the position in it


class Answers:
    """What code was answered in one run of it, and may be answered in the next.

    Args:
        proven: The last answers, by the place in the code that asked, with which code came to its end; kept up to date.
    """

    def __init__(self, proven: dict[Place, int]) -> None:
        self.proven = proven
        self._given: list[tuple[Place, list[int]]] = []  # the places and the answers that are left, the present first
        self._asked = 0
        self._ranks: dict[Hashable, int] = {}

    def rank(self, value: Hashable, choices: Iterable[int], added: int = 0) -> int:
        """The number of dimensions of a value, always the same unless the code unpacks another number of sizes.

        Where some were added to those of another value, that one's number is what is known or answered. As in PyTorch
        it is an error if there are none left to take away, or too many: loops end, by another answer.
        """
        count, more = unpacked(*_place(sys._getframe(1)))
        # One value is what is told where nothing is unpacked, and a starred name takes any number.
        unpacks = count > 1 and not more
        self._ranks[value] = count - added if unpacks else self._ranks.get(value) or self.give(*choices)
        rank = self._ranks[value] + added
        if not 0 <= rank <= MOST:
            raise IndexError(f"{rank} dimensions")
        return rank

    def give(self, *choices: int) -> int:
        """The answer to the next question."""
        place = _place(sys._getframe(1))
        # After another answer code may go another way: then what it was asked there is out of date.
        if [place] != [one for one, _ in self._given[self._asked : self._asked + 1]]:
            del self._given[self._asked :]
            proven = self.proven.get(place)
            # False sorts before True: what was proven comes first, the rest in its order.
            self._given.append((place, sorted(choices, key=lambda one: one != proven)))
        self._asked += 1
        return self._given[self._asked - 1][1][0]

    def change(self, error: BaseException) -> bool:
        """Begin again with another answer; False if none is left.

        It is the last question that has one which is changed, of those that the failing function asked if there are.
        """
        self._asked = 0
        self._ranks.clear()
        code = _place([frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1])[0]
        open_ = [index for index, (_, answers) in enumerate(self._given) if len(answers) > 1]
        if not open_:
            return False
        index = next((one for one in reversed(open_) if self._given[one][0][0] is code), open_[-1])
        del self._given[index][1][0], self._given[index + 1 :]
        return True

    def prove(self) -> None:
        """Note that code came to its end with the present answers."""
        self.proven.update((place, answers[0]) for place, answers in self._given)


def _place(frame: FrameType) -> Place:
    """Where a model's code is that runs in a frame, or has called what does."""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ELSEWHERE):
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


@lru_cache(maxsize=10_000)
def unpacked(code: CodeType, position: int) -> tuple[int, bool]:
    """How many values are unpacked at a position or right after it, and whether more may be.

    They are 2 of ``height, width = x.shape``; 1 where nothing is unpacked.
    """
    for step in dis.get_instructions(code):
        if step.offset >= position:
            if step.opname == "UNPACK_SEQUENCE":
                return int(step.argval), False
            if step.opname == "UNPACK_EX":
                return int(step.argval & 255) + int(step.argval >> 8), True
            if step.offset > position:
                break
    return 1, False
