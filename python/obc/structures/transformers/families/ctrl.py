"""CTRL: its own names, and a feed-forward block that is a sequence."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "ctrl",
        feed_forwards=(("ffn.0", "ffn.2"),),
        projections=(("Wq", "Wk", "Wv"),),
        config_keys={"inner_width": ("dff",)},
    )
)
