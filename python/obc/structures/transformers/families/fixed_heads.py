"""BigBird, DBRX, ProphetNet, TrOCR: classes of attention that run with all their heads only: they stay."""

from collections.abc import Collection, Iterator

from obc.structures.transformers.block import Block
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers
from obc.structures.units import NotPrunableError

_RESHAPES = ("DbrxAttention", "TrOCRAttention", "ProphetNetAttention", "ProphetNetNgramSelfAttention")
_REBUILT = ("BigBirdSelfAttention", "BigBirdBlockSparseAttention")


def _refuse(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    attention = type(layers.modules[name]).__name__
    if {"heads", "query_heads"} & set(kinds):
        if attention in _RESHAPES:
            raise NotPrunableError(f"{attention} gives its heads together the width of the residual stream")
        if attention in _REBUILT and getattr(layers.config, "attention_type", None) != "original_full":
            raise NotPrunableError(
                "BigBird builds its attention anew from the config where an input is short; with "
                "config.attention_type = 'original_full' its heads can go"
            )
    yield from ()


register(Family("fixed_heads", feed_forwards=(("intermediate", "output"),), blocks=_refuse))
