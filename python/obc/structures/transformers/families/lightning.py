"""MiniMax: the heads of its lightning attention.

qkv_proj returns [query | key | value] of the first head, of the second, and so on. Every head has a decay, kept in
buffers. A norm over the channels of all heads takes its statistics from the remaining ones.
"""

from collections.abc import Collection, Iterator

from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels

# Buffer -> the dimension of its heads.
_DECAYS = {"slope_rate": 0, "query_decay": 0, "key_decay": 0, "diagonal_decay": 1}


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    if "mixer_heads" not in kinds or not _DECAYS.keys() <= layers.modules[name]._buffers.keys():
        return
    heads, size = layers.counts(name, "num_attention_heads", "head_dim")
    wide = channels(heads, size)
    yield block_of(
        layers,
        "mixer_heads",
        {
            joined(name, "qkv_proj"): channels(heads, 3 * size),
            **{joined(name, child): wide for child in ("norm", "output_gate")},
        },
        {joined(name, "out_proj"): wide},
        {joined(name, key): (dim, channels(heads, 1)) for key, dim in _DECAYS.items()},
        counters=layers.counters([name], {("num_attention_heads",): (heads, 1)}),
        # The config has one count for these heads and for those of attention.
        config={"num_attention_heads": 1} if layers.config is not None else {},
        config_fixed={"head_dim": size},
    )


register(Family("lightning", blocks=_heads))
