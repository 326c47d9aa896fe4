"""ModernBERT, MPT: ``Wqkv`` is [all queries | all keys | all values], ``Wo`` the output projection, ``Wi`` [up | gate].

MPT keeps its heads: the model computes a slope (ALiBi) for each from their number.
"""

from collections.abc import Collection, Iterator

from torch import nn

from obc.structures.transformers.block import Block
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.heads import HeadChannels, Heads, head_channels
from obc.structures.transformers.layers import Layers
from obc.structures.units import NotPrunableError

_STACKED = ("ModernBertAttention",)


def _order(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    return head_channels(heads, kind, fused=True) if type(module).__name__ in _STACKED else None


def _refuse_slopes(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    if type(layers.modules[name]).__name__ == "MptAttention" and {"heads", "query_heads"} & set(kinds):
        raise NotPrunableError(
            "each head has a slope of its own (ALiBi), which the model computes from the number of heads"
        )
    yield from ()


register(
    Family(
        "mpt",
        fused_feed_forwards=(("Wi", "Wo"),),
        outputs=("Wo",),
        fused_projections={"Wqkv": _order},
        blocks=_refuse_slopes,
    )
)
