"""Where the models of the census come from: a function for each library, which yields its architectures.

Such a function imports its library when it is called, and raises ImportError where that is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.coverage.sources import classification, diffusion, hugging_face, medical, reinforcement, vision
from benchmarks.coverage.sources.architecture import Architecture as Architecture
from benchmarks.coverage.sources.architecture import Inputs as Inputs

SOURCES: dict[str, Callable[[], Iterable[Architecture]]] = {
    "torchvision": classification.torchvision_models,
    "timm": classification.timm_models,
    "torchvision-tasks": vision.torchvision_tasks,
    "segmentation_models_pytorch": vision.segmentation_models,
    "transformers": hugging_face.transformers_models,
    "diffusers": diffusion.diffusers_models,
    "monai": medical.monai_models,
    "stable_baselines3": reinforcement.stable_baselines3_models,
    "sb3_contrib": reinforcement.sb3_contrib_models,
    "tianshou": reinforcement.tianshou_models,
    "torchrl": reinforcement.torchrl_models,
    "sample_factory": reinforcement.sample_factory_models,
    "pfrl": reinforcement.pfrl_models,
    "cleanrl": reinforcement.cleanrl_models,
}
