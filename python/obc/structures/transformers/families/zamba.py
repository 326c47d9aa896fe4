"""Zamba: Mamba's mixer in heads; its projections to the state space are parameters with an entry for every head.

in_proj returns, for one channel after another, its input and its gate.
"""

from collections.abc import Collection, Iterator

from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels, value_of
from obc.structures.units import NotPrunableError

_OF_HEADS = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    own = dict(module.named_parameters(recurse=False))
    if "mixer_heads" not in kinds or "x_proj_weight" not in own:
        return
    if set(own) != set(_OF_HEADS):
        raise NotPrunableError(f"{type(module).__name__} has other parameters than {', '.join(_OF_HEADS)}")
    in_proj, conv1d, out_proj = (joined(name, child) for child in ("in_proj", "conv1d", "out_proj"))
    heads, width = len(own["x_proj_weight"]), layers.size(out_proj, "in")
    size, hidden = width // heads, value_of(layers.config, "hidden_size")
    wide = channels(heads, size)
    said = bool(hidden) and value_of(layers.config, "n_mamba_heads") == heads
    yield block_of(
        layers,
        "mixer_heads",
        {in_proj: channels(heads, 2 * size), conv1d: wide},
        {out_proj: wide},
        {joined(name, key): (0, channels(heads, 1)) for key in _OF_HEADS},
        counters=layers.counters([name], {("n_mamba_heads",): (heads, 1), ("intermediate_size",): (width, size)}),
        config={"n_mamba_heads": 1, "mamba_expand": size / hidden} if said else {},
    )


register(Family("zamba", blocks=_heads))
