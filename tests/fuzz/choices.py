"""Coverage-guided fuzzing of what a user chooses: model names, patterns of layer names, settings, paths to write.

    pip install atheris && python tests/fuzz/choices.py [options of libFuzzer, such as -runs=1000000]

Each choice is accepted or refused by an InputError of one line; nothing is written and nothing else is raised.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["convsim_init", "fnmatch"]):
    from convsim_init.cli.arguments import parse_arguments
    from convsim_init.cli.runs.plan import fill, parse_seeds
    from convsim_init.errors import InputError
    from convsim_init.files.sources import check_source
    from convsim_init.files.writing import check_target
    from convsim_init.initialize import plan
    from convsim_init.models.spec import parse
    from convsim_init.report.table import as_csv
    from convsim_init.report.text import alternatives, shown
    from convsim_init.settings import CHANNELS, NORMS, OPTIMIZERS, PAIRS, Settings

from torch import nn

MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(4, 2, 1)))


def one_of(data: atheris.FuzzedDataProvider, choices: Sequence[str]) -> str:
    return data.PickValueInList([*choices, data.ConsumeUnicode(8)])


def settings(data: atheris.FuzzedDataProvider) -> None:
    Settings(
        pairs=one_of(data, PAIRS),
        channels=one_of(data, CHANNELS),
        norm=one_of(data, NORMS),
        optimizer=one_of(data, OPTIMIZERS),
        steps=data.PickValueInList([1, data.ConsumeInt(9), data.ConsumeFloat(), True]),
        tolerance=data.ConsumeFloat(),
        learning_rate=data.ConsumeFloat(),
    )


def patterns(data: atheris.FuzzedDataProvider) -> None:
    include = [data.ConsumeUnicode(40) for _ in range(data.ConsumeIntInRange(0, 2))]
    exclude = [data.PickValueInList(["0", "1.*", data.ConsumeUnicodeNoSurrogates(40)])]
    plan(MODEL, include=include, exclude=exclude)


def spec(data: atheris.FuzzedDataProvider) -> None:
    parse(data.PickValueInList(["", "timm:", "torchvision:", "net.py:"]) + data.ConsumeUnicode(60))


def argument(data: atheris.FuzzedDataProvider) -> None:
    parse_arguments([data.PickValueInList(["", "width="]) + data.ConsumeUnicode(80)])


def target(data: atheris.FuzzedDataProvider) -> None:
    check_target(data.ConsumeUnicode(300) + data.PickValueInList([".pt", ".safetensors", ""]), overwrite=True)


def source(data: atheris.FuzzedDataProvider) -> None:
    check_source(data.ConsumeUnicode(300) + data.PickValueInList([".pt", ".safetensors", ""]))


def many(data: atheris.FuzzedDataProvider) -> None:
    parse_seeds(data.PickValueInList(["", "0:", "1,2,"]) + data.ConsumeUnicode(40))


def pattern(data: atheris.FuzzedDataProvider) -> None:
    fill(data.PickValueInList(["", "{model}"]) + data.ConsumeUnicode(40), model=data.ConsumeUnicode(40), seed=3)


def name(data: atheris.FuzzedDataProvider) -> None:
    text = data.ConsumeUnicode(200)
    assert shown(text).isprintable()
    assert 0 < len(shown(text)) <= 80
    assert alternatives(text, [text, text[::-1]]).isprintable()
    assert as_csv([{"name": text}]).count("\n") == 2


CHOICES: list[Callable[[atheris.FuzzedDataProvider], None]] = [
    *(settings, patterns, spec, argument, target, source),
    *(many, pattern, name),
]


def test_one_input(content: bytes) -> None:
    data = atheris.FuzzedDataProvider(content)
    message = ""
    try:
        data.PickValueInList(CHOICES)(data)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert not os.listdir()


if __name__ == "__main__":
    os.chdir(Path(tempfile.mkdtemp()))
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
