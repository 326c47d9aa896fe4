"""GPT-NeoX, Pythia, Falcon, BLOOM: their feed-forward blocks."""

from obc.structures.transformers.family import Family, register

register(Family("gpt_neox", feed_forwards=(("dense_h_to_4h", "dense_4h_to_h"),)))
