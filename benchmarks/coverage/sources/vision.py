"""torchvision's models for other tasks, and every architecture of segmentation_models_pytorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from benchmarks.coverage.sources.architecture import Architecture, Inputs, noise

ENCODERS = (
    *("densenet121", "dpn68", "efficientnet-b0", "mit_b0", "mobileone_s0", "mobilenet_v2", "resnext50_32x4d"),
    *("inceptionresnetv2", "inceptionv4", "se_resnet50", "timm-regnetx_002", "timm-res2net50_26w_4s", "vgg11_bn"),
    *("xception", "tu-convnext_atto", "tu-mobilenetv3_small_050", "tu-nf_resnet26", "tu-ghostnet_050"),
)
IMAGES = [(noise(1, 3, 64, 64),), (noise(1, 3, 224, 224),)]
VIDEOS = [(noise(1, 3, 16, 112, 112),), (noise(1, 3, 16, 224, 224),)]
BATCHES = [([noise(3, 96, 128)],)]  # a list of images of any size
PAIRS = [(noise(1, 3, 128, 128), noise(1, 3, 128, 128))]


def torchvision_tasks() -> Iterator[Architecture]:
    import torchvision

    inputs = {"detection": BATCHES, "segmentation": IMAGES, "quantization": IMAGES, "video": VIDEOS}
    for task in ("detection", "segmentation", "video", "quantization", "optical_flow"):
        for name in torchvision.models.list_models(module=getattr(torchvision.models, task)):
            build = partial(_build, task, name)
            yield Architecture(f"torchvision-tasks:{name}", build, lambda model, task=task: inputs.get(task, PAIRS))


def _build(task: str, name: str) -> nn.Module:
    import torchvision

    declined = {"weights_backbone": None} if task in ("detection", "segmentation") else {}
    model = torchvision.models.get_model(name, weights=None, **declined)
    if task == "detection":
        model.transform.min_size, model.transform.max_size = (128,), 160
        if not torchvision.extension._has_ops():  # a wheel for another torch: every box is kept
            torchvision.ops.boxes.nms = lambda boxes, scores, threshold: scores.argsort(descending=True)
    return model


def segmentation_models() -> Iterator[Architecture]:
    import segmentation_models_pytorch as smp

    pairs = [(name, "resnet18") for name in smp.MODEL_ARCHITECTURES_MAPPING if name != "dpt"]
    pairs += [("unet", encoder) for encoder in ENCODERS] + [("dpt", "tu-vit_tiny_patch16_224")]
    for name, encoder in pairs:
        build = partial(smp.create_model, name, encoder_name=encoder, encoder_weights=None)
        yield Architecture(f"segmentation_models_pytorch:{name}-{encoder}", build, _images)


def _images(model: nn.Module) -> list[Inputs]:
    return [*IMAGES, (noise(1, 3, 256, 256),)]
