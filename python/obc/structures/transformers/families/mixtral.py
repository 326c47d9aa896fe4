"""Experts that are modules of their own, as older Mixtral and the files of Llama call their layers."""

from obc.structures.transformers.family import Family, register

register(Family("mixtral", feed_forwards=(("w1", "w3", "w2"),)))
