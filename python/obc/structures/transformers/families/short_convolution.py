"""LFM2, LFM3 and their mixtures and vision encoders: the channels of gated short convolutions.

in_proj returns [B | C | x]; the convolution is depthwise over B * x, and out_proj reads C * conv(B * x): every channel
is on its own.
"""

from collections.abc import Collection, Iterator

from obc.model.layouts import is_depthwise
from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels

_CONVOLUTIONS = ("conv", "spatial_conv")


def _channels(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    conv = next((child for child in _CONVOLUTIONS if layers.has(name, child)), None)
    if "mixer_channels" not in kinds or conv is None or not is_depthwise(layers.modules[joined(name, conv)]):
        return
    if layers.layer(name, "in_proj") is None or layers.layer(name, "out_proj") is None:
        return
    in_proj, conv, out_proj = (joined(name, child) for child in ("in_proj", conv, "out_proj"))
    width = layers.size(out_proj, "in")
    one = channels(width, 1)
    yield block_of(layers, "mixer_channels", {in_proj: channels(width, 1, 3), conv: one}, {out_proj: one})


register(Family("short_convolution", blocks=_channels))
