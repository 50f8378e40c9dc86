"""Models that transformers or timm builds from a config of Hugging Face. Nothing is downloaded.

Each library is imported only when one of its models is asked for.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsim_init.errors import InputError
from convsim_init.models.libraries import import_errors, require
from convsim_init.models.spec import CONFIG, Source, Spec
from convsim_init.models.user_code import user_errors
from convsim_init.report.text import did_you_mean, error_text, quoted, shown

if TYPE_CHECKING:
    import torch

ENTRIES = {"num_classes": "num_labels", "in_chans": "num_channels"}  # arguments by their names in transformers' configs
MODEL_CLASS = re.compile(r"(Model|Backbone)$|For[A-Z]")  # in names of transformers
# Entries of timm's configs that describe pretrained weights.
TRAINED_ENTRIES = ("tag", "license", "origin_url", "paper_ids", "label_names", "label_descriptions")


def check_described(spec: Spec) -> None:
    """Refuse a model whose library or config is missing, without importing torch."""
    package = "huggingface_hub" if spec.source is Source.HUB else "transformers"
    if spec.source is Source.FOLDER and "model_type" not in _read(Path(spec.place)):
        package = "timm"
    require(package, spec.text, package)


def find_described(spec: Spec) -> Callable[[Mapping[str, object]], torch.nn.Module]:
    """The function that builds a model, without pretrained weights, from arguments that override those of its config.

    Raises:
        InputError: If there is no such class or config, or its library cannot be imported.
    """
    if spec.source is Source.TRANSFORMERS:
        found = _transformers_class(spec.name, spec.text)
        if getattr(found, "config_class", None) is None:
            classes = {name for name in dir(_load("transformers", spec.text)) if MODEL_CLASS.search(name)} - {spec.name}
            alike = f": did you mean hf-hub:{spec.name}?" if "/" in spec.name else did_you_mean(spec.name, classes)
            raise InputError(
                f"expected a model's class of transformers with a config, such as ResNetModel, got {quoted(spec.name)}"
                f"{alike}"
            )
        return partial(_build_transformers, spec.text, found, found.config_class)
    folder = _cached(spec) if spec.source is Source.HUB else Path(spec.place)
    if "model_type" in _read(folder):
        transformers = _load("transformers", spec.text)
        with user_errors(spec.text):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = next(iter(config.architectures or ()), "")
        found = _transformers_class(name, spec.text)
        if found is None:
            raise InputError(
                f"{spec.text}: expected a config that names a class of transformers, got {quoted(name)}: write it into "
                f'{CONFIG}, such as "architectures": ["ResNetForImageClassification"]'
            )
        return partial(_build_transformers, spec.text, found, partial(_changed, config))
    return partial(_build_timm, spec.text, _load("timm", spec.text), folder)


def describe(model: torch.nn.Module) -> str:
    """The content of a ``config.json`` from which transformers or timm builds the model again.

    Raises:
        InputError: If the model is of neither library, or lacks what a config needs, such as timm's feature extractors.
    """
    try:
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_json_string"):
            config.architectures = [type(model).__name__]
            return str(config.to_json_string())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, CONFIG)
            import_module("timm.models._hub").save_config_for_hf(model, path)
            described = json.loads(path.read_bytes())
        described["pretrained_cfg"] = {k: v for k, v in described["pretrained_cfg"].items() if k not in TRAINED_ENTRIES}
        described.get("model_args", {}).pop("num_classes", None)  # a top-level entry, too: it would be passed twice
        return json.dumps(described, indent=2) + "\n"
    except Exception as error:  # whatever the library or the model raises
        raise InputError(
            f"expected a model of timm or transformers for a folder, got {shown(type(model).__name__)}, which cannot "
            f"be described: {error_text(error)}: write a .safetensors file, or take the whole model from timm"
        ) from error


def _build_transformers(
    text: str, kind: Callable[..., torch.nn.Module], configure: Callable[..., Any], arguments: Mapping[str, object]
) -> torch.nn.Module:
    named = {ENTRIES.get(name, name): value for name, value in arguments.items()}
    with user_errors(text):
        known = configure()
    # A config silently takes any argument.
    unknown = [name for name in named if not hasattr(known, name)]
    if unknown:
        raise InputError(f"{text}: expected an entry of its config, got {shown(unknown[0])}: leave it out")
    with user_errors(text):
        config: Any = configure(**named)
        parts: list[Any] = [config, getattr(config, "backbone_config", None)]
        for part in parts:
            if getattr(part, "use_pretrained_backbone", False):
                part.use_pretrained_backbone = False  # or it would be downloaded
        return kind(config)


def _changed(config: Any, **arguments: object) -> Any:
    # transformers warns if the labels are more or fewer than `num_labels`.
    labels = ("id2label", "label2id") if "num_labels" in arguments else ()
    entries = {name: value for name, value in config.to_dict().items() if name not in labels}
    return type(config).from_dict(entries | arguments)


def _build_timm(text: str, timm: Any, folder: Path, arguments: Mapping[str, object]) -> torch.nn.Module:
    with user_errors(text):
        model: torch.nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False, **arguments)
        return model


def _cached(spec: Spec) -> Path:
    hub = _load("huggingface_hub", spec.text)
    with user_errors(spec.text):
        path = hub.try_to_load_from_cache(spec.name, CONFIG)
    if not isinstance(path, str):
        raise InputError(
            f"expected a model whose config is in the local cache of Hugging Face, got {quoted(spec.text)}: nothing is "
            f"downloaded here; run `hf download {shown(spec.name)} {CONFIG}` first"
        )
    return Path(path).parent


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error_text(error)}") from error
    if not isinstance(content, dict) or not {"model_type", "architecture"} & content.keys():
        raise InputError(f"expected the config of a model of transformers or timm, got {str(path)!r}, which is neither")
    return content


def _load(package: str, text: str) -> Any:
    require(package, text, package)
    with import_errors(package):
        return import_module(package)


def _transformers_class(name: str, text: str) -> Any:
    transformers = _load("transformers", text)
    with import_errors("transformers"):  # this imports the module of the class
        return getattr(transformers, name, None)
