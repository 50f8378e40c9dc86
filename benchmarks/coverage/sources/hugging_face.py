"""The models of transformers that see or hear: of every such type the base class, and those for its tasks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks.coverage.sources.architecture import Architecture, Inputs, noise

TASKS = (
    *("AUDIO_XVECTOR", "BACKBONE", "DEPTH_ESTIMATION", "IMAGE_MATTING", "IMAGE_SEGMENTATION", "IMAGE_TO_IMAGE"),
    *("INSTANCE_SEGMENTATION", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "MASKED_IMAGE_MODELING", "MASK_GENERATION"),
    *("OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "SPEECH_SEQ_2_SEQ", "TABLE_RECOGNITION", "TEXT_RECOGNITION"),
    *("TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "UNIVERSAL_SEGMENTATION", "VIDEO_CLASSIFICATION"),
    "ZERO_SHOT_OBJECT_DETECTION",
)
LARGE = 60e6  # parameters: above, a model has two layers in place of each stack of equal ones
STACKS = {
    *("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers"),
    *("num_encoder_layers", "num_decoder_layers", "num_blocks", "depth"),
}


def transformers_models() -> Iterator[Architecture]:
    from transformers.models.auto import modeling_auto

    tables = [modeling_auto.MODEL_MAPPING_NAMES]
    tables += [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS]
    kinds: dict[str, str] = {}
    seeing = {model_type for table in (*tables[1:], *_processors()) for model_type in table}
    for table in tables:
        for model_type, names in table.items():
            if model_type not in seeing and not model_type.endswith(("vision", "vision_model", "audio", "encoder")):
                continue
            for name in [names] if isinstance(names, str) else names:
                kinds.setdefault(name, model_type)
    for name, model_type in kinds.items():
        yield Architecture(f"transformers:{name}", partial(_build, name, model_type), _inputs)


def _processors() -> Iterator[Mapping[str, object]]:
    """What prepares images, videos and sounds, by the types of the models that take them."""
    from transformers.models.auto import feature_extraction_auto, image_processing_auto, modeling_auto

    yield image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    yield feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING_NAMES
    for task in ("IMAGE", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC"):
        yield getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")


def _build(name: str, model_type: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.CONFIG_MAPPING[model_type]()
    if _is_large(name, model_type):
        _shrink(config)
    return getattr(transformers, name)._from_config(config)


@cache
def _is_large(name: str, model_type: str) -> bool:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(transformers.CONFIG_MAPPING[model_type]())
    return sum(parameter.numel() for parameter in model.parameters()) > LARGE


def _shrink(config) -> None:
    import transformers

    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value)
        elif name in STACKS and isinstance(value, int) and value > 2:
            setattr(config, name, 2)


def _inputs(model: nn.Module) -> Iterator[Inputs]:
    """Arguments by their names: all that are known, then those that come first in the model's own eyes."""
    known = {
        "pixel_values": _images(model.config),
        "pixel_values_videos": _videos(model.config),
        "input_values": [noise(1, 16000), noise(1, 1, 16000), noise(1, 1024, 128)],
        "input_features": _spectrograms(model.config),
        "latents": [noise(1, 512, 16), noise(1, 32, 16), noise(1, 16, 512), noise(1, 16, 32)],
        "input_ids": [torch.arange(2, 10)[None]],
        "decoder_input_ids": [torch.arange(2, 5)[None]],
        "task_inputs": [torch.arange(2, 10)[None]],
        "pixel_mask": [None],
    }
    signature = inspect.signature(model.forward).parameters
    main = model.main_input_name
    for names in (
        [name for name in signature if name in known],
        [main] if isinstance(main, str) else main,
        [name for name in signature if name in (main, "decoder_input_ids")],
        [name for name in signature if name.startswith("pixel_values")],
    ):
        if names and all(name in known for name in names):
            for values in product(*(known[name] for name in names)):
                yield {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _first(config, *names: str):
    """The first of these attributes that the configuration, or one inside it, has."""
    import transformers

    inside = [value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig)]
    for one in (config, *inside):
        for name in names:
            if getattr(one, name, None) is not None:
                return getattr(one, name)
    return None


def _sizes(config) -> list[tuple[int, int]]:
    own = _first(config, "image_size", "img_size", "input_size") or 224
    own = tuple(own)[-2:] if isinstance(own, Sequence) else (own, own)
    return list(dict.fromkeys([(64, 64), own, (224, 224), (256, 256), (48, 320), (512, 512), (1024, 1024)]))


def _images(config) -> list[Tensor]:
    channels = _first(config, "num_channels", "in_channels", "in_chans") or 3
    images = [noise(1, channels, *size) for size in _sizes(config)]
    return [*images, noise(1, 2, channels, 224, 224), *_videos(config)]


def _videos(config) -> list[Tensor]:
    frames = _first(config, "num_frames", "frames_per_clip", "num_image_with_embedding") or 8
    return [noise(1, frames, 3, *size) for size in _sizes(config)[1:3]]


def _spectrograms(config) -> list[Tensor]:
    own = _first(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim") or 80
    shapes = [shape for bins in dict.fromkeys([own, 80, 128, 160]) for shape in ((bins, 3000), (200, bins))]
    return [noise(1, *shape) for shape in shapes]
