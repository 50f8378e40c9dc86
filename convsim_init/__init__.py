"""Start a convolutional network from filters that look at the input in as different ways as they can.

The method is arXiv 2411.03226. Importing this package loads nothing heavy; torch comes with the first name used.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # to type checkers it is true; that of `typing` takes as long to import as all the rest here

if TYPE_CHECKING:
    from convsim_init.checkpoint.load import load_checkpoint
    from convsim_init.checkpoint.load_report import LoadReport
    from convsim_init.checkpoint.save import save_checkpoint
    from convsim_init.context import initializing
    from convsim_init.errors import InputError, RunError
    from convsim_init.functional.similarity import convolutional_similarity
    from convsim_init.initialize import convsim_, initialize_
    from convsim_init.metrics.measure import measure
    from convsim_init.metrics.observed import measure_feature_correlation
    from convsim_init.models.build import build_model
    from convsim_init.models.zoo.catalog import UnknownModelError
    from convsim_init.regularizer import ConvolutionalSimilarity
    from convsim_init.report.report import LayerReport, Outcome, Report
    from convsim_init.schemes.calibrate import calibrate_
    from convsim_init.schemes.draw import draw_base_
    from convsim_init.settings import Settings
    from convsim_init.version import __version__

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

__all__ = [
    "ConvolutionalSimilarity",
    "InputError",
    "LayerReport",
    "LoadReport",
    "Outcome",
    "Report",
    "RunError",
    "Settings",
    "UnknownModelError",
    "__version__",
    "build_model",
    "calibrate_",
    "convolutional_similarity",
    "convsim_",
    "draw_base_",
    "initialize_",
    "initializing",
    "load_checkpoint",
    "measure",
    "measure_feature_correlation",
    "save_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
