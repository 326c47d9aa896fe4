"""GPT-2, ImageGPT, and the feed-forward blocks of GPT-Neo and StarCoder2."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "gpt2",
        feed_forwards=(("c_fc", "c_proj"),),
        fused_projections={"c_attn": None},
        outputs=("c_proj",),
        attributes={"attention_width": ("split_size",)},
    )
)
