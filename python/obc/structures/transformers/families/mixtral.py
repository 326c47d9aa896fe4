"""Experts that are separate modules, with the layer names of older Mixtral code and Llama's files."""

from obc.structures.transformers.family import Family, register

register(Family("mixtral", feed_forwards=(("w1", "w3", "w2"),)))
