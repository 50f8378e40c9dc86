"""Start a convolutional network from filters that look at the input in as different ways as they can.

The method is arXiv 2411.03226. Importing this package loads nothing heavy; torch comes with the first name used.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # to type checkers it is true; that of `typing` takes as long to import as all the rest here

if TYPE_CHECKING:
    from convsim_init.checkpoint.load import load_checkpoint as load_checkpoint
    from convsim_init.checkpoint.load_report import LoadReport as LoadReport
    from convsim_init.checkpoint.save import save_checkpoint as save_checkpoint
    from convsim_init.context import initializing as initializing
    from convsim_init.errors import InputError as InputError
    from convsim_init.errors import RunError as RunError
    from convsim_init.functional.similarity import convolutional_similarity as convolutional_similarity
    from convsim_init.initialize import convsim_ as convsim_
    from convsim_init.initialize import initialize_ as initialize_
    from convsim_init.metrics.measure import measure as measure
    from convsim_init.metrics.observed import measure_feature_correlation as measure_feature_correlation
    from convsim_init.models.build import build_model as build_model
    from convsim_init.models.zoo.catalog import UnknownModelError as UnknownModelError
    from convsim_init.regularizer import ConvolutionalSimilarity as ConvolutionalSimilarity
    from convsim_init.report.report import LayerReport as LayerReport
    from convsim_init.report.report import Outcome as Outcome
    from convsim_init.report.report import Report as Report
    from convsim_init.schemes.calibrate import calibrate_ as calibrate_
    from convsim_init.schemes.draw import draw_base_ as draw_base_
    from convsim_init.settings import Settings as Settings
    from convsim_init.version import __version__ as __version__

_HOMES = {
    "ConvolutionalSimilarity": "regularizer",
    "InputError": "errors",
    "LayerReport": "report.report",
    "LoadReport": "checkpoint.load_report",
    "Outcome": "report.report",
    "Report": "report.report",
    "RunError": "errors",
    "Settings": "settings",
    "UnknownModelError": "models.zoo.catalog",
    "__version__": "version",
    "build_model": "models.build",
    "calibrate_": "schemes.calibrate",
    "convolutional_similarity": "functional.similarity",
    "convsim_": "initialize",
    "draw_base_": "schemes.draw",
    "initialize_": "initialize",
    "initializing": "context",
    "load_checkpoint": "checkpoint.load",
    "measure": "metrics.measure",
    "measure_feature_correlation": "metrics.observed",
    "save_checkpoint": "checkpoint.save",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
