"""ALBERT: one block for all layers; its attention ends with the norm of the residual stream."""

from obc.structures.transformers.family import Family, register

register(Family("albert", feed_forwards=(("ffn", "ffn_output"),), headless=("LayerNorm",)))
