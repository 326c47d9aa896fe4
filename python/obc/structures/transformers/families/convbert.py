"""ConvBERT: heads of attention and of a convolution over positions, whose kernels each head computes from its queries.

The output projection reads [all heads of attention | all heads of the convolution]; a unit is a head of both.
"""

from collections.abc import Collection, Iterator

from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, attributes, register
from obc.structures.transformers.layers import Layers, channels

_WIDE = ("query", "key", "value", "conv_out_layer", "key_conv_attn_layer.pointwise")


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    kernels = joined(name, "conv_kernel_layer")
    if "heads" not in kinds or not layers.has(name, "conv_kernel_layer"):
        return
    heads, size, kernel = layers.counts(name, "num_attention_heads", "attention_head_size", "conv_kernel_size")
    wide = channels(heads, size)
    counted = {attributes("heads"): (heads, 1), attributes("attention_width"): (heads * size, size)}
    yield block_of(
        layers,
        "heads",
        {**{joined(name, child): wide for child in _WIDE}, kernels: channels(heads, kernel)},
        {joined(name.rpartition(".")[0], "output.dense"): channels(heads, size, 2), kernels: wide},
        {joined(name, "key_conv_attn_layer.bias"): (0, wide)},
        counters=layers.counters([name], counted),
        attended=size,
    )


register(Family("convbert", blocks=_heads))
