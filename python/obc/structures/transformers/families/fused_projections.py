"""Attention whose queries, keys and values are outputs of one layer: the order of heads in it, by family.

========================== =========================================================================================
GPT-BigCode                without multi-query attention [query | key | value] of the first head, of the second, ...
ModernBERT, MPT            ``Wqkv`` is [queries | keys | values], ``Wo`` the output projection, ``Wi`` [up | gate]
CodeGen                    [queries | values | keys] of each of ``mp_num`` blocks
GPT-NeoX, Pythia, Fuyu,    [query | key | value] of the first head, of the second, and so on. Falcon's newer layers
Persimmon, Falcon, BLOOM   have [queries | key | value] of every head of keys and values, and with multi-query
                           attention [all queries | key | value]
========================== =========================================================================================
"""

import torch
from torch import nn

from obc.structures.transformers.family import Family, register
from obc.structures.transformers.heads import HeadChannels, Heads, head_channels
from obc.structures.transformers.layers import channels
from obc.structures.units import NotPrunableError

_STACKED = ("ModernBertAttention",)
_BY_HEAD = ("GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention", "BloomAttention", "FalconAttention")


def _by_head(heads: Heads) -> HeadChannels:
    return HeadChannels([channels(heads.queries, 3 * heads.size)], channels(heads.queries, heads.size))


def _gpt_bigcode(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    return _by_head(heads) if getattr(module, "multi_query", None) is False else None


def _mpt(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    return head_channels(heads, kind, fused=True) if type(module).__name__ in _STACKED else None


def _codegen(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    """If a block is one head and the module counts the blocks, a head is a unit; else one head of each block."""
    counted = isinstance(getattr(module, "mp_num", None), int)
    if not counted and type(module).__name__ != "CodeGenAttention":
        return None
    # transformers 5.17 has the number as a constant of forward.
    blocks = getattr(module, "mp_num", 4)
    count, size = heads.queries, heads.size
    if blocks == count and counted:
        return HeadChannels([channels(count, 3 * size)], channels(count, size), ("mp_num",))
    if count % blocks or count == blocks:
        raise NotPrunableError(f"its {count} heads are stored in {blocks} blocks")
    inside = count // blocks
    return HeadChannels([channels(inside, size, 3 * blocks)], channels(inside, size, blocks))


def _gpt_neox(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    if type(module).__name__ not in _BY_HEAD:
        return None
    if getattr(module, "new_decoder_architecture", False):
        return _by_shared_head(heads, kind)
    if getattr(module, "multi_query", False):
        return head_channels(heads, kind, fused=True)
    return _by_head(heads)


def _by_shared_head(heads: Heads, kind: str) -> HeadChannels:
    ratio, size = heads.queries // heads.shared, heads.size
    rows = torch.arange(heads.shared * (ratio + 2) * size, device="cpu").reshape(heads.shared, ratio + 2, size)
    if kind == "heads":
        return HeadChannels([rows.flatten(1)], channels(heads.shared, ratio * size))
    return HeadChannels([rows[:, :ratio].transpose(0, 1).flatten(1)], channels(ratio, size, heads.shared))


register(
    Family(
        "fused_projections",
        feed_forwards=(("fc_in", "fc_out"), ("dense_h_to_4h", "dense_4h_to_h")),
        fused_feed_forwards=(("Wi", "Wo"),),
        fused_projections={
            "c_attn": _gpt_bigcode,
            "Wqkv": _mpt,
            "qkv_proj": _codegen,
            "query_key_value": _gpt_neox,
        },
        outputs=("Wo",),
        headless=("dense_bias",),
    )
)
