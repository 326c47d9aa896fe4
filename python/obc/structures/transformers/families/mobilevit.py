"""Inverted residuals of MobileNetV2, MobileViT and MobileViTV2; V2 has feed-forward blocks of 1x1 convolutions."""

from obc.structures.transformers.block import Kind
from obc.structures.transformers.family import Family, register

register(
    Family(
        "mobilevit",
        inverted_residuals=(("expand_1x1", "conv_3x3", "reduce_1x1"), ("conv1", "conv2")),
        kinds=(Kind("inverted_residual"),),
    )
)
