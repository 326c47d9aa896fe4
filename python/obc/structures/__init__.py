"""What can be removed from a model: the protocol, traced structures, transformers by blocks."""
