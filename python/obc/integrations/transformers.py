"""The names of :mod:`obc.structures.transformers`, in one place with the other integrations."""

from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned, transformer_groups

__all__ = ["TransformersStructure", "load_pruned", "save_pruned", "transformer_groups"]
