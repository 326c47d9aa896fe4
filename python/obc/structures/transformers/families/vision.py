"""Vision encoders of Qwen-VL, GLM-V, BLIP, SAM and others: one projection, [all queries | all keys | all values]."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "vision",
        feed_forwards=(("linear_fc1", "linear_fc2"), ("pwconv1", "pwconv2")),
        fused_projections={"qkv": None},
        outputs=("proj", "projection"),
        headless=("rel_pos_h", "rel_pos_w"),
    )
)
