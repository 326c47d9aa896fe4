"""Transformers of x-transformers, with its options one by one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from sweep_networks import Architecture
from torch import nn

PACKAGES = (
    *("x-transformers", "einops", "einx", "frozendict", "loguru", "hyper-connections", "torch-einops-utils"),
    *("rotary-embedding-torch",),
)
TOKENS, LENGTH = 20, 12
# Name -> options of the layers.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "glu": {"ff_glu": True, "ff_swish": True},
    "rmsnorm": {"use_rmsnorm": True},
    "rotary": {"rotary_pos_emb": True},
    "grouped_keys": {"attn_kv_heads": 2},
    "one_key": {"attn_one_kv_head": True},
    "qk_norm": {"attn_qk_norm": True},
    "qk_norm_scale": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "talking_heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "gated_values": {"attn_gate_values": True},
    "gated_heads": {"attn_gate_value_heads": True},
    "memory": {"attn_num_mem_kv": 4},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "relative_positions": {"rel_pos_bias": True},
    "dynamic_positions": {"dynamic_pos_bias": True},
    "sandwich": {"sandwich_norm": True},
    "macaron": {"macaron": True},
    "shifted_tokens": {"shift_tokens": 1},
    "residual_attention": {"pre_norm": False, "residual_attn": True},
    "head_scale": {"attn_head_scale": True},
    "gated_residual": {"gate_residual": True},
    "scalenorm": {"use_scalenorm": True},
    "relu_squared": {"ff_relu_squared": True},
    "norm_after_activation": {"ff_post_act_ln": True, "ff_no_bias": True},
}


def _language_model(options: Mapping[str, Any]) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    return TransformerWrapper(num_tokens=TOKENS, max_seq_len=LENGTH, attn_layers=layers)


def _vision_model() -> nn.Module:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=4, attn_dim_head=8)
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=layers)


def _tokens(batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, TOKENS, (batch, LENGTH), generator=generator)


def _images(batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=generator)


def architectures() -> Iterator[Architecture]:
    """A decoder with each of the options, and an encoder of images."""
    for name, options in OPTIONS.items():
        yield Architecture(name, functools.partial(_language_model, options), _tokens)
    yield Architecture("image_encoder", _vision_model, _images)
