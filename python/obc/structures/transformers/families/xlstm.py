"""xLSTM: the heads of its matrix memories.

A head has its own rows of queries, keys, values and output gates, and one row each of the input and forget gates; the
following norm treats each head separately and has weights for each. With ``weight_mode="fused"`` these are the outputs
of two layers: [queries | keys | values | output gates] and [input gates | forget gates].
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels, value_of
from obc.structures.units import NotPrunableError

_NORM = "multihead_norm"


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    if "mixer_heads" not in kinds or not layers.has(name, _NORM) or layers.layer(name, "out_proj") is None:
        return
    (heads,) = layers.counts(joined(name, _NORM), "num_heads")
    keyed, valued = layers.counts(name, "qk_dim", "v_dim")
    if keyed % heads or valued % heads:
        raise NotPrunableError(f"{keyed} key channels and {valued} value channels can't be divided into {heads} heads")
    wide = channels(heads, valued // heads)
    projected = _projected(layers, name, channels(heads, keyed // heads), wide) | {_NORM: wide}
    counters = layers.counters([name], {("qk_dim",): (keyed, keyed // heads), ("v_dim",): (valued, valued // heads)})
    norm: dict[tuple[str, ...], tuple[int, int]] = {
        ("num_heads",): (heads, 1),
        ("num_features",): (valued, valued // heads),
    }
    yield block_of(
        layers,
        "mixer_heads",
        {joined(name, child): found for child, found in projected.items()},
        {joined(name, "out_proj"): wide},
        counters=(*counters, *layers.counters([joined(name, _NORM)], norm)),
        config=_config(layers, heads, keyed // heads, valued // heads),
        reads_config=name if hasattr(layers.modules[name], "config") else None,
    )


def _projected(layers: Layers, name: str, keyed: Tensor, valued: Tensor) -> dict[str, Tensor]:
    """Layer -> the out channels of every head."""
    heads = len(keyed)
    if layers.layer(name, "qkv_opreact") is not None:
        starts = (0, keyed.numel(), 2 * keyed.numel(), 2 * keyed.numel() + valued.numel())
        parts = [part + start for part, start in zip((keyed, keyed, valued, valued), starts, strict=True)]
        return {"qkv_opreact": torch.cat(parts, 1), "ifgate_preact": channels(heads, 1, 2)}
    gates = dict.fromkeys(("igate_preact", "fgate_preact"), channels(heads, 1))
    return {"q": keyed, "k": keyed, "v": valued, "ogate_preact": valued, **gates}


def _config(layers: Layers, heads: int, keyed: int, valued: int) -> dict[str, float]:
    """Keys that count heads, and widths that the config expresses as multiples of the hidden size."""
    hidden = value_of(layers.config, "hidden_size")
    if not hidden or value_of(layers.config, "num_heads") != heads:
        return {}
    return {"num_heads": 1, "qk_dim_factor": keyed / hidden, "v_dim_factor": valued / hidden}


register(
    Family(
        "xlstm",
        feed_forwards=(("proj_up_gate", "proj_up", "proj_down"),),
        fused_feed_forwards=(("proj_up_gate_z", "proj_down"),),
        attributes={"inner_width": ("up_proj_dim",)},
        blocks=_heads,
    )
)
