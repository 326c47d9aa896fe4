"""RWKV: the inner channels of its mixer, and those of its feed-forward blocks.

Every channel of the mixer is a separate recurrence: a row of key, value and receptance, a decay, a bonus for the first
token, and a column of the output.
"""

from collections.abc import Collection, Iterator

from obc.model.names import joined
from obc.structures.transformers.block import Block, Kind, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels


def _blocks(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    own = layers.modules[name]._parameters
    if "time_mix_receptance" not in own or layers.layer(name, "key") is None:
        return
    if "time_decay" in own and "mixer_channels" in kinds:
        yield _mixer(layers, name)
    elif "time_decay" not in own and "ffn" in kinds:
        one = channels(layers.size(joined(name, "key"), "out"), 1)
        config = layers.config_key(("intermediate_size",), 1)
        yield block_of(layers, "ffn", {joined(name, "key"): one}, {joined(name, "value"): one}, config=config)


def _mixer(layers: Layers, name: str) -> Block:
    output = joined(name, "output")
    width = layers.size(output, "in")
    one = channels(width, 1)
    return block_of(
        layers,
        "mixer_channels",
        {joined(name, child): one for child in ("key", "value", "receptance")},
        {output: one},
        {joined(name, key): (0, one) for key in ("time_decay", "time_first")},
        counters=layers.counters([name], {("attention_hidden_size",): (width, 1)}),
        config=layers.config_key(("attention_hidden_size",), 1),
        warning=(
            "RWKV's own code makes the cache as wide as the residual stream, not as the mixer: run the pruned"
            " model with use_cache=False, also in generate()"
        ),
    )


register(Family("rwkv", blocks=_blocks, kinds=(Kind("mixer_channels"),)))
