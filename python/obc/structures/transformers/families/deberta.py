"""DeBERTa-v2 and v3: attention to contents and to relative positions, which have projections of their own."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "deberta",
        projections=(("query_proj", "key_proj", "value_proj"),),
        head_layers=("pos_key_proj", "pos_query_proj"),
    )
)
