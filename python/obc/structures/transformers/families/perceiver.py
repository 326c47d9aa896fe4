"""Perceiver: attention that begins with norms of its inputs, and feed-forward blocks with names of their own."""

from obc.structures.transformers.family import Family, register

register(Family("perceiver", feed_forwards=(("dense1", "dense2"),), headless=("layernorm1", "layernorm2")))
