"""Mamba: the inner channels of its mixer."""

from collections.abc import Collection, Iterator

from obc.model.groups import ChannelGroup, Slice
from obc.model.names import joined
from obc.structures.transformers.axes import parameter_axes
from obc.structures.transformers.block import Block, Kind
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
    if own["A_log"].shape[0] != width or layers.size(in_proj, "out") != 2 * width:
        raise NotPrunableError(f"its widths do not agree on {width} inner channels")
    one = channels(width, 1)
    slices = (
        Slice(in_proj, "out", channels(width, 1, 2)),
        Slice(conv1d, "out", one),
        Slice(x_proj, "in", one),
        Slice(dt_proj, "out", one),
        Slice(joined(name, "A_log"), "out", one),
        Slice(joined(name, "D"), "out", one),
        Slice(out_proj, "in", one),
    )
    yield Block(
        ChannelGroup(in_proj, slices, "mamba"),
        axes=parameter_axes(name, ("A_log", "D")),
        counters=layers.counters([name], {attributes("inner_width"): (width, 1)}),
        config=layers.config_key(("intermediate_size",), 1),
    )


register(Family("mamba", blocks=_mixer, kinds=(Kind("mamba"),)))
