"""T5 and its kin: feed-forward blocks; attention adds a bias of its own for relative positions and is left out."""

from collections.abc import Collection, Iterator

from obc.structures.transformers.block import Block
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers
from obc.structures.units import NotPrunableError


def _refuse_attention(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    wanted = {"heads", "query_heads"} & set(kinds)
    if wanted and all(layers.layer(name, child) is not None for child in ("q", "k", "v", "o")):
        raise NotPrunableError("attention with a bias of its own for relative positions is not understood")
    yield from ()


register(Family("t5", feed_forwards=(("wi_0", "wi_1", "wo"), ("wi", "wo")), blocks=_refuse_attention))
