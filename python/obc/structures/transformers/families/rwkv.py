"""RWKV: the inner channels of its mixer, and those of its feed-forward blocks.

Every channel of the mixer is a separate recurrence: a row of key, value and receptance, a decay, a bonus for the first
token, and a column of the output.
"""

from collections.abc import Collection, Iterator

from obc.model.groups import ChannelGroup, Slice
from obc.model.names import joined
from obc.structures.transformers.axes import parameter_axes
from obc.structures.transformers.block import Block, Kind
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError

_OF_CHANNELS = ("time_decay", "time_first")


def _blocks(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    own = layers.modules[name]._parameters
    if "time_mix_receptance" not in own or layers.layer(name, "key") is None:
        return
    if "time_decay" in own and "mixer_channels" in kinds:
        yield _mixer(layers, name)
    elif "time_decay" not in own and "ffn" in kinds:
        key, value = joined(name, "key"), joined(name, "value")
        width = layers.size(key, "out")
        if layers.size(value, "in") != width:
            raise NotPrunableError(f"{key} has {width} outputs, {value} {layers.size(value, 'in')} inputs")
        one = channels(width, 1)
        yield Block(
            ChannelGroup(key, (Slice(key, "out", one), Slice(value, "in", one)), "ffn"),
            config=layers.config_key(("intermediate_size",), 1),
        )


def _mixer(layers: Layers, name: str) -> Block:
    producers = [joined(name, child) for child in ("key", "value", "receptance")]
    output, own = joined(name, "output"), layers.modules[name]._parameters
    width = layers.size(output, "in")
    sizes = [layers.size(layer, "out") for layer in producers]
    sizes += [parameter.numel() for key in _OF_CHANNELS if (parameter := own.get(key)) is not None]
    if sizes != [width] * 5:
        raise NotPrunableError(f"its layers and parameters have {sizes} channels, not {width}")
    one = channels(width, 1)
    slices = [Slice(layer, "out", one) for layer in producers]
    slices += [Slice(joined(name, key), "out", one) for key in _OF_CHANNELS]
    return Block(
        ChannelGroup(producers[0], (*slices, Slice(output, "in", one)), "mixer_channels"),
        axes=parameter_axes(name, _OF_CHANNELS),
        counters=layers.counters([name], {("attention_hidden_size",): (width, 1)}),
        config=layers.config_key(("attention_hidden_size",), 1),
        warning=(
            "RWKV's own code makes the cache as wide as the residual stream, not as the mixer: run the pruned"
            " model with use_cache=False, also in generate()"
        ),
    )


register(Family("rwkv", blocks=_blocks, kinds=(Kind("mixer_channels"),)))
