"""GPT-BigCode without multi-query attention: [query | key | value] of the first head, of the second, and so on."""

from torch import nn

from obc.structures.transformers.family import Family, register
from obc.structures.transformers.heads import HeadChannels, Heads
from obc.structures.transformers.layers import channels


def _by_head(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    if getattr(module, "multi_query", None) is not False:
        return None
    return HeadChannels([channels(heads.queries, 3 * heads.size)], channels(heads.queries, heads.size))


register(Family("gpt_bigcode", fused_projections={"c_attn": _by_head}))
