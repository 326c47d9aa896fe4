"""Swin V2: a scale for every head, and a bias for every head that two layers compute from positions."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "swinv2",
        head_parameters={"logit_scale": 0},
        head_layers=("continuous_position_bias_mlp.2",),
        headless=("continuous_position_bias_mlp.0",),
    )
)
