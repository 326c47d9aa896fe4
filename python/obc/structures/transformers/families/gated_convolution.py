"""Gated depthwise convolutions: those of LFM2, LFM3 and their vision encoders, and of conformers for speech.

LFM's in_proj returns [B | C | x]; the convolution is over B * x, and out_proj reads C * conv(B * x). In a conformer,
the first convolution returns [x | gate], and a norm follows the depthwise one. So every channel is on its own, besides
the norm's statistics. Conformers: Parakeet, Wav2Vec2-BERT, Wav2Vec2-Conformer, Seamless, FastSpeech2, LASR, Granite
Speech.
"""

from collections.abc import Collection, Iterator

from obc.model.layouts import is_depthwise
from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels

# (first layer, how often it returns each channel, depthwise convolution, norms behind it, last layer)
_MODULES = (
    ("in_proj", 3, "conv", (), "out_proj"),
    ("in_proj", 3, "spatial_conv", (), "out_proj"),
    ("pointwise_conv1", 2, "depthwise_conv", ("norm", "batch_norm", "depthwise_layer_norm"), "pointwise_conv2"),
    ("up_conv", 2, "depth_conv.conv", ("batch_norm",), "down_conv"),
)


def _channels(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    for first, copies, middle, norms, last in _MODULES:
        if "mixer_channels" not in kinds or any(layers.layer(name, child) is None for child in (first, middle, last)):
            continue
        if is_depthwise(layers.modules[joined(name, middle)]):
            width = layers.size(joined(name, last), "in")
            one = channels(width, 1)
            produced = {joined(name, child): one for child in (middle, *norms) if layers.has(name, child)}
            first_channels = {joined(name, first): channels(width, 1, copies)}
            yield block_of(layers, "mixer_channels", first_channels | produced, {joined(name, last): one})


register(Family("gated_convolution", blocks=_channels))
