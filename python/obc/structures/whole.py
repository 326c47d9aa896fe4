"""Why modules and parameters with weights keep their widths if no group has them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from obc.model.layouts import layout_of
from obc.model.names import joined
from obc.structures.measure import Usage

_KNOWN = (nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)


def kept_whole(name: str, module: nn.Module, usage: Usage) -> Iterator[tuple[str, str]]:
    """(name, reason) of a module with weights; or, for a module of unknown kind, of each matrix that it holds.

    Args:
        module: a module that no group has, and that is not left out for another reason.
    """
    if layout_of(module) is not None:
        called = "neither tracing nor running the model finds what reads its channels"
        yield name, called if name in usage.positions else "it is not called: what uses its weight is not a layer"
    elif isinstance(module, nn.RNNBase):
        called = "neither tracing nor running the model finds which of its hidden units can go"
        yield name, "a plan can't describe its projections (proj_size)" if module.proj_size else called
    elif isinstance(module, nn.RNNCellBase):
        yield name, f"each hidden channel of a {type(module).__name__} is read by all others in the next step"
    elif isinstance(module, _KNOWN):
        yield name, f"neither tracing nor running the model finds channels of this {type(module).__name__} that can go"
    else:
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and min(parameter.shape) > 1:
                yield joined(name, key), "it is a weight outside layers, and no channels are found along it"
