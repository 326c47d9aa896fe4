"""Mamba: the inner channels of its mixer."""

from collections.abc import Collection, Iterator

from obc.model.names import joined
from obc.structures.transformers.block import Block, Kind, block_of
from obc.structures.transformers.family import Family, attributes, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError

_LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


def _mixer(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    own = dict(module.named_parameters(recurse=False))
    # Mamba-2 and Zamba, whose mixers have heads, have their own files.
    if "mamba" not in kinds or "A_log" not in own or {"dt_bias", "x_proj_weight"} & set(own):
        return
    if set(own) != {"A_log", "D"} or not all(layers.has(name, child) for child in _LAYERS):
        raise NotPrunableError(f"{type(module).__name__} has other layers than Mamba's mixer")
    in_proj, conv1d, x_proj, dt_proj, out_proj = (joined(name, child) for child in _LAYERS)
    width = layers.size(out_proj, "in")
    one = channels(width, 1)
    yield block_of(
        layers,
        "mamba",
        {in_proj: channels(width, 1, 2), conv1d: one, dt_proj: one},
        {x_proj: one, out_proj: one},
        {joined(name, key): (0, one) for key in own},
        counters=layers.counters([name], {attributes("inner_width"): (width, 1)}),
        config=layers.config_key(("intermediate_size",), 1),
    )


register(Family("mamba", blocks=_mixer, kinds=(Kind("mamba"),)))
