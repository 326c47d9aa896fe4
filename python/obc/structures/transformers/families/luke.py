"""LUKE, Nystromformer: further projections, or filters over positions, with a part for every head."""

from obc.structures.transformers.family import Family, register

register(
    Family(
        "luke",
        outputs_around=("output",),  # BigBird-Pegasus
        head_layers=("w2e_query", "e2w_query", "e2e_query", "conv"),
    )
)
