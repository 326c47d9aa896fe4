"""The removable parts of a model: the protocol, structures found by tracing, and transformers by blocks."""
