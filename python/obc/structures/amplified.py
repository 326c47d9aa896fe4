"""Makes the channels of removed units large in a masked model, where they must not matter.

Without its removed units a model computes what it computes with them masked only if nothing but their consumers reads
them. An operation over channels that barely acts at the size of the example inputs (LocalResponseNorm, clipping by a
norm, a threshold on the largest channel) changes the other channels less than rounding does. If the removed channels
are made large, it shows; where each channel is treated alone, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.groups import ChannelGroup
from obc.model.names import named_modules, tensor_named
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule, rule_for
from obc.model.shared_copy import parameter_uses
from obc.structures.masking import channels_normalised, lost_channels, multiply_along
from obc.structures.norm_axis import norm_axis, norm_channels
from obc.structures.probing import each_tensor

# Sizes of the removed channels in units of the others, or of 1 if those are smaller. The first changes even a
# LocalResponseNorm of torch's default alpha, 1e-4; if it overflows behind an exponential, or in float16, the second.
SIZES = (1e4, 30.0)


def amplify(masked: nn.Module, groups: Sequence[ChannelGroup], removed: Mapping[str, Tensor], size: float) -> None:
    """Let the layers and norms of ``masked`` return large numbers of both signs in these units' channels.

    Of weights outside layers, the entries that make these channels are made large.

    Layers whose weights are used without calling them return what they did. So do routers, whose removed experts have a
    logit of minus infinity already.

    Args:
        masked: from :func:`obc.structures.masking.masked_copy`; it is changed.
        removed: group name -> int64 indices of units.
        size: of the large numbers; see :data:`SIZES`.
    """
    widening = [group for group in groups if not group.is_depth and group.kind != "experts"]
    modules = dict(named_modules(masked))
    zero = {name for group in groups for name in group.multiplied}
    parts, uses = [part for group in widening for part in group.slices], parameter_uses(masked.modules())
    dims = {part.module: part.dim for part in parts if part.side == "out" and part.dim is not None}
    for (name, side), channels in lost_channels(widening, removed).items():
        module = modules.get(name)
        if side == "in" or name in zero:
            continue
        if module is not None and (written := _written(module)) is not None:
            enlarge = _enlarge(channels, *written, size)
            hook = _in_each_direction(*written, enlarge) if is_recurrent(module) else enlarge
            module.register_forward_hook(hook, with_kwargs=True)
        elif name in dims and sum(length > 1 for length in tensor_named(modules, name).shape) > 1:
            multiply_along(uses, modules, name, dims[name], channels, size)


def _written(module: nn.Module) -> tuple[int, int] | None:
    """(channels, their dimension) of a module's output; None where it is not known."""
    if is_recurrent(module):
        return module.hidden_size, -1
    if (found := norm_channels(module)) is not None:
        return found
    rule = rule_for(module)
    if not isinstance(rule, Rule) or rule.out_dim is None or rule.packed:
        return None
    weight = getattr(module, rule.weight)
    return weight.shape[rule.out_axis] * (rule.groups if rule.transposed else 1), rule.out_dim


def _in_each_direction(width: int, dim: int, enlarge: Callable[..., Any]) -> Callable[..., Any]:
    """The hook ``enlarge`` for a recurrent layer's outputs and states, whose last dimension holds the directions."""

    def each(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return each_tensor(output, lambda y: enlarge(module, args, kwargs, y.unflatten(dim, (-1, width))).flatten(-2))

    return each


def _enlarge(channels: Tensor, width: int, dim: int, size: float) -> Callable[..., Any]:
    """A forward hook that puts large numbers into ``channels`` of an output of this width."""

    def enlarge(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.dim():
            return output
        axis: int | None = dim % output.dim()
        if channels_normalised(module) is not None:
            axis = norm_axis(module.forward, args, kwargs, width, dim)
        if axis is None or axis >= output.dim() or output.shape[axis] != width:
            return output
        lost = channels.to(output.device)
        signs = 1 - 2 * (torch.arange(len(lost), device=lost.device) % 2)
        unit = output.float().square().mean().sqrt().clamp(min=1.0)
        # They differ between positions, as activations do.
        spread = 1.5 + 0.5 * output.index_select(axis, lost).tanh()
        large = spread * (signs * size * unit).view([-1 if one == axis else 1 for one in range(output.dim())])
        return output.index_copy(axis, lost, large.to(output.dtype))

    return enlarge
