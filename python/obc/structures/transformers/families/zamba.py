"""Zamba: Mamba's mixer in heads; its projections to the state space are parameters with an entry for every head.

in_proj returns, for one channel after another, its input and its gate.
"""

from collections.abc import Collection, Iterator

from obc.model.groups import ChannelGroup, Slice
from obc.model.names import joined
from obc.structures.transformers.axes import parameter_axes
from obc.structures.transformers.block import Block
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels, value_of
from obc.structures.units import NotPrunableError

_OF_HEADS = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    own = dict(module.named_parameters(recurse=False))
    if "mixer_heads" not in kinds or "x_proj_weight" not in own:
        return
    in_proj, conv1d, out_proj = (joined(name, child) for child in ("in_proj", "conv1d", "out_proj"))
    heads, width = len(own["x_proj_weight"]), layers.size(out_proj, "in")
    if set(own) != set(_OF_HEADS) or any(len(parameter) != heads for parameter in own.values()) or width % heads:
        raise NotPrunableError(f"{type(module).__name__} has other parameters than {', '.join(_OF_HEADS)}")
    if layers.size(in_proj, "out") != 2 * width or layers.size(conv1d, "out") != width:
        raise NotPrunableError(f"its widths do not agree on {width} inner channels")
    size = width // heads
    wide = channels(heads, size)
    slices = [Slice(in_proj, "out", channels(heads, 2 * size)), Slice(conv1d, "out", wide)]
    slices += [Slice(joined(name, key), "out", channels(heads, 1)) for key in _OF_HEADS]
    hidden = value_of(layers.config, "hidden_size")
    said = bool(hidden) and value_of(layers.config, "n_mamba_heads") == heads
    yield Block(
        ChannelGroup(in_proj, (*slices, Slice(out_proj, "in", wide)), "mixer_heads"),
        axes=parameter_axes(name, _OF_HEADS),
        counters=layers.counters([name], {("n_mamba_heads",): (heads, 1), ("intermediate_size",): (width, size)}),
        config={"n_mamba_heads": 1, "mamba_expand": size / hidden} if said else {},
    )


register(Family("zamba", blocks=_heads))
