"""Perceiver: attention that begins with norms of its inputs; feed-forward blocks with their own names."""

from obc.structures.transformers.family import Family, register

register(Family("perceiver", feed_forwards=(("dense1", "dense2"),), headless=("layernorm1", "layernorm2")))
