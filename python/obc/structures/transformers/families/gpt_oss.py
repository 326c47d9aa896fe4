"""gpt-oss, Flint, Granite with sliding windows: every head has a sink, an additional logit in its softmax."""

from obc.structures.transformers.family import Family, register

register(Family("gpt_oss", head_parameters={"sinks": 0}))
