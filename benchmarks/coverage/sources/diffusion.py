"""The classes of diffusers, in sizes that fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.sources.architecture import Architecture, noise

TWO = (32, 64)  # channels of the two levels
FOUR = (16, 16, 16, 16)
IMAGE = {"sample": noise(1, 3, 64, 64)}
VIDEO = {"sample": noise(1, 3, 9, 32, 32)}
TEXT = noise(1, 7, 32)
TIME = torch.tensor([3])
LATENT = {"sample": noise(1, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": TEXT}
FRAMES = {"encoder_hidden_states": noise(4, 7, 32)}
CLIP = {"sample": noise(1, 4, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": TEXT}


def diffusers_models() -> Iterator[Architecture]:
    import diffusers

    for name, options, inputs in _table():
        if hasattr(diffusers, name):
            yield Architecture(f"diffusers:{name}", partial(_build, name, options), lambda model, one=inputs: [one])


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**options)


def _blocks(kind: str = "2D", *, attention: str = "CrossAttn") -> dict[str, Any]:
    """Two levels, the first with attention."""
    return {
        "block_out_channels": TWO,
        "down_block_types": (f"{attention}DownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"{attention}UpBlock{kind}"),
    }


def _table() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    narrow = {"block_out_channels": FOUR, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    yield "AsymmetricAutoencoderKL", {}, IMAGE
    yield "AutoencoderKL", {}, IMAGE
    yield "AutoencoderTiny", {}, IMAGE
    yield "VQModel", {}, IMAGE
    yield "AutoencoderKLTemporalDecoder", {}, IMAGE | {"num_frames": 1}
    levels = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (16, 32)}
    levels |= {"qkv_multiscales": ((), (5,)), "layers_per_block": (1, 1)}
    deep = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in levels.items()}
    yield "AutoencoderDC", deep | {"latent_channels": 4, "attention_head_dim": 8}, IMAGE
    yield "AutoencoderKLCogVideoX", narrow, VIDEO
    cosmos = {"encoder_block_out_channels": FOUR, "decode_block_out_channels": FOUR, "attention_resolutions": (8,)}
    yield "AutoencoderKLCosmos", cosmos | {"resolution": 64, "latent_channels": 4}, VIDEO
    yield "AutoencoderKLFlux2", narrow, IMAGE
    yield "AutoencoderKLHunyuanVideo", narrow, VIDEO
    yield "AutoencoderKLMagvit", {"block_out_channels": FOUR, "norm_num_groups": 4, "latent_channels": 4}, VIDEO
    ltx = {"block_out_channels": FOUR, "decoder_block_out_channels": FOUR, "latent_channels": 8}
    ltx |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    yield "AutoencoderKLLTXVideo", ltx, VIDEO
    mochi = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    mochi |= {"layers_per_block": (1,) * 5, "latent_channels": 4}
    yield "AutoencoderKLMochi", mochi, {"sample": noise(1, 3, 7, 32, 32)}
    yield "AutoencoderKLWan", {"base_dim": 16, "num_res_blocks": 1}, VIDEO
    yield "AutoencoderKLQwenImage", {"base_dim": 16, "num_res_blocks": 1}, {"sample": noise(1, 3, 1, 32, 32)}
    oobleck = {"encoder_hidden_size": 16, "decoder_channels": 16, "decoder_input_channels": 8}
    oobleck |= {"downsampling_ratios": [2, 4], "channel_multiples": [1, 2]}
    yield "AutoencoderOobleck", oobleck, {"sample": noise(1, 2, 256)}
    yield "AutoencoderKLLTX2Audio", {}, {"sample": noise(1, 2, 64, 64)}
    yield "AutoencoderVidTok", {"ch": 32}, {"sample": noise(1, 3, 17, 32, 32)}

    yield "UNet1DModel", {"extra_in_channels": 64}, {"sample": noise(1, 2, 64), "timestep": TIME}
    plain = _blocks(attention="Attn") | {"norm_num_groups": 8}
    yield "UNet2DModel", plain, {"sample": noise(1, 3, 32, 32), "timestep": TIME}
    text = {"cross_attention_dim": 32, "norm_num_groups": 8}
    yield "UNet2DConditionModel", _blocks() | text, LATENT
    yield "UNet3DConditionModel", _blocks("3D") | text | {"attention_head_dim": 8}, CLIP
    yield "UNetMotionModel", _blocks("Motion") | text | {"num_attention_heads": 4}, CLIP | FRAMES
    spatiotemporal = _blocks("SpatioTemporal") | {"cross_attention_dim": 32, "num_attention_heads": 4}
    spatiotemporal |= {"addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96}
    yield (
        "UNetSpatioTemporalConditionModel",
        spatiotemporal,
        {
            "sample": noise(1, 2, 8, 16, 16),
            "timestep": TIME,
            "encoder_hidden_states": noise(1, 1, 32),
            "added_time_ids": noise(1, 3),
        },
    )
    image = {"fps": torch.tensor([8]), "image_latents": noise(1, 4, 4, 16, 16), "image_embeddings": noise(1, 1024)}
    yield (
        "I2VGenXLUNet",
        _blocks("3D") | {"norm_num_groups": 8, "attention_head_dim": 8},
        CLIP | image | {"encoder_hidden_states": noise(1, 7, 1024)},
    )
    control = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": TWO}
    control |= text | {"conditioning_embedding_out_channels": (16, 32)}
    yield "ControlNetModel", control, LATENT | {"controlnet_cond": noise(1, 3, 32, 32)}
    motion = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "block_out_channels": TWO}
    motion |= text | {"num_attention_heads": 4, "conditioning_embedding_out_channels": (16, 32)}
    masked = {"controlnet_cond": noise(1, 4, 4, 16, 16), "conditioning_mask": noise(1, 1, 4, 16, 16)}
    yield "SparseControlNetModel", motion, CLIP | FRAMES | masked
    for kind in ("full_adapter", "full_adapter_xl", "light_adapter"):
        yield "T2IAdapter", {"channels": [32, 64, 64], "adapter_type": kind}, {"x": noise(1, 3, 64, 64)}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    hidden = {"hidden_states": noise(1, 4, 16, 16), "timestep": TIME}
    yield "DiTTransformer2DModel", heads | {"sample_size": 16}, hidden | {"class_labels": torch.tensor([1])}
    pixart = heads | {"sample_size": 16, "caption_channels": 32, "cross_attention_dim": 32}
    yield "PixArtTransformer2DModel", pixart, hidden | {"encoder_hidden_states": TEXT}
    sana = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    sana |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    yield "SanaTransformer2DModel", sana | {"caption_channels": 32}, hidden | {"encoder_hidden_states": TEXT}
    sd3 = {"sample_size": 16, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    sd3 |= {"caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 32, "out_channels": 4}
    yield "SD3Transformer2DModel", sd3, hidden | {"encoder_hidden_states": TEXT, "pooled_projections": noise(1, 32)}
    video = {"hidden_states": noise(1, 4, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": TEXT}
    wan = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 32}
    yield "WanTransformer3DModel", wan | {"ffn_dim": 32, "num_layers": 2, "freq_dim": 32}, video
    allegro = {"num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48, "num_layers": 2}
    allegro |= {"caption_channels": 32, "sample_width": 16, "sample_height": 16}
    yield (
        "AllegroTransformer3DModel",
        allegro | {"sample_frames": 4},
        video | {"encoder_attention_mask": torch.ones(1, 7, dtype=torch.bool)},
    )
    latte = heads | {"in_channels": 4, "out_channels": 4, "sample_size": 16, "patch_size": 2, "caption_channels": 32}
    yield "LatteTransformer3DModel", latte | {"cross_attention_dim": 32, "video_length": 4}, video
    cog = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    cog |= {"text_embed_dim": 32, "sample_width": 16, "sample_height": 16, "sample_frames": 9, "max_text_seq_length": 7}
    yield "CogVideoXTransformer3DModel", cog, video | {"hidden_states": noise(1, 3, 4, 16, 16)}
    uvit = {"hidden_size": 32, "cond_embed_dim": 32, "encoder_hidden_size": 32, "block_out_channels": 32}
    uvit |= {"micro_cond_embed_dim": 160, "micro_cond_encode_dim": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    uvit |= {"vocab_size": 32, "codebook_size": 32, "num_attention_heads": 4, "block_num_heads": 4, "in_channels": 32}
    codes = {"input_ids": torch.ones(1, 8, 8, dtype=torch.long), "encoder_hidden_states": TEXT}
    yield (
        "UVit2DModel",
        uvit | {"sample_size": 8},
        codes
        | {
            "pooled_text_emb": noise(1, 32),
            "micro_conds": noise(1, 5),
        },
    )
