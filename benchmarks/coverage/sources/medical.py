"""MONAI's networks, in two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.coverage.sources.architecture import Architecture, Inputs, noise

STEPS = {"channels": (8, 16, 32), "strides": (2, 2)}
LEVELS = {"channels": (16, 32), "num_res_blocks": 1, "norm_num_groups": 8}
ATTENTION = LEVELS | {"attention_levels": (False, True)}
DIFFUSION = ATTENTION | {"num_head_channels": 8}
KERNELS = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
TIME = torch.tensor([3])

Row = tuple[str, dict[str, Any], Inputs]


def monai_models() -> Iterator[Architecture]:
    from monai.networks import nets

    for dimensions in (2, 3):
        for name, options, inputs in _of_any_dimension(dimensions):
            build = partial(getattr(nets, name.partition("-")[0]), **options)
            yield _architecture(f"{name}-{dimensions}d", build, inputs)
    for name, options, inputs in _others():
        yield _architecture(name, partial(getattr(nets, name), **options), inputs)


def _architecture(name: str, build, inputs: Inputs) -> Architecture:
    return Architecture(f"monai:{name}", build, lambda model: [inputs])


def _of_any_dimension(dimensions: int) -> Iterator[Row]:
    size = [32] * dimensions
    image, large = (noise(1, 1, *size),), (noise(1, 1, *[64] * dimensions),)
    map_of = {"spatial_dims": dimensions, "in_channels": 1, "out_channels": 2}
    volume = {"in_shape": (1, *size), "channels": (8, 16), "strides": (2, 2)}
    patches = {"spatial_dims": dimensions, "in_channels": 1, "img_size": size, "patch_size": [8] * dimensions}
    small = {"hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    yield "AHNet", map_of | {"psp_block_num": 2}, (noise(1, 1, *[64] * dimensions),)
    yield "AttentionUnet", map_of | STEPS, image
    yield "AutoEncoder", map_of | {"channels": (8, 16), "strides": (2, 2)}, image
    yield "VarAutoEncoder", volume | {"spatial_dims": dimensions, "out_channels": 1, "latent_size": 4}, image
    yield "AutoencoderKL", map_of | ATTENTION, image
    scales = {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
    yield "VQVAE", map_of | scales | {"channels": (16, 32), "num_res_channels": (16, 32)}, image
    yield "BasicUNet", map_of, image
    yield "BasicUNetPlusPlus", map_of, image
    yield "Classifier", volume | {"classes": 2}, image
    yield "Discriminator", volume, image
    yield "Critic", volume, image
    yield "Regressor", volume | {"out_shape": (2,)}, image
    generator = {"latent_shape": (8,), "start_shape": (16, *[4] * dimensions), "channels": (8, 1), "strides": (2, 2)}
    yield "Generator", generator, (noise(1, 8),)
    yield "DenseNet121", map_of, image
    yield "DenseNet169", map_of, image
    yield "DenseNet201", map_of, image
    yield "DiffusionModelUNet", map_of | DIFFUSION, (*image, TIME)
    control = {"spatial_dims": dimensions, "in_channels": 1, "conditioning_embedding_num_channels": (16,)}
    yield "ControlNet", control | DIFFUSION, (*image, TIME, noise(1, 1, *size))
    yield "DynUNet", map_of | KERNELS, image
    yield "DynUNet-residual", map_of | KERNELS | {"res_block": True, "deep_supervision": True}, image
    for variant in range(4):
        options = {"model_name": f"efficientnet-b{variant}", "pretrained": False, "spatial_dims": dimensions}
        yield f"EfficientNetBN-b{variant}", options | {"in_channels": 1}, image
    flexible = {"in_channels": 1, "out_channels": 2, "backbone": "efficientnet-b0", "spatial_dims": dimensions}
    yield "FlexibleUNet", flexible, image
    yield "HighResNet", map_of, image
    yield "MedNeXtS", map_of, image
    yield "MedNeXtB", map_of, image
    yield "MedNeXtM", map_of, image
    yield "MaskedAutoEncoderViT", patches | small | {"decoder_hidden_size": 48, "decoder_num_heads": 4}, image
    patch = {"spatial_dims": dimensions, "channels": 16, "in_channels": 1}
    yield "PatchDiscriminator", patch, large
    yield "MultiScalePatchDiscriminator", patch | {"num_d": 2, "num_layers_d": 2, "minimum_size_im": 64}, large
    registration = {"spatial_dims": dimensions, "in_channels": 1, "num_channel_initial": 8}
    yield "RegUNet", registration | {"depth": 2}, image
    yield "LocalNet", registration | {"extract_levels": (0, 1)}, image
    yield "GlobalNet", registration | {"image_size": size, "depth": 2}, image
    for name in ("resnet10", "resnet18", "resnet34", "resnet50"):
        yield name, {"spatial_dims": dimensions, "n_input_channels": 1}, image
    segmentation = {"spatial_dims": dimensions, "in_channels": 1, "out_channels": 2, "init_filters": 8}
    yield "SegResNet", segmentation, image
    yield "SegResNetVAE", segmentation | {"input_image_size": size}, image
    yield "SegResNetDS", segmentation, image
    yield "SegResNetDS2", segmentation, image
    yield "SEResNet50", {"spatial_dims": dimensions, "in_channels": 1}, large
    yield "SEResNext50", {"spatial_dims": dimensions, "in_channels": 1}, large
    spade = map_of | {"label_nc": 3}
    label = noise(1, 3, *size)
    yield "SPADEAutoencoderKL", spade | ATTENTION, (*image, label)
    yield "SPADEDiffusionModelUNet", spade | DIFFUSION, (*image, TIME, label)
    yield "SPADENet", spade | {"input_shape": size, "channels": (16, 8)}, (label, noise(1, 1, *size))
    yield "SwinUNETR", map_of | {"feature_size": 12}, large
    yield "UNet", map_of | STEPS, image
    yield "UNet-residual", map_of | STEPS | {"num_res_units": 2}, image
    yield "UNETR", small | map_of | {"img_size": size, "feature_size": 8}, image
    yield "ViT", patches | small | {"num_layers": 2}, image
    yield "ViTAutoEnc", patches | small | {"num_layers": 2, "patch_size": [4] * dimensions}, image
    yield "VNet", map_of, image
    morph = {"spatial_dims": dimensions, "in_channels": 2, "unet_out_channels": 16}
    morph |= {"channels": (8, 8, 16, 16), "final_conv_channels": (16, 16)}
    yield "VoxelMorphUNet", morph, (noise(1, 2, *size),)


def _others() -> Iterator[Row]:
    photograph, volume = (noise(1, 3, 64, 64),), (noise(1, 1, 32, 32, 32),)
    yield "DAF3D", {"in_channels": 1, "out_channels": 2}, (noise(1, 1, 64, 64, 64),)
    yield "HoVerNet", {}, (noise(1, 3, 256, 256),)
    yield "MILModel", {"num_classes": 2, "pretrained": False}, (noise(1, 2, 3, 64, 64),)
    yield "Quicknat", {"num_classes": 3}, (noise(1, 1, 64, 64),)
    yield (
        "TorchVisionFCModel",
        {"model_name": "resnet18", "pretrained": False, "use_conv": True, "pool": None},
        (noise(1, 3, 224, 224),),
    )
    yield "VISTA3D", {}, volume
    yield "VoxelMorph", {}, (noise(1, 1, 32, 32, 32), noise(1, 1, 32, 32, 32))
    yield "SENet154", {"spatial_dims": 2, "in_channels": 3}, photograph
