"""Towers of open_clip for images and texts, and what joins both: CLIP and CoCa."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture, drawn
from torch import Tensor, nn
from torchvision_operators import import_torchvision

PACKAGES = ("open-clip-torch", "timm", "torchvision", "ftfy", "wcwidth", "regex", "huggingface-hub", "safetensors")
WIDTH, IMAGE, WORDS, VOCABULARY = 32, 32, 8, 40
_IMAGES: dict[str, Any] = {"layers": 2, "width": WIDTH, "head_width": 8, "patch_size": 8, "image_size": IMAGE}
_RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "width": 8, "head_width": 8, "image_size": 64}
_TEXTS: dict[str, Any] = {"context_length": WORDS, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 4, "layers": 2}
_POOLED: dict[str, Any] = {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
_BLOCKS: dict[str, Any] = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_fc": True}
# Name -> the tower's arguments.
VISION: dict[str, dict[str, Any]] = {
    "VisionTransformer": _IMAGES,
    "VisionTransformer:average": _IMAGES | {"pool_type": "avg", "ls_init_value": 0.1, "pos_embed_type": "sin_cos_2d"},
    "VisionTransformer:attention_pool": _IMAGES | {"attentional_pool": True, "attn_pooler_heads": 4},
    "VisionTransformer:custom_blocks": _IMAGES | _BLOCKS,
    "VisionTransformer:cosine": _IMAGES | {"scaled_cosine_attn": True},
    "ModifiedResNet": _RESNET,
}
TEXT: dict[str, dict[str, Any]] = {
    "TextTransformer": _TEXTS,
    "TextTransformer:class_token": _TEXTS | {"embed_cls": True, "proj_bias": True, "pool_type": "last"},
    "TextTransformer:custom_blocks": _TEXTS | _BLOCKS | {"no_causal_mask": True, "pool_type": "first"},
}
BOTH: dict[str, dict[str, Any]] = {
    "CLIP": {"vision_cfg": _IMAGES, "text_cfg": _TEXTS},
    "CLIP:resnet": {"vision_cfg": _RESNET, "text_cfg": _TEXTS, "quick_gelu": True},
    "CustomTextCLIP": {"vision_cfg": _IMAGES, "text_cfg": _TEXTS},
    "CoCa": {
        "vision_cfg": _IMAGES | _POOLED,
        "text_cfg": _TEXTS | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": _TEXTS | {"attn_pooler_heads": 4},
    },
}


def _network(name: str) -> nn.Module:
    import_torchvision()
    import open_clip
    from open_clip import model

    if name in VISION:
        return model._build_vision_tower(WIDTH, model.CLIPVisionCfg(**VISION[name]))
    if name in TEXT:
        return model._build_text_tower(WIDTH, model.CLIPTextCfg(**TEXT[name]))
    return getattr(open_clip, name.partition(":")[0])(embed_dim=WIDTH, **BOTH[name])


def _texts(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, WORDS), generator=generator)


def _pairs(size: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, size, size, generator=generator), _texts(batch, generator)


def architectures() -> Iterator[Architecture]:
    """Every network."""
    for name, given in VISION.items():
        yield Architecture(name, functools.partial(_network, name), drawn(3, given["image_size"], given["image_size"]))
    for name in TEXT:
        yield Architecture(name, functools.partial(_network, name), _texts)
    for name, given in BOTH.items():
        inputs = functools.partial(_pairs, given["vision_cfg"]["image_size"])
        yield Architecture(name, functools.partial(_network, name), inputs)
