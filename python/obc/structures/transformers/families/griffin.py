"""Recurrent Gemma (Griffin, Hawk): the blocks of its gated linear recurrence, whose gates are block-diagonal."""

from collections.abc import Collection, Iterator

from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError

_GATES = ("input_gate_weight", "input_gate_bias", "recurrent_gate_weight", "recurrent_gate_bias")


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    if "mixer_heads" not in kinds or not layers.has(name, "rg_lru"):
        return
    unit = joined(name, "rg_lru")
    own = dict(layers.modules[unit].named_parameters(recurse=False))
    if set(own) != {"recurrent_param", *_GATES}:
        raise NotPrunableError(f"{unit} has other parameters than a recurrence and two gates")
    heads, width = len(own["input_gate_weight"]), len(own["recurrent_param"])
    wide, one = channels(heads, width // heads), channels(heads, 1)
    counters = layers.counters([name], {("lru_width",): (width, width // heads)})
    counters += layers.counters([unit], {("num_attention_heads",): (heads, 1)})
    yield block_of(
        layers,
        "mixer_heads",
        {joined(name, child): wide for child in ("linear_y", "linear_x", "conv_1d")},
        {joined(name, "linear_out"): wide},
        {joined(unit, key): (0, one if key in _GATES else wide) for key in ("recurrent_param", *_GATES)},
        counters=counters,
        # The config has one count for these blocks and for attention heads.
        config={"num_attention_heads": 1, "lru_width": width // heads} if layers.config is not None else {},
    )


register(Family("griffin", blocks=_heads))
