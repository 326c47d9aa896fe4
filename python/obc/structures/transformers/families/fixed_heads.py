"""Attention that keeps its heads, with the reasons: Aria's projector, BigBird, vision encoders of BLIP and Florence,
DBRX, GroupViT, LED, Longformer, NeoMME, Pegasus-X, ProphetNet, PVT v2, SqueezeBERT, TrOCR, XLNet, and ALiBi.

ALiBi gives each head a slope, which the model computes from the number of heads: BLOOM, MPT, some Falcon models.
"""

from collections.abc import Collection, Iterator

from obc.structures.transformers.block import Block
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers
from obc.structures.units import NotPrunableError

_REBUILT = (
    *("BigBirdSelfAttention", "BigBirdBlockSparseAttention"),
    *("BigBirdPegasusSelfAttention", "BigBirdPegasusBlockSparseAttention"),
)
_SLOPED = ("BloomAttention", "MptAttention")
_KEEPING_WIDTH = (
    *("BlipAttention", "Blip2Attention", "InstructBlipAttention", "InstructBlipVideoAttention", "GroupViTAttention"),
    *("DbrxAttention", "Florence2VisionWindowAttention", "LEDDecoderAttention", "LEDEncoderSelfAttention"),
    *("LongformerSelfAttention", "PegasusXGlobalLocalAttention", "PvtV2SelfAttention", "TrOCRAttention"),
    *("ProphetNetAttention", "ProphetNetNgramSelfAttention"),
)
_REASONS = {
    **dict.fromkeys(_KEEPING_WIDTH, "gives its heads together the width of the residual stream"),
    "AriaCrossAttention": "passes its projections through torch's attention, which projects them once more",
    "NeoMMEAttention": "adds embeddings of tokens, as wide as all heads, to its values",
    "SqueezeBertSelfAttention": "has grouped convolutions as projections",
    "XLNetRelativeAttention": "holds its projections as parameters, not as layers",
}


def _refuse(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    attention = type(module).__name__
    if {"heads", "query_heads"} & set(kinds):
        if attention in _SLOPED or (attention == "FalconAttention" and getattr(module.config, "alibi", False)):
            raise NotPrunableError(
                "each head has a slope of its own (ALiBi), which the model computes from the number of heads"
            )
        if attention in _REASONS:
            raise NotPrunableError(f"{attention} {_REASONS[attention]}")
        if attention in _REBUILT and getattr(layers.config, "attention_type", None) != "original_full":
            raise NotPrunableError(
                "BigBird builds its attention anew from the config where an input is short; with "
                "config.attention_type = 'original_full' its heads can go"
            )
    yield from ()


register(Family("fixed_heads", feed_forwards=(("intermediate", "output"), ("layer_1", "layer_2")), blocks=_refuse))
