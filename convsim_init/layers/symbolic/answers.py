"""Answers to code that asks for the truth, number or length of an unknown value; after an error others are tried."""

from __future__ import annotations

import dis
import os
import sys
import traceback
from collections.abc import Hashable, Iterable
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch

ELSEWHERE = tuple(str(path) + os.sep for path in (Path(__file__).parent, Path(torch.__file__).parent))
MAX_DIMENSIONS = 64  # of a tensor of PyTorch

Place = tuple[CodeType, int]  # code, and the position in it


class _Question(NamedTuple):
    place: Place
    answers: list[int]  # that are left; the first is the present one


class Answers:
    """The answers that one run of some code was given, and those that are left for its next runs.

    Args:
        proven: The last answers with which code came to its end, by the place in it that asked; kept up to date.
    """

    def __init__(self, proven: dict[Place, int]) -> None:
        self.proven = proven
        self._questions: list[_Question] = []
        self._asked = 0  # number of questions in this run
        self._ranks: dict[Hashable, int] = {}

    def rank(self, value: Hashable, choices: Iterable[int], added: int = 0) -> int:
        """The number of dimensions of a value: always the same, unless the code unpacks another number of sizes.

        The number is remembered for `value`, and the value in question has `added` dimensions more. As in PyTorch it is
        an error if there are fewer than 0 or too many, so that loops over dimensions end.
        """
        count, more = unpacked(*_place(sys._getframe(1)))
        # A count of 1 may mean that nothing is unpacked, and a starred name takes any number.
        unpacks = count > 1 and not more
        self._ranks[value] = count - added if unpacks else self._ranks.get(value) or self.give(*choices)
        rank = self._ranks[value] + added
        if not 0 <= rank <= MAX_DIMENSIONS:
            raise IndexError(f"{rank} dimensions")
        return rank

    def give(self, *choices: int) -> int:
        """The answer to the next question."""
        place = _place(sys._getframe(1))
        # After another answer code may take another path, and the questions of the old one are dropped.
        if [place] != [question.place for question in self._questions[self._asked : self._asked + 1]]:
            del self._questions[self._asked :]
            proven = self.proven.get(place)
            # False sorts before True: the proven answer comes first, the rest in its order.
            self._questions.append(_Question(place, sorted(choices, key=lambda answer: answer != proven)))
        self._asked += 1
        return self._questions[self._asked - 1].answers[0]

    def change(self, error: BaseException) -> bool:
        """Prepare the next run, with another answer to one of the questions; False if none is left.

        Backtrack to the last question with an untried answer, preferring those asked by the function that raised.
        """
        self._asked = 0
        self._ranks.clear()
        raised, _ = _place([frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1])
        untried = [index for index, question in enumerate(self._questions) if len(question.answers) > 1]
        if not untried:
            return False
        own = [index for index in untried if self._questions[index].place[0] is raised]
        index = (own or untried)[-1]
        del self._questions[index].answers[0], self._questions[index + 1 :]
        return True

    def prove(self) -> None:
        """Note that code came to its end with the present answers."""
        self.proven.update((question.place, question.answers[0]) for question in self._questions)


def _place(frame: FrameType) -> Place:
    """The place in the model's code that runs in a frame or, if that is a library's, has called it."""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ELSEWHERE):
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


@lru_cache(maxsize=10_000)
def unpacked(code: CodeType, position: int) -> tuple[int, bool]:
    """How many values are unpacked at a position or right after it, and whether a starred name takes more.

    The count is 2 for ``height, width = x.shape``, and 1 where nothing is unpacked.
    """
    for instruction in dis.get_instructions(code):
        if instruction.offset >= position:
            if instruction.opname == "UNPACK_SEQUENCE":
                return int(instruction.argval), False
            if instruction.opname == "UNPACK_EX":
                return int(instruction.argval & 255) + int(instruction.argval >> 8), True
            if instruction.offset > position:
                break
    return 1, False
