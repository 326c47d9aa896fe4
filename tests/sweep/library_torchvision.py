"""Networks of torchvision, one or two of each of its families: classification, segmentation, video, optical flow."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture, Inputs, drawn
from torch import nn
from torchvision_operators import import_torchvision

PACKAGES = ("torchvision", "pillow")
NAMES = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mnasnet0_5 mobilenet_v2
mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0
squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 wide_resnet50_2
lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50
mc3_18 r3d_18 r2plus1d_18 s3d swin3d_t raft_small
"""
SEGMENTATION = ("lraspp", "deeplabv3", "fcn")
SIZES = {"inception_v3": 299, "alexnet": 80, "vit_b_16": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "vit_b_16": {"image_size": 32},
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


def _two_images(batch: int, generator: torch.Generator) -> Any:
    return tuple(torch.randn(batch, 3, 128, 128, generator=generator) for _ in range(2))


INPUTS: dict[str, Inputs] = {
    "mc3_18": drawn(3, 4, 32, 32),
    "r3d_18": drawn(3, 4, 32, 32),
    "r2plus1d_18": drawn(3, 4, 32, 32),
    "s3d": drawn(3, 16, 64, 64),
    "swin3d_t": drawn(3, 4, 32, 32),
    "raft_small": _two_images,
}


def _maxvit() -> nn.Module:
    import_torchvision()
    from torchvision.models.maxvit import MaxVit

    return MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
    )


def _build(name: str) -> nn.Module:
    import_torchvision()
    from torchvision import models

    options = {} if name.startswith("raft") else {"num_classes": 10}
    if name.startswith(SEGMENTATION):
        options["weights_backbone"] = None
    return models.get_model(name, weights=None, **options, **OPTIONS.get(name, {}))


def architectures() -> Iterator[Architecture]:
    """One of each family, and a second where it is built otherwise."""
    for name in NAMES.split():
        size = SIZES.get(name, 64)
        yield Architecture(name, functools.partial(_build, name), INPUTS.get(name, drawn(3, size, size)))
    yield Architecture("maxvit", _maxvit, drawn(3, 64, 64))
