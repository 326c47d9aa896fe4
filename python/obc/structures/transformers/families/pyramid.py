"""PVT, Segformer: attention whose keys and values come from a sequence shortened by a convolution."""

from obc.structures.transformers.family import Family, register

register(Family("pyramid", headless=("sequence_reduction", "spatial_reduction", "layer_norm")))
