"""GPT-NeoX, Pythia, Persimmon, Fuyu, Falcon, BLOOM: [query | key | value] of the first head, of the second, and so on.

Falcon's newer layers have [queries | key | value] of every head of keys and values, and with multi-query attention
[all queries | key | value].
"""

import torch
from torch import nn

from obc.structures.transformers.family import Family, register
from obc.structures.transformers.heads import HeadChannels, Heads, head_channels
from obc.structures.transformers.layers import channels

_BY_HEAD = ("GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention", "BloomAttention", "FalconAttention")


def _order(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    if type(module).__name__ not in _BY_HEAD:
        return None
    if getattr(module, "new_decoder_architecture", False):
        return _by_shared_head(heads, kind)
    if getattr(module, "multi_query", False):
        return head_channels(heads, kind, fused=True)
    return HeadChannels([channels(heads.queries, 3 * heads.size)], channels(heads.queries, heads.size))


def _by_shared_head(heads: Heads, kind: str) -> HeadChannels:
    ratio, size = heads.queries // heads.shared, heads.size
    rows = torch.arange(heads.shared * (ratio + 2) * size).reshape(heads.shared, ratio + 2, size)
    if kind == "heads":
        return HeadChannels([rows.flatten(1)], channels(heads.shared, ratio * size))
    return HeadChannels([rows[:, :ratio].transpose(0, 1).flatten(1)], channels(ratio, size, heads.shared))


register(
    Family(
        "gpt_neox",
        feed_forwards=(("dense_h_to_4h", "dense_4h_to_h"),),
        fused_projections={"query_key_value": _order},
        headless=("dense_bias",),
    )
)
