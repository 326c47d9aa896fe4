"""Models of diffusers: denoising networks and autoencoders, with one or two narrow blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from sweep_networks import Architecture, Inputs
from torch import Tensor, nn

PACKAGES = ("diffusers",)
HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
RESNETS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
LATENT = {"in_channels": 4, "out_channels": 4, "sample_size": 8}


def _drawn(**shapes: tuple[int, ...] | Callable[[int, torch.Generator], Tensor]) -> Inputs:
    """Keywords: of a shape after the batch size normal numbers, of a function what it returns."""

    def inputs(batch: int, generator: torch.Generator) -> dict[str, Any]:
        return {
            key: shape(batch, generator) if callable(shape) else torch.randn(batch, *shape, generator=generator)
            for key, shape in shapes.items()
        }

    return inputs


def _time(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 1000, (batch,), generator=generator)


def _label(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 10, (batch,), generator=generator)


def _positions(length: int) -> Callable[[int, torch.Generator], Tensor]:
    """The same for all samples, as Flux takes them."""
    return lambda batch, generator: torch.arange(3 * length).view(length, 3) % 4


IMAGE, TEXT = _drawn(sample=(3, 16, 16)), (6, 16)
# Class -> its sizes, what it is called with.
MODELS: dict[str, tuple[Mapping[str, Any], Inputs]] = {
    "AutoencoderKL": (
        {**RESNETS, "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
        IMAGE,
    ),
    "AutoencoderTiny": (
        {
            **{f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")},
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        IMAGE,
    ),
    "VQModel": (
        {
            **RESNETS,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "num_vq_embeddings": 16,
        },
        IMAGE,
    ),
    "UNet2DModel": (
        {
            **RESNETS,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "sample_size": 16,
        },
        _drawn(sample=(3, 16, 16), timestep=_time),
    ),
    "UNet2DConditionModel": (
        {
            **RESNETS,
            **LATENT,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        _drawn(sample=(4, 8, 8), timestep=_time, encoder_hidden_states=TEXT),
    ),
    "ControlNetModel": (
        {
            **RESNETS,
            "in_channels": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "conditioning_embedding_out_channels": (8, 8),
        },
        _drawn(sample=(4, 8, 8), timestep=_time, encoder_hidden_states=TEXT, controlnet_cond=(3, 16, 16)),
    ),
    "DiTTransformer2DModel": (
        {**HEADS, **LATENT, "num_layers": 2, "patch_size": 2, "num_embeds_ada_norm": 10},
        _drawn(hidden_states=(4, 8, 8), timestep=_time, class_labels=_label),
    ),
    "PixArtTransformer2DModel": (
        {
            **HEADS,
            **LATENT,
            "num_layers": 2,
            "patch_size": 2,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
        _drawn(hidden_states=(4, 8, 8), timestep=_time, encoder_hidden_states=TEXT),
    ),
    "SD3Transformer2DModel": (
        {
            **HEADS,
            **LATENT,
            "num_layers": 2,
            "patch_size": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        _drawn(hidden_states=(4, 8, 8), timestep=_time, encoder_hidden_states=TEXT, pooled_projections=(16,)),
    ),
    "FluxTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 2, 2),
        },
        _drawn(
            hidden_states=(8, 4),
            timestep=_time,
            encoder_hidden_states=TEXT,
            pooled_projections=(16,),
            img_ids=_positions(8),
            txt_ids=_positions(6),
        ),
    ),
    "WanTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "ffn_dim": 48,
            "text_dim": 16,
            "freq_dim": 16,
            "cross_attn_norm": True,
            "rope_max_seq_len": 32,
        },
        _drawn(hidden_states=(4, 2, 8, 8), timestep=_time, encoder_hidden_states=TEXT),
    ),
    "PriorTransformer": (
        {**HEADS, "num_layers": 2, "embedding_dim": 16, "num_embeddings": 6, "additional_embeddings": 4},
        _drawn(hidden_states=(16,), timestep=_time, proj_embedding=(16,), encoder_hidden_states=TEXT),
    ),
    "AuraFlowTransformer2DModel": (
        {
            **HEADS,
            **LATENT,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "patch_size": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        _drawn(hidden_states=(4, 8, 8), timestep=_time, encoder_hidden_states=TEXT),
    ),
    "SanaTransformer2DModel": (
        {
            **HEADS,
            **LATENT,
            "num_layers": 2,
            "patch_size": 1,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 16,
        },
        _drawn(hidden_states=(4, 8, 8), timestep=_time, encoder_hidden_states=TEXT),
    ),
}


def _build(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    import diffusers

    model: nn.Module = getattr(diffusers, name)(**sizes)
    return model


def architectures() -> Iterator[Architecture]:
    """One model of each class."""
    for name, (sizes, inputs) in MODELS.items():
        yield Architecture(name, functools.partial(_build, name, sizes), inputs)
