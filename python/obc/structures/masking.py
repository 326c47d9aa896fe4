"""The model that pruning must reproduce: the unpruned one in which removed units are read as zero.

A layer that reads a zero channel computes the same as one whose weights for the channel are zero. So the columns of the
consumers' weights are set to zero; this also works for layers whose weights are used without calling them.

Three kinds of modules compute something else without a channel than with a zero channel, and get exact counterparts:
norms over channels take their statistics from the remaining channels; routers give removed experts a logit of minus
infinity; :class:`torch.nn.MultiheadAttention`, if it loses channels inside its heads, scales its products by the
remaining width.

Where a product outside layers reads channels, those of queries and keys within a head, it reads zeros of the layers and
parameters themselves.

A whole block without its unit returns its input; a branch returns zeros. Both still run, so that their stand-ins in the
pruned model are compared with the real ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from obc.model.channel_dims import dims_of_side
from obc.model.evaluation import first_floating
from obc.model.experts import is_correction
from obc.model.groups import ChannelGroup, Side
from obc.model.kept import Kept, staying
from obc.model.layouts import set_held_width
from obc.model.names import named_modules, tensor_named
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule, rule_for
from obc.model.shared_copy import Uses, parameter_uses, replace_parameter, replace_tensor, shared_copy
from obc.model.slicing import sliced
from obc.structures.norm_axis import norm_axis, norm_channels

Lost = dict[tuple[str, Side], Tensor]
# Each channel has statistics of its own, or there are none.
_PER_CHANNEL = (_NormBase, nn.PReLU)


class UnmaskableError(ValueError):
    """No model with these units masked can be made; the message says why."""


def lost_channels(groups: Sequence[ChannelGroup], removed: Mapping[str, Tensor]) -> Lost:
    """(module, side) -> the channels, ascending, that are removed with these units of each named group."""
    lost: Lost = {}
    for group in groups:
        units = removed.get(group.name)
        if units is None or not len(units):
            continue
        for part in group.slices:
            channels = part.channels[units.cpu()].flatten()
            before = lost.get((part.module, part.side), channels[:0])
            lost[part.module, part.side] = torch.cat([before, channels]).unique()
    return lost


def unmaskable(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, str]:
    """Group name -> why its units can't be masked; maskable groups are omitted."""
    modules = dict(named_modules(model))
    return {group.name: reason for group in groups if (reason := _unmaskable(modules, group)) is not None}


def _unmaskable(modules: Mapping[str, nn.Module], group: ChannelGroup) -> str | None:
    if group.is_depth:
        return None if group.name in modules else "the model has no module of its name"
    if group.kind == "experts":
        routers = [part for part in group.slices if _is_router(modules.get(part.module), group)]
        return None if routers else "which module routes to its experts is not known"
    consumers = [part.module for part in group.slices if part.side == "in" and part.dim is None]
    if not group.read_at and not any(part.side == "in" for part in group.slices):
        return "no layer that reads it is known"
    for name in consumers:
        if is_recurrent(modules.get(name)):
            continue
        rule = rule_for(modules[name]) if name in modules else None
        if not isinstance(rule, Rule) or rule.in_axis is None or rule.packed:
            return f"where {name} keeps its in channels is not known"
    return None


def masked_copy(model: nn.Module, groups: Sequence[ChannelGroup], removed: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` that computes what it must compute without these units.

    It needs memory for the consumers' weights; all others are shared with ``model``.

    Args:
        model: the model; it is not changed.
        groups: the model's groups.
        removed: group name -> int64 indices of units.

    Raises:
        UnmaskableError: the units of a group can't be masked.
    """
    masked = shared_copy(model)
    modules, uses = dict(named_modules(masked)), parameter_uses(masked.modules())
    if refused := unmaskable(masked, (g for g in groups if g.name in removed and len(removed[g.name]))):
        raise UnmaskableError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    depth = [group for group in groups if group.is_depth and len(removed.get(group.name, ()))]
    for group in depth:
        _without_addition(modules[group.name], group.kind == "layers")
    for (name, side), channels in lost_channels(groups, removed).items():
        module = modules.get(name)
        if module is None or any(name == group.name for group in depth):
            continue  # a parameter outside any layer: no layer reads its entries
        if is_recurrent(module):
            _zero_recurrent(uses, module, side, channels)
        elif isinstance(module, nn.MultiheadAttention) and side == "out":
            _mask_attention(uses, module, channels)
        elif side == "in":
            _zero_columns(uses, module, channels)
        elif (over := channels_normalised(module)) is not None:
            _normalise_kept(module, *over, channels)
    for group in groups:
        for part in group.slices if group.name in removed else ():
            gone = part.channels[removed[group.name].cpu()].flatten()
            if part.dim is not None and part.side == "in":
                multiply_along(uses, modules, part.module, part.dim, gone, 0.0)
            if part.module in group.multiplied and part.side == "out":
                _zero_outputs(uses, modules, part.module, gone, part.dim or 0)
        if group.kind == "experts" and group.name in removed:
            for part in group.slices:
                gone = part.channels[removed[group.name].cpu()].flatten()
                if _is_router(module := modules.get(part.module), group):
                    assert module is not None
                    rows, parent = len(module.weight), part.module.rpartition(".")[0]  # type: ignore[arg-type]
                    _route_elsewhere(module, rows, gone)
                    if parent != group.name.rpartition(".")[0]:  # a router may multiply by its layer's weight itself
                        _route_elsewhere(modules[parent], rows, gone)
                elif module is None:
                    _never_preferred(uses, modules, part.module, gone)
    return masked


def _without_addition(module: nn.Module, whole_block: bool) -> None:
    """Let a block return its input, or a branch zeros: it runs, and its result is discarded."""
    forward = module.forward

    def without_addition(*args: Any, **kwargs: Any) -> Any:
        x = first_floating(args, kwargs)
        given = None if x is None else x.clone()  # blocks may add to it in place
        output = forward(*args, **kwargs)
        y = output[0] if isinstance(output, (tuple, list)) else output
        if whole_block and (given is None or given.shape != y.shape):
            shapes = f"{None if given is None else tuple(given.shape)} to {tuple(y.shape)}"
            raise UnmaskableError(f"it changes the shape of its input, {shapes}")
        instead = given if whole_block else torch.zeros_like(y)
        return (instead, *output[1:]) if isinstance(output, (tuple, list)) else instead

    module.forward = without_addition  # type: ignore[method-assign]


def _zero_columns(uses: Uses, module: nn.Module, channels: Tensor) -> None:
    rule = rule_for(module)
    assert isinstance(rule, Rule)
    assert rule.in_axis is not None
    old = getattr(module, rule.weight)
    for key, one in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if one.shape == old.shape:  # a mask too
            replace_tensor(uses, module, key, _without_columns(rule, one.detach(), channels))


def _zero_outputs(uses: Uses, modules: Mapping[str, nn.Module], name: str, channels: Tensor, dim: int) -> None:
    """Let a layer write zeros to these channels, or a parameter outside layers have zeros there, along ``dim``."""
    owner, _, key = name.rpartition(".")
    module, rule = modules.get(name, modules[owner]), rule_for(modules[name]) if name in modules else None
    dims = {rule.weight: rule.out_axis, rule.bias: 0} if isinstance(rule, Rule) else {key: dim}
    for one, dim in dims.items():
        if one is not None:
            tensor = getattr(module, one).detach()
            replace_tensor(uses, module, one, tensor.index_fill(dim, channels.to(tensor.device), 0))


def multiply_along(
    uses: Uses, modules: Mapping[str, nn.Module], name: str, dim: int, channels: Tensor, factor: float
) -> None:
    """Multiply a parameter or buffer outside layers by ``factor`` in these channels of a dimension."""
    owner, _, key = name.rpartition(".")
    tensor = tensor_named(modules, name).detach()
    channels = channels.to(tensor.device)
    changed = tensor.index_copy(dim, channels, tensor.index_select(dim, channels) * factor)
    replace_tensor(uses, modules[owner], key, changed)


def _zero_recurrent(uses: Uses, module: nn.RNNBase, side: Side, channels: Tensor) -> None:
    """Let neither a recurrent layer's own next step nor its next layer read hidden units, or its first these inputs."""
    for key, dim, along in list(dims_of_side(module, side)):
        if dim == 1:
            parameter = module._parameters[key]
            assert parameter is not None
            columns = along.entries(channels, parameter.shape[1]).to(parameter.device)
            replace_parameter(uses, parameter, parameter.detach().index_fill(1, columns, 0))


def _without_columns(rule: Rule, tensor: Tensor, channels: Tensor) -> Tensor:
    assert rule.in_axis is not None
    weight, channels = tensor.clone(), channels.to(tensor.device)
    if rule.groups > 1 and rule.in_axis == 1:
        width = weight.shape[1]  # channels of one conv group
        weight.unflatten(0, (rule.groups, -1))[channels // width, :, channels % width] = 0
    else:
        weight.index_fill_(rule.in_axis, channels, 0)
    return weight


def _mask_attention(uses: Uses, module: nn.MultiheadAttention, channels: Tensor) -> None:
    """Queries without the removed channels, rescaled from the old width of a head to the remaining one."""
    width = module.embed_dim
    channels = channels[channels < width]  # of stacked queries, keys, values
    scale = math.sqrt(width / (width - len(channels)))
    for old in (module.in_proj_weight, module.in_proj_bias):
        if old is not None:
            new = old.detach().clone()
            new[:width] *= scale
            new[channels.to(new.device)] = 0
            replace_parameter(uses, old, new)


def channels_normalised(module: nn.Module) -> tuple[int, int] | None:
    """(channels, their dimension) of a norm over channels; None for other modules."""
    return None if isinstance(module, _PER_CHANNEL) else norm_channels(module)


def _normalise_kept(module: nn.Module, size: int, dim: int, channels: Tensor) -> None:
    """Make a norm compute what it computes from the remaining channels, and zero in place of the others."""
    stays, forward = staying(size, channels), module.forward
    inner: Any = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        vars(inner)[kind] = {
            key: None if tensor is None else _of_kept(module, key, tensor, stays)
            for key, tensor in vars(module)[kind].items()
        }
    grouped = getattr(module, "group_size", None)
    if not set_held_width(inner, len(stays)) and type(grouped) is int and grouped:  # groups keep equal numbers
        inner.group_size = grouped * len(stays) // size

    def narrowed(value: Any, axis: int) -> Any:
        """Also narrow a gate that accompanies the input."""
        fits = isinstance(value, Tensor) and value.dim() >= max(2, -axis) and value.shape[axis] == size
        return value.index_select(axis, stays.to(value.device)) if fits else value

    def over_kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = stays.to(x.device)
        axis = norm_axis(forward, (x, *args), kwargs, size, dim)
        if axis is None:  # normalised per head, so removed heads do not matter
            unchanged: Tensor = forward(x, *args, **kwargs)
            return unchanged
        from_end = axis - x.dim()
        others = [narrowed(value, from_end) for value in args]
        named = {key: narrowed(value, from_end) for key, value in kwargs.items()}
        read = (x.index_select(axis, kept), *others)
        try:
            normalised = inner.forward(*read, **named)
        except Exception:  # a norm outside torch may hold its width
            _hold_width(inner, size, len(stays))
            normalised = inner.forward(*read, **named)
        return normalised.new_zeros(x.shape).index_copy(axis, kept, normalised)

    module.forward = over_kept


def _hold_width(module: nn.Module, before: int, after: int) -> None:
    """Change the width in a norm's integers, and in tuples and lists of integers."""
    for key, value in list(vars(module).items()):
        if type(value) is int and value == before:
            setattr(module, key, after)
        elif isinstance(value, (tuple, list)) and all(type(one) is int for one in value):
            setattr(module, key, type(value)(after if one == before else one for one in value))


def _of_kept(module: nn.Module, key: str, tensor: Tensor, stays: Tensor) -> Tensor:
    """The tensor ``key`` of a norm as pruning leaves it; a parameter stays one."""
    narrow = sliced(module, key, tensor.detach(), Kept(stays), key, getattr(module, "weight", None))
    return nn.Parameter(narrow, requires_grad=False) if isinstance(tensor, nn.Parameter) else narrow


# --- routers --------------------------------------------------------------------------------------------------


def _is_router(module: nn.Module | None, group: ChannelGroup) -> bool:
    weight, experts = getattr(module, "weight", None), group.slices[0].channels.numel()
    return isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) >= experts  # rows behind them stay


class _WithoutExperts(TorchFunctionMode):
    """Logits of minus infinity for some rows of the linear layers that have this many rows."""

    def __init__(self, rows: int, removed: Tensor) -> None:
        super().__init__()
        self._rows, self._removed = rows, removed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and result.shape[-1] == self._rows:
            return result.index_fill(-1, self._removed.to(result.device), -math.inf)
        return result


def _never_preferred(uses: Uses, modules: Mapping[str, nn.Module], name: str, removed: Tensor) -> None:
    """Set a correction bias to minus infinity: it is added to scores, which a removed logit only sets to zero."""
    owner, _, key = name.rpartition(".")
    tensor = getattr(modules.get(owner), key, None)
    if not isinstance(tensor, Tensor) or not is_correction(key):
        return
    lowest = tensor.detach().index_fill(-1, removed.to(tensor.device), -math.inf)
    replace_tensor(uses, modules[owner], key, lowest)


def _route_elsewhere(router: nn.Module, rows: int, removed: Tensor) -> None:
    forward = router.forward

    def without_experts(*args: Any, **kwargs: Any) -> Any:
        with _WithoutExperts(rows, removed):
            return forward(*args, **kwargs)

    router.forward = without_experts
