"""Parsing the spec of a model into its parts, without importing torch or running any code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ntpath import splitdrive
from os.path import isfile
from pathlib import Path

from convsim_init.errors import InputError
from convsim_init.files.sources import READ_SUFFIXES, downloaded_first, is_address
from convsim_init.models.zoo import catalog
from convsim_init.report.text import did_you_mean

FORMS = "a model's name, torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory"
CONFIG = "config.json"  # in a folder of a model of Hugging Face


class Source(str, Enum):
    """Where a model comes from."""

    BUILT_IN = "built-in"
    ANY = "any"  # the first installed library that has a model of this bare name
    TORCHVISION = "torchvision"
    TIMM = "timm"
    MODULE = "module"  # a factory in a module that can be imported
    FILE = "file"  # a factory in a Python file
    CHECKPOINT = "checkpoint"  # a file of weights
    TRANSFORMERS = "transformers"  # a class of transformers
    HUB = "hf-hub"  # a config in the local cache of Hugging Face
    FOLDER = "folder"  # a folder with a config of Hugging Face


LIBRARIES = (Source.TORCHVISION, Source.TIMM)
NAMED = (*LIBRARIES, Source.TRANSFORMERS, Source.HUB)  # their values stand before a colon
DESCRIBED = (Source.TRANSFORMERS, Source.HUB, Source.FOLDER)


@dataclass(frozen=True)
class Spec:
    """A parsed spec."""

    text: str  # as the user wrote it
    source: Source
    place: str  # the module or the path; empty for other sources
    name: str  # of the model or the factory, which may be dotted
    remark: str | None = None  # for the user, on where the model was found


def parse(text: str) -> Spec:
    """The parts of a spec; an `InputError` if it is not of one of the forms."""
    if not text:
        raise _refused(text, "name one")
    place, colon, name = text.rpartition(":")
    library = next((source for source in NAMED if text.startswith(f"{source.value}:")), None)
    if library is not None:
        name = text.partition(":")[2]
        if not name:
            raise _refused(text, f"name a model: {text}NAME")
        return Spec(text, library, "", name)
    if is_address(text):
        raise downloaded_first(text)
    if Path(text).suffix in READ_SUFFIXES and not isfile(Path(text, CONFIG)):
        return Spec(text, Source.CHECKPOINT, text, "")
    # Before folders, which may be called like a built-in model.
    if text in catalog.MODELS:
        return Spec(text, Source.BUILT_IN, "", text)
    if isfile(Path(text, CONFIG)):
        return Spec(text, Source.FOLDER, text, "")
    if text.endswith(".py") and ":" not in splitdrive(text)[1]:  # a drive of Windows has one
        raise _refused(text, f"name the function in it that returns the model: {text}:FUNCTION")
    if not colon:
        owner, slash, name = text.partition("/")
        if slash and owner in [source.value for source in LIBRARIES]:
            raise _refused(text, f"write {owner}:{name.partition('.')[0]}; weights are drawn anew, never downloaded")
        return Spec(text, Source.ANY, "", text)
    if not _is_dotted_name(name):
        library_meant = did_you_mean(place, (source.value for source in NAMED))
        raise _refused(text, f"after the colon stands the name of a function or class{library_meant}")
    if place.endswith(".py"):
        return Spec(text, Source.FILE, place, name)
    if _is_dotted_name(place):
        return Spec(text, Source.MODULE, place, name)
    raise _refused(text, "before the colon stands a module's name or a path that ends in .py")


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _refused(text: str, advice: str) -> InputError:
    return InputError(f"expected {FORMS}, got {text!r}: {advice}")
