"""EfficientNet, and ALIGN's image model: inverted residuals with a gate."""

from obc.structures.transformers.family import Family, register

register(Family("efficientnet", inverted_residuals=(("expansion", "depthwise_conv", "squeeze_excite", "projection"),)))
