"""Networks of segmentation-models-pytorch: every decoder, on encoders of several kinds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from sweep_networks import Architecture, drawn
from torch import nn
from torchvision_operators import import_torchvision

PACKAGES = ("segmentation-models-pytorch", "timm", "torchvision", "safetensors")
_FEWER: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}
# Decoder and encoder -> further arguments; after a colon a second of the same pair.
NETWORKS: dict[str, dict[str, Any]] = {
    "Unet resnet18": {},
    "Unet resnet18:attention": {"decoder_attention_type": "scse", **_FEWER, "decoder_channels": (32, 32, 16)},
    "Unet mobilenet_v2": {"decoder_interpolation": "bilinear", **_FEWER},
    "Unet mit_b0": {"decoder_use_norm": "identity"},
    "Unet vgg11_bn": _FEWER,
    "Unet densenet121": _FEWER,
    "Unet mobileone_s0": _FEWER,
    "Unet tu-convnext_atto": {"encoder_depth": 4, "decoder_channels": (32, 16, 16, 8)},
    "Unet tu-mobilenetv3_small_050": {"aux_params": {"classes": 4}, **_FEWER},
    "UnetPlusPlus resnet18": _FEWER,
    "MAnet resnet18": _FEWER | {"decoder_pab_channels": 16},
    "Linknet resnet18": {},
    "FPN resnet18": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "FPN efficientnet-b0": {
        "decoder_pyramid_channels": 32,
        "decoder_segmentation_channels": 32,
        "decoder_merge_policy": "cat",
    },
    "PSPNet resnet18": {"psp_out_channels": 32},
    "DeepLabV3 resnet18": {"decoder_channels": 32},
    "DeepLabV3Plus resnet18": {"decoder_channels": 32},
    "PAN resnet18": {"decoder_channels": 16},
    "UPerNet resnet18": {"decoder_channels": 32},
    "Segformer mit_b0": {"decoder_segmentation_channels": 32},
    "DPT tu-vit_tiny_patch16_224.augreg_in21k": {"decoder_intermediate_channels": (16, 32, 32, 32)},
}
SIZES = {"DPT": 224, "PAN": 128}


def _network(name: str) -> nn.Module:
    import_torchvision()
    import segmentation_models_pytorch as smp

    decoder, encoder = name.partition(":")[0].split()
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=3, **NETWORKS[name])


def architectures() -> Iterator[Architecture]:
    """Every network."""
    for name in NETWORKS:
        size = SIZES.get(name.split()[0], 64)
        yield Architecture(name, functools.partial(_network, name), drawn(3, size, size))
