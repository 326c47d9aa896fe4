"""Networks of MONAI: for images of two dimensions where they can be, a few for volumes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture, Inputs, drawn
from torch import nn

PACKAGES = ("monai", "einops")
FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
_SMALL = {"in_channels": 1, "num_classes": 3, "spatial_dims": 2}
_ENCODER = {"in_channels": 1, "img_size": (32, 32), "spatial_dims": 2}
_DYNAMIC: dict[str, Any] = {
    "kernel_size": (3, 3, 3),
    "strides": (1, 2, 2),
    "upsample_kernel_size": (2, 2),
    "filters": (8, 16, 32),
    "deep_supervision": False,
}
_DIFFUSION: dict[str, Any] = {
    "channels": (16, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_res_blocks": 1,
    "num_head_channels": 8,
}
_LATENT: dict[str, Any] = {
    "channels": (8, 8, 16),
    "attention_levels": (False, False, True),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "num_res_blocks": 1,
}
_CODES: dict[str, Any] = {
    "channels": (8, 16),
    "num_res_channels": (8, 16),
    "num_res_layers": 1,
    "downsample_parameters": ((2, 4, 1, 1),) * 2,
    "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
    "num_embeddings": 16,
    "embedding_dim": 8,
}
_TRANSFORMER: dict[str, Any] = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 4}
_ONE = drawn(1, 32, 32)
_VOLUME = drawn(1, 16, 16, 16)


def _times(batch: int, generator: torch.Generator) -> Any:
    """An image and the time step of the diffusion."""
    return torch.randn(batch, 1, 16, 16, generator=generator), torch.randint(100, (batch,), generator=generator)


# Class -> its arguments, and its inputs; after a colon a second of the same class.
NETWORKS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "AHNet": ({"layers": (1, 1, 1, 1), "spatial_dims": 2, "in_channels": 1, "out_channels": 2}, drawn(1, 128, 128)),
    "AttentionUnet": ({**FLAT, "channels": (8, 16, 32), "strides": (2, 2)}, _ONE),
    "AutoEncoder": ({**FLAT, "channels": (8, 16, 32), "strides": (2, 2, 2), "num_res_units": 1}, _ONE),
    "AutoencoderKL": ({**FLAT, **_LATENT}, _ONE),
    "BasicUNet": ({**FLAT, "features": (8, 8, 16, 32, 64, 8)}, _ONE),
    "BasicUNetPlusPlus": ({**FLAT, "features": (8, 8, 16, 32, 64, 8)}, _ONE),
    "Classifier": ({"in_shape": (1, 32, 32), "classes": 3, "channels": (8, 16), "strides": (2, 2)}, _ONE),
    "ControlNet": (
        {"spatial_dims": 2, "in_channels": 1, **_DIFFUSION},
        lambda n, g: (*_times(n, g), drawn(1, 128, 128)(n, g)),
    ),
    "DenseNet": ({**FLAT, "init_features": 16, "growth_rate": 8, "block_config": (2, 3, 2)}, _ONE),
    "DiffusionModelUNet": ({**FLAT, "out_channels": 1, **_DIFFUSION}, _times),
    "DiffusionModelUNet:cross": (
        {**FLAT, "out_channels": 1, **_DIFFUSION, "with_conditioning": True, "cross_attention_dim": 12},
        lambda n, g: (*_times(n, g), torch.randn(n, 5, 12, generator=g)),
    ),
    "Discriminator": ({"in_shape": (1, 32, 32), "channels": (8, 16, 32), "strides": (2, 2, 2)}, _ONE),
    "DynUNet": ({**FLAT, **_DYNAMIC}, _ONE),
    "DynUNet:residual": ({**FLAT, **_DYNAMIC, "res_block": True, "norm_name": "batch", "deep_supervision": True}, _ONE),
    "EfficientNetBN": ({"model_name": "efficientnet-b0", "pretrained": False, **_SMALL}, drawn(1, 64, 64)),
    "FlexibleUNet": (
        {"in_channels": 1, "out_channels": 2, "backbone": "resnet18", "decoder_channels": (32, 32, 16, 8, 8)}
        | {"spatial_dims": 2, "pretrained": False},
        drawn(1, 64, 64),
    ),
    "Generator": (
        {"latent_shape": (8,), "start_shape": (8, 4, 4), "channels": (16, 8, 1), "strides": (2, 2, 1)},
        drawn(8),
    ),
    "HighResNet": (FLAT, _ONE),
    "MedNeXt": ({**FLAT, "init_filters": 8}, _ONE),
    "MultiScalePatchDiscriminator": (
        {"num_d": 2, "num_layers_d": 2, "spatial_dims": 2, "channels": 8, "in_channels": 1, "minimum_size_im": 64},
        drawn(1, 64, 64),
    ),
    "NetAdapter": ({}, _ONE),
    "PatchDiscriminator": ({"spatial_dims": 2, "channels": 8, "in_channels": 1, "num_layers_d": 2}, drawn(1, 64, 64)),
    "Quicknat": ({"num_classes": 3, "num_channels": 1, "num_filters": 8, "se_block": "CSE"}, drawn(1, 32, 32)),
    "RegUNet": ({"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8, "depth": 2, "out_channels": 2}, _ONE),
    "Regressor": ({"in_shape": (1, 32, 32), "out_shape": (2,), "channels": (8, 16), "strides": (2, 2)}, _ONE),
    "ResNet": (
        {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 16, 32, 64], "n_input_channels": 1}
        | {"spatial_dims": 2, "num_classes": 3},
        _ONE,
    ),
    "Restormer": (
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "dim": 8, "num_blocks": (1, 1), "heads": (1, 2)}
        | {"num_refinement_blocks": 1},
        _ONE,
    ),
    "SEResNet50": ({**_SMALL, "inplanes": 64}, drawn(1, 64, 64)),
    "SEResNext50": (_SMALL, drawn(1, 64, 64)),
    "SegResNet": ({**FLAT, "init_filters": 8}, _ONE),
    "SegResNetDS": ({**FLAT, "init_filters": 8}, _ONE),
    "SegResNetVAE": ({**FLAT, "init_filters": 8, "input_image_size": (32, 32), "vae_estimate_std": False}, _ONE),
    "SwinUNETR": ({"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2}, drawn(1, 64, 64)),
    "UNet": ({**FLAT, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}, _ONE),
    "UNet:plain": ({**FLAT, "channels": (8, 16, 32), "strides": (2, 2), "norm": "BATCH", "act": "RELU"}, _ONE),
    "UNet:volume": (
        {**FLAT, "spatial_dims": 3, "channels": (8, 16), "strides": (2,), "norm": ("GROUP", {"num_groups": 4})},
        _VOLUME,
    ),
    "UNETR": (
        {**_ENCODER, "out_channels": 2, "feature_size": 8, "hidden_size": 24, "mlp_dim": 48, "num_heads": 4},
        _ONE,
    ),
    "VarAutoEncoder": (
        {
            "in_shape": (1, 32, 32),
            "spatial_dims": 2,
            "out_channels": 1,
            "channels": (8, 16),
            "strides": (2, 2),
            "latent_size": 4,
        },
        _ONE,
    ),
    "ViT": ({**_ENCODER, "patch_size": (8, 8), "classification": True, "num_classes": 3, **_TRANSFORMER}, _ONE),
    "ViTAutoEnc": ({**_ENCODER, "patch_size": (4, 4), **_TRANSFORMER, "out_channels": 1}, _ONE),
    "VNet": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, _ONE),
    "VoxelMorphUNet": (
        {"spatial_dims": 2, "in_channels": 2, "unet_out_channels": 8, "channels": (8, 8, 8, 8, 8, 8)}
        | {"final_conv_channels": (8, 8)},
        drawn(2, 32, 32),
    ),
    "VQVAE": ({**FLAT, "out_channels": 1, **_CODES}, _ONE),
    "DiNTS": (
        {"in_channels": 1, "num_classes": 2, "spatial_dims": 2, "filter_nums": [8, 16, 16, 32, 32]},
        drawn(1, 64, 64),
    ),
}


def _build(name: str) -> nn.Module:
    from monai.networks import nets

    kind, arguments = name.partition(":")[0], NETWORKS[name][0]
    if kind == "NetAdapter":
        inner = nets.ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], n_input_channels=1, spatial_dims=2)
        return nets.NetAdapter(inner, num_classes=3, dim=2, in_channels=64, pool=None)
    if kind == "DiNTS":
        space = nets.TopologyInstance(spatial_dims=2, channel_mul=0.5, num_blocks=6, num_depths=3)
        return nets.DiNTS(space, in_channels=1, num_classes=2, spatial_dims=2)
    if kind == "Restormer":
        return importlib.import_module("monai.networks.nets.restormer").Restormer(**arguments)
    return getattr(nets, kind)(**arguments)


def architectures() -> Iterator[Architecture]:
    """One of each class, and a second where it has other layers."""
    for name, (_, inputs) in NETWORKS.items():
        yield Architecture(name, functools.partial(_build, name), inputs)
