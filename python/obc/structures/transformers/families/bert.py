"""BERT, RoBERTa, ELECTRA, ViT, BEiT, Segformer, Reformer: projections in ``self``, the output in the module around."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "bert",
        feed_forwards=(("intermediate.dense", "output.dense"), ("dense.dense", "output.dense")),
        projections=(("query", "key", "value"),),
        outputs_around=("output.dense",),
        head_parameters={"relative_position_bias_table": 1},  # BEiT's and Swin's, in the attention or beside it
    )
)
