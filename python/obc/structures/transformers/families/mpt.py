"""ModernBERT, MPT: ``Wqkv`` is [queries | keys | values], ``Wo`` the output projection, ``Wi`` [up | gate]."""

from torch import nn

from obc.structures.transformers.family import Family, register
from obc.structures.transformers.heads import HeadChannels, Heads, head_channels

_STACKED = ("ModernBertAttention",)


def _order(module: nn.Module, heads: Heads, kind: str) -> HeadChannels | None:
    return head_channels(heads, kind, fused=True) if type(module).__name__ in _STACKED else None


register(
    Family(
        "mpt",
        fused_feed_forwards=(("Wi", "Wo"),),
        outputs=("Wo",),
        fused_projections={"Wqkv": _order},
    )
)
