"""DeBERTa, first version: one projection with [query | key | value] of the first head, of the second, and so on.

Queries and values have biases of their own, and positions have projections.
"""

from collections.abc import Collection, Iterator

from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, attributes, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError

_BIASES = ("q_bias", "v_bias")
_POSITIONS = ("pos_proj", "pos_q_proj")


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    own = dict(layers.modules[name].named_parameters(recurse=False))
    if "heads" not in kinds or set(own) != set(_BIASES) or layers.layer(name, "in_proj") is None:
        return
    count, size = layers.counts(name, "num_attention_heads", "attention_head_size")
    parent = name.rpartition(".")[0]
    in_proj, output = joined(name, "in_proj"), joined(parent, "output.dense")
    if layers.layer("", output) is None:
        raise NotPrunableError("no output projection was found")
    if any(layers.has(name, child) for child in ("head_logits_proj", "head_weights_proj")):
        raise NotPrunableError("its heads are mixed with each other (talking heads)")
    positions = [joined(name, child) for child in _POSITIONS if layers.layer(name, child) is not None]
    wide = channels(count, size)
    counted = {attributes("heads"): (count, 1), attributes("attention_width"): (count * size, size)}
    yield block_of(
        layers,
        "heads",
        {in_proj: channels(count, 3 * size), **dict.fromkeys(positions, wide)},
        {output: wide},
        {joined(name, key): (0, wide) for key in _BIASES},
        counters=layers.counters([name], counted),
        config={"num_attention_heads": 1} if layers.config is not None else {},
        config_fixed={"head_dim": size},
        attended=size,
    )


register(Family("deberta_v1", blocks=_heads))
