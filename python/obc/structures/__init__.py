"""What can be removed from a model: the protocol, structures found by tracing, and transformers by blocks."""
