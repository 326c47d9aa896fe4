"""Where a norm's channels lie in its input, if several dimensions are as long: images as wide as they have channels.

Only the norm knows. Its weights fit no input with one channel more, but one with one position more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from obc.model.evaluation import first_floating
from obc.model.layouts import held_width
from obc.model.rules import Rule, rule_for


def norm_channels(module: nn.Module) -> tuple[int, int] | None:
    """(channels, their usual dimension) of a norm, or of another module with a weight for each channel; else None."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.normalized_shape[-1], -1
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return held_width(module) or 0, 1
    rule = rule_for(module)
    if not isinstance(rule, Rule) or not rule.elementwise or rule.out_dim is None:
        return None
    size = getattr(module, rule.weight).shape[-1]
    return (size, rule.out_dim) if size > 1 else None  # else one scale of all channels


class NormAxisError(ValueError):
    """Which dimension holds a norm's channels is not known."""


def norm_axis(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], size: int, dim: int
) -> int | None:
    """The dimension of a norm's input, ``dim`` or 1, that holds its channels; None if neither is ``size`` long.

    Args:
        forward: the norm's forward, which is called only if both are.
        args, kwargs: what it reads; tensors of the shape of the first are lengthened with it.
        size: number of its channels.
        dim: where they usually are.

    Raises:
        NormAxisError: both are, and ``forward`` runs with more entries along both, or along neither.
    """
    x = first_floating(args, kwargs)
    if x is None:
        return None
    shape = x.shape
    axes = [axis for axis in dict.fromkeys((dim % x.dim(), 1)) if x.dim() > axis and shape[axis] == size]
    if len(axes) < 2:
        return axes[0] if axes else None

    def fits(axis: int) -> bool:
        def longer(value: Any) -> Any:
            alike = isinstance(value, Tensor) and value.shape == shape
            return torch.cat([value, value.narrow(axis, 0, 1)], axis) if alike else value

        try:
            with torch.no_grad():
                forward(*map(longer, args), **{key: longer(one) for key, one in kwargs.items()})
        except Exception:  # the norm's own code
            return False
        return True

    refused = [axis for axis in axes if not fits(axis)]
    if len(refused) != 1:
        raise NormAxisError(
            f"which dimension of an input {tuple(shape)} holds the {size} channels of a norm is not known; pass "
            "example_inputs of another size"
        )
    return refused[0]
