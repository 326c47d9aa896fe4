"""Networks of kornia: descriptors and detectors of local features, matchers, edges, vision transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from sweep_networks import Architecture, Inputs, drawn
from torch import nn

PACKAGES = ("kornia", "kornia-rs")
_FRESH: dict[str, Any] = {"pretrained": False}
_LOFTR: dict[str, Any] = {"d_model": 32, "nhead": 4, "layer_names": ["self", "cross"], "attention": "linear"}
_PYRAMID: dict[str, Any] = {"initial_dim": 16, "block_dims": [16, 24, 32]}
_DESCRIPTORS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("HardNet", "HardNet8", "SOSNet", "TFeat", "OriNet"), _FRESH),
    "HyNet": _FRESH | {"dim_desc": 32, "drop_rate": 0.0},
    "LAFAffNetShapeEstimator": _FRESH,
}


def _feature(name: str) -> nn.Module:
    from kornia import feature

    one = getattr(feature, name)(**_DESCRIPTORS[name])
    return one.features if name == "LAFAffNetShapeEstimator" else one


def _module(path: str, **given: Any) -> Callable[[], nn.Module]:
    """A class by its module and name, made with these arguments."""

    def build() -> nn.Module:
        module, _, name = path.rpartition(".")
        return getattr(__import__(f"kornia.{module}", fromlist=[name]), name)(**given)

    return build


def _with_config(path: str, **config: Any) -> Callable[[], nn.Module]:
    """One that takes a dict."""
    return lambda: _module(path, config=config)()


def _siglip() -> nn.Module:
    from kornia.models.siglip2.config import SigLip2VisionConfig
    from kornia.models.siglip2.vision_encoder import SigLip2VisionModel

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48}
    return SigLip2VisionModel(SigLip2VisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


_VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_TINY: dict[str, Any] = {
    "img_size": 64,
    "num_classes": 5,
    "embed_dims": (16, 24, 32, 48),
    "depths": (1, 1, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "window_sizes": (2, 2, 2, 2),
}
_EFFICIENT: dict[str, Any] = {"width_list": [8, 16, 24, 32, 48], "depth_list": [1, 1, 1, 1, 1]}
# Name -> (how it is built, what it takes).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    **{name: (functools.partial(_feature, name), drawn(1, 32, 32)) for name in _DESCRIPTORS},
    "KeyNet": (_module("feature.keynet.KeyNet", pretrained=False), drawn(1, 32, 32)),
    "XFeatModel": (_module("feature.xfeat.XFeatModel"), drawn(1, 64, 64)),
    "Unet of DISK": (
        _module("feature.disk._unets.Unet", in_features=3, size=3, down=[8, 16, 16], up=[16, 9]),
        drawn(3, 32, 32),
    ),
    "HourglassBackbone": (
        _module("feature.sold2.backbones.HourglassBackbone", depth=2, num_stacks=1),
        drawn(1, 64, 64),
    ),
    "ResNetFPN_8_2": (_with_config("feature.loftr.backbone.ResNetFPN_8_2", **_PYRAMID), drawn(1, 32, 32)),
    "LocalFeatureTransformer": (
        _with_config("feature.loftr.loftr_module.LocalFeatureTransformer", **_LOFTR),
        lambda batch, generator: tuple(drawn(length, 32)(batch, generator) for length in (9, 7)),
    ),
    "LocalFeatureTransformer:full": (
        _with_config("feature.loftr.loftr_module.LocalFeatureTransformer", **_LOFTR | {"attention": "full"}),
        lambda batch, generator: tuple(drawn(length, 32)(batch, generator) for length in (9, 7)),
    ),
    "VisionTransformer": (_module("models.vit.VisionTransformer", **_VIT), drawn(3, 32, 32)),
    "MobileViT": (_module("models.vit_mobile.MobileViT"), drawn(3, 64, 64)),
    "TinyViT": (_module("models.tiny_vit.TinyViT", **_TINY), drawn(3, 64, 64)),
    "EfficientViTBackbone": (
        _module("models.efficient_vit.backbone.EfficientViTBackbone", dim=8, **_EFFICIENT),
        drawn(3, 64, 64),
    ),
    "SigLip2VisionModel": (_siglip, drawn(3, 32, 32)),
    "DexiNed": (_module("models.dexined.DexiNed", pretrained=False), drawn(3, 64, 64)),
    "RRDBNet": (
        _module("models.rrdbnet.RRDBNet", num_in_ch=3, num_out_ch=3, num_feat=16, num_block=1, num_grow_ch=8),
        drawn(3, 16, 16),
    ),
    "SmallSRNet": (_module("models.small_sr.SmallSRNet", upscale_factor=2, pretrained=False), drawn(1, 16, 16)),
}


def architectures() -> Iterator[Architecture]:
    """Every network."""
    for name, (build, inputs) in NETWORKS.items():
        yield Architecture(name, build, inputs)
