"""PVT, Segformer: attention whose keys and values are of a sequence that a convolution of the stream shortened."""

from obc.structures.transformers.family import Family, register

register(Family("pyramid", headless=("sequence_reduction", "spatial_reduction", "layer_norm")))
