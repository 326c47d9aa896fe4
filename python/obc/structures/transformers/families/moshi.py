"""Moshi: layers inside wrapper modules; ``fc1`` is [gate | up]."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "moshi",
        fused_feed_forwards=(("fc1", "fc2"),),
        projections=(("q_proj.linear", "k_proj.linear", "v_proj.linear"),),
        outputs=("o_proj.linear",),
    )
)
