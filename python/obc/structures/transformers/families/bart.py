"""BART, OPT, CLIP, SigLIP, Whisper and similar: ``fc1`` and ``fc2``; Phi calls its output projection ``dense``."""

from obc.structures.transformers.family import Family, register

register(Family("bart", feed_forwards=(("fc1", "fc2"),), outputs=("dense",)))
