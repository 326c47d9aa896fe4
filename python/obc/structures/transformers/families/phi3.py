"""Phi-3: one projection of queries, keys and values, one of gate and up; its attention reads the config's heads."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "phi3",
        fused_feed_forwards=(("gate_up_proj", "down_proj"),),
        fused_projections={"qkv_proj": None},
        forward_reads_config=("qkv_proj",),
    )
)
