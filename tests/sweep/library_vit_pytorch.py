"""Transformers of vit-pytorch: a file for each, most of which rearrange channels into heads by einops."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from sweep_networks import Architecture, drawn
from torch import nn
from torchvision_operators import import_torchvision

PACKAGES = ("vit-pytorch", "torchvision", "einops")
_BLOCKS: dict[str, Any] = {"num_classes": 7, "dim": 32, "depth": 2, "heads": 4}
_PATCHES: dict[str, Any] = _BLOCKS | {"image_size": 32, "patch_size": 8, "mlp_dim": 48, "dim_head": 8}
_IMAGES: dict[str, Any] = {"ndim": 2, "input_shape": (32, 32), "patch_size": 8}
_VIDEO: dict[str, Any] = {"image_size": 16, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
_STAGES: dict[str, Any] = {"num_classes": 7, "dim": 16, "depth": (1, 1), "dim_head": 8}
# Files with one class each: file -> further arguments.
PLAIN: dict[str, dict[str, Any]] = {
    "vit": {},
    "cait": {"cls_depth": 2},
    "deepvit": {},
    "attn_residual_with_dca_simple_vit": {},
    "jet_vit": {"window_size": 2},
    "jumbo_vit": {"jumbo_cls_k": 2},
    "parallel_vit": {},
    "pit": {"depth": (1, 1)},
    "rvt": {"patch_size": 8},
    "simple_flash_attn_vit": {},
    "simple_uvit": {},
    "simple_vit": {},
    "simple_vit_attn_residual": {},
    "simple_vit_orthog_residual_update": {},
    "simple_vit_with_fft": {"freq_patch_size": 8},
    "simple_vit_with_qk_norm": {},
    "simple_vit_with_register_tokens": {},
    "simple_vit_with_relative_proj_pos_bias": {},
    "simple_vit_with_specialized_cls": {},
    "simple_vit_with_value_residual": {},
    "vit_5": {},
    "vit_detpool": {},
    "vit_for_small_dataset": {},
    "vit_with_decorr": {},
    "vit_with_keel_post_ln": {},
    "vit_with_patch_merger": {},
    "normalized_vit": {},
    "xcit": {"cls_depth": 1},
}
# File -> (the class, all arguments, the shape of an input).
OTHER: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "cct": (
        "CCT",
        {"img_size": 32, "embedding_dim": 32, "num_layers": 2, "num_heads": 4, "num_classes": 7},
        (3, 32, 32),
    ),
    "cross_vit": (
        "CrossViT",
        {"image_size": 48, "num_classes": 7, "sm_dim": 32, "lg_dim": 48, "lg_enc_depth": 1, "cross_attn_depth": 1}
        | {"depth": 1, "sm_enc_dim_head": 8, "lg_enc_dim_head": 8, "cross_attn_dim_head": 8}
        | {"sm_enc_mlp_dim": 48, "lg_enc_mlp_dim": 48},
        (3, 48, 48),
    ),
    "crossformer": (
        "CrossFormer",
        {
            "num_classes": 7,
            "dim": (16, 16, 32, 32),
            "depth": 1,
            "global_window_size": (2, 2, 1, 1),
            "local_window_size": 1,
        }
        | {"cross_embed_kernel_sizes": ((4, 8), (2, 4), (2, 4), (2, 4))},
        (3, 32, 32),
    ),
    "cvt": (
        "CvT",
        {"num_classes": 7, "s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 32, "s2_depth": 1, "s3_depth": 1}
        | {"s2_heads": 2, "s3_heads": 2},
        (3, 64, 64),
    ),
    "levit": (
        "LeViT",
        {"image_size": 64, "num_classes": 7, "dim": (16, 32), "depth": 1, "heads": (2, 4), "mlp_mult": 2, "stages": 2}
        | {"dim_key": 8, "dim_value": 16},
        (3, 64, 64),
    ),
    "look_vit": (
        "LookViT",
        {"dim": 32, "image_size": 48, "num_classes": 7, "depth": 1, "patch_size": 16, "heads": 4, "dim_head": 8}
        | {"cross_attn_heads": 4, "cross_attn_dim_head": 8},
        (3, 48, 48),
    ),
    "looped_vit": (
        "LoopedViT",
        _PATCHES | {"pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1, "loop_depth": 2, "depth": None},
        (3, 32, 32),
    ),
    "max_vit": ("MaxViT", _STAGES | {"window_size": 2, "dim_conv_stem": 16}, (3, 32, 32)),
    "max_vit_with_registers": ("MaxViT", _STAGES | {"window_size": 2, "dim_conv_stem": 16}, (3, 32, 32)),
    "mobile_vit": (
        "MobileViT",
        {"image_size": (64, 64), "dims": [16, 24, 32], "channels": [8, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64]}
        | {"num_classes": 7, "depths": (1, 1, 1)},
        (3, 64, 64),
    ),
    "nest": (
        "NesT",
        {"image_size": 32, "patch_size": 4, "num_classes": 7, "dim": 32, "heads": 2, "num_hierarchies": 2}
        | {"block_repeats": (1, 1), "dim_head": 8},
        (3, 32, 32),
    ),
    "regionvit": ("RegionViT", {"dim": (16, 32, 32, 32), "depth": (1, 1, 1, 1), "num_classes": 7}, (3, 224, 224)),
    "scalable_vit": (
        "ScalableViT",
        {"num_classes": 7, "dim": 16, "depth": (1, 1), "heads": (2, 4), "reduction_factor": (2, 1)}
        | {"window_size": (4, None), "iwsa_dim_key": 8, "iwsa_dim_value": 8, "ssa_dim_key": 8, "ssa_dim_value": 8},
        (3, 32, 32),
    ),
    "sep_vit": ("SepViT", _STAGES | {"heads": (2, 4)}, (3, 56, 56)),
    "simple_vit_1d": ("SimpleViT", _BLOCKS | {"seq_len": 32, "patch_size": 8, "mlp_dim": 48, "dim_head": 8}, (3, 32)),
    "simple_vit_3d": ("SimpleViT", _BLOCKS | _VIDEO | {"mlp_dim": 48, "dim_head": 8}, (3, 4, 16, 16)),
    "simple_vit_with_hyper_connections": ("SimpleViT", _PATCHES | {"num_residual_streams": 2}, (3, 32, 32)),
    "simple_vit_with_sparse_gating": ("SimpleViTWithSparseGating", _PATCHES, (3, 32, 32)),
    "t2t": ("T2TViT", _BLOCKS | {"image_size": 32, "mlp_dim": 48, "dim_head": 8}, (3, 32, 32)),
    "twins_svt": (
        "TwinsSVT",
        {"num_classes": 7}
        | {f"s{n}_{key}": value for n in range(1, 5) for key, value in (("local_patch_size", 1), ("global_k", 1))}
        | {"s1_emb_dim": 16, "s2_emb_dim": 16, "s3_emb_dim": 32, "s4_emb_dim": 32, "s3_depth": 1, "s4_depth": 1},
        (3, 32, 32),
    ),
    "vit_1d": ("ViT", _BLOCKS | {"seq_len": 32, "patch_size": 8, "mlp_dim": 48, "dim_head": 8}, (3, 32)),
    "vit_3d": ("ViT", _BLOCKS | _VIDEO | {"mlp_dim": 48, "dim_head": 8}, (3, 4, 16, 16)),
    "vivit": (
        "ViViT",
        {key: value for key, value in _BLOCKS.items() if key != "depth"}
        | (_VIDEO | {"mlp_dim": 48, "dim_head": 8, "spatial_depth": 1, "temporal_depth": 1, "use_flash_attn": False}),
        (3, 4, 16, 16),
    ),
    "wwt": ("WWT", {**_PATCHES, "num_slots": 4}, (3, 32, 32)),
}


def _build(file: str, name: str | None, arguments: Mapping[str, Any]) -> nn.Module:
    import_torchvision()
    module = importlib.import_module(f"vit_pytorch.{file}")
    classes = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    made = getattr(module, name) if name else classes[-1]
    return made(**{key: value for key, value in arguments.items() if value is not None})


def architectures() -> Iterator[Architecture]:
    """One of each file that holds a network, not a way of training one."""
    for file, further in PLAIN.items():
        yield Architecture(file, functools.partial(_build, file, None, _PATCHES | further), drawn(3, 32, 32))
    for file, (name, arguments, shape) in OTHER.items():
        yield Architecture(file, functools.partial(_build, file, name, arguments), drawn(*shape))
