"""DistilBERT, XLM, Flaubert."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "distilbert",
        feed_forwards=(("lin1", "lin2"),),
        projections=(("q_lin", "k_lin", "v_lin"),),
        outputs=("out_lin",),
        attributes={"attention_width": ("dim",)},
    )
)
