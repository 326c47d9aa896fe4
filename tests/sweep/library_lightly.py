"""Heads of lightly for self-supervised training, its ResNets, and its encoders and decoders of masked images."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from sweep_networks import Architecture, drawn
from torch import nn
from torchvision_operators import import_torchvision

PACKAGES = (
    *("lightly", "timm", "torchvision", "pytorch-lightning", "lightning-utilities", "torchmetrics", "hydra-core"),
    *("omegaconf", "antlr4-python3-runtime", "lightly-utils", "aenum", "pydantic", "python-dateutil", "tqdm"),
)
FEATURES, HIDDEN, OUT = 24, 32, 16
_WIDTHS: dict[str, Any] = {"input_dim": FEATURES, "hidden_dim": HIDDEN, "output_dim": OUT}
# Head -> its arguments; after a colon a second of the same.
HEADS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("BarlowTwinsProjectionHead", "BYOLProjectionHead", "BYOLPredictionHead", "MoCoProjectionHead"),
            *("NNCLRProjectionHead", "NNCLRPredictionHead", "SimCLRProjectionHead", "SimSiamProjectionHead"),
            *("SimSiamPredictionHead", "SMoGProjectionHead", "SMoGPredictionHead", "SwaVProjectionHead"),
            *("TiCoProjectionHead", "VICRegProjectionHead", "MSNProjectionHead", "DenseCLProjectionHead"),
            "VicRegLLocalProjectionHead",
        ),
        _WIDTHS,
    ),
    "DINOProjectionHead": _WIDTHS | {"bottleneck_dim": 12},
    "DINOProjectionHead:batch_norm": _WIDTHS | {"bottleneck_dim": 12, "batch_norm": True, "norm_last_layer": False},
    "SimCLRProjectionHead:layers": _WIDTHS | {"num_layers": 3, "batch_norm": False},
    "SwaVPrototypes": {"input_dim": FEATURES, "n_prototypes": [10, 12]},
}
RESNETS: dict[str, dict[str, Any]] = {
    "ResNetGenerator": {"name": "resnet-9", "width": 0.25},
    "ResNetGenerator:splits": {"name": "resnet-18", "width": 0.125, "num_splits": 2},
}


def _head(name: str) -> nn.Module:
    import_torchvision()
    from lightly.models.modules import heads

    return getattr(heads, name.partition(":")[0])(**HEADS[name])


def _resnet(name: str) -> nn.Module:
    import_torchvision()
    from lightly.models import ResNetGenerator

    return ResNetGenerator(**RESNETS[name])


def _masked() -> nn.Module:
    """An encoder of masked images around a vision transformer of timm."""
    import_torchvision()
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=HIDDEN, depth=2, num_heads=4, num_classes=0)
    return MaskedVisionTransformerTIMM(vit)


def _decoder() -> nn.Module:
    import_torchvision()
    from lightly.models.modules import MAEDecoderTIMM

    sizes = {"num_patches": 16, "patch_size": 8, "embed_dim": HIDDEN, "decoder_embed_dim": FEATURES}
    return MAEDecoderTIMM(**sizes, decoder_depth=2, decoder_num_heads=4)


def architectures() -> Iterator[Architecture]:
    """Every network; heads take features."""
    for name in HEADS:
        yield Architecture(name, functools.partial(_head, name), drawn(FEATURES))
    for name in RESNETS:
        yield Architecture(name, functools.partial(_resnet, name), drawn(3, 32, 32))
    yield Architecture("MaskedVisionTransformerTIMM", _masked, drawn(3, 32, 32))
    yield Architecture("MAEDecoderTIMM", _decoder, drawn(17, HIDDEN))
