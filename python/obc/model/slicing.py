"""A layer's tensors after pruning: the original's values at the kept indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from obc.model.channel_dims import channel_dims
from obc.model.kept import Kept, PlanError
from obc.model.layouts import layout_of, split_by_group
from obc.model.quantized import is_quantised, why_not_sliced
from obc.model.rules import Rule, is_packed


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same values; NaN, as in memory that nothing wrote to, equals NaN."""
    if one.layout is not torch.strided and one.layout is other.layout:
        one, other = one.to_dense(), other.to_dense()  # torch compares no sparse tensors
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def original_tensor(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    """``state_dict[key]``, detached.

    Raises:
        TypeError: ``state_dict`` is no mapping, but the model itself, for example.
        PlanError: it lacks the key.
    """
    refuse_non_state_dict(state_dict)
    if key not in state_dict:
        longer = next((full for full in state_dict if full.endswith(f".{key}")), None)
        wrapped = "" if longer is None else f"; it has {longer!r}: of a wrapped model, pass that of the model inside"
        remedy = f"pass the unpruned model's{wrapped}"
        raise PlanError(f"the original state dict lacks {key!r} of the pruned model; {remedy}")
    return state_dict[key].detach()


def refuse_non_state_dict(state_dict: Any) -> None:
    """Raise a TypeError if the original's weights are no mapping, but the model itself, for example."""
    if not isinstance(state_dict, Mapping):
        whose = "; pass the unpruned model's state_dict()" if isinstance(state_dict, nn.Module) else ""
        raise TypeError(f"the original's weights must be a state dict, got {type(state_dict).__name__}{whose}")


def sliced(
    module: nn.Module, tensor_name: str, original: Tensor, kept: Kept | None, key: str, weight: Tensor | None = None
) -> Tensor:
    """The slice of ``original``, the tensor ``tensor_name`` of a layer like ``module``, that pruning keeps.

    ``weight`` is the layer's weight before pruning; it tells which channels other tensors of a subclass have.

    Raises:
        PlanError: the indices don't fit, the layer or its original is quantised, or how such a tensor belongs to the
            channels is not known.
    """
    if kept is None:
        return original
    if is_quantised(module):
        raise PlanError(why_not_sliced(key, module))
    if tensor_name == "weight" and layout_of(module) is not None and is_packed(original):
        raise PlanError(
            f"{key} of the original is stored packed, as {type(original).__name__} {tuple(original.shape)} of "
            f"{original.dtype}, so that no channel can be taken out of it; make that model plain with obc.dequantize"
        )
    try:
        return _sliced(module, tensor_name, original, kept, weight)
    except (IndexError, ValueError) as error:
        raise PlanError(
            f"{key}: the plan does not fit the original's shape {tuple(original.shape)}: {error}"
        ) from error


def _sliced(module: nn.Module, tensor_name: str, original: Tensor, kept: Kept, weight: Tensor | None) -> Tensor:
    if kept.dim is not None or kept.in_dim is not None:
        taken = original if kept.dim is None else _take(original, kept.dim, kept.out_channels, kept.out_size)
        return taken if kept.in_dim is None else _take(taken, kept.in_dim, kept.in_channels, kept.in_size)
    if isinstance(module, nn.MultiheadAttention):
        return _sliced_attention(tensor_name, original, kept)
    layout, alike = layout_of(module), weight is None or original.shape == weight.shape
    if layout is not None and (tensor_name == "weight" or (tensor_name != "bias" and alike)):
        if was_depthwise(module, original, kept):
            _check_size(len(original), kept.in_size)
            return _take(original, 0, kept.out_channels, kept.out_size)
        return sliced_weight(original, layout, kept)
    # Norms, PReLU, biases: one entry per channel; counters, single slopes and tables of another length have none.
    if (dims := channel_dims(module, tensor_name, original, weight)) is None:
        if layout is None or weight is None:
            raise ValueError(f"where the channels of this {type(module).__name__} lie is not known")
        out_size, in_size = layout.sizes(weight)
        raise ValueError(
            f"of this {type(module).__name__} with {in_size} in and {out_size} out channels only tensors that have the "
            "weight's shape, or one value per out channel, can be cut; keep any other in a module of its own"
        )
    for dim, along in dims.items():
        channels, length = kept.on(along.side), original.shape[dim]
        _check_size(along.channels(length), kept.out_size if along.side == "out" else kept.in_size)
        original = _take(original, dim, None if channels is None else along.entries(channels, length))
    return original


def was_depthwise(module: nn.Module, original: Tensor, kept: Kept) -> bool:
    """Whether a convolution, pruned or not, had one filter per channel: its channels go on both sides together.

    Its sizes alone don't tell. A depthwise convolution cut to one channel has the sizes of a dense one, and a grouped
    convolution may end with one channel in each group.
    """
    if not isinstance(module, _ConvNd) or not module.groups == module.in_channels == module.out_channels:
        return False
    if original.shape[1] > 1 or kept.out_channels is None:
        return False
    return kept.in_channels is None or torch.equal(kept.out_channels, kept.in_channels)


def sliced_weight(weight: Tensor, layout: Rule, kept: Kept) -> Tensor:
    """The rows and columns of ``weight`` in ``kept``, in its order; for a grouped convolution within each group."""
    if kept.in_channels is not None and len(kept.in_channels) * kept.in_repeat > weight.numel():
        raise ValueError(f"{len(kept.in_channels)} in channels of {kept.in_repeat} columns each are more than it has")
    for size, made in zip(layout.sizes(weight), (kept.out_size, kept.in_size), strict=True):
        _check_size(size, made)
    rows, columns = kept.out_channels, kept.in_columns
    if layout.transposed:
        rows, columns = columns, rows
    if layout.groups == 1:
        return _take(_take(weight, 0, rows), 1, columns)
    return _sliced_groups(weight, rows, columns, layout.groups)


def _check_size(size: int, made: int | None) -> None:
    """Refuse an axis of another size than the plan is made for; None stands for any."""
    if made not in (None, size):
        raise ValueError(
            f"it was made for {made} channels where this has {size}; pass the model that was pruned, as it was before, "
            "and if that had been pruned too and this has not, plan.after(the earlier plan)"
        )


def _take(tensor: Tensor, dim: int, indices: Tensor | None, size: int | None = None) -> Tensor:
    _check_size(tensor.shape[dim], size)
    if indices is None:
        return tensor
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < tensor.shape[dim]:
        # torch raises a different error for every number of dimensions.
        raise IndexError(f"it keeps channel {int(indices.max())} of {tensor.shape[dim]}")
    return tensor.index_select(dim, indices.to(tensor.device))


def _sliced_groups(weight: Tensor, rows: Tensor | None, columns: Tensor | None, groups: int) -> Tensor:
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    for dim, indices, size in ((1, rows, weight.shape[0]), (2, columns, weight.shape[1] * groups)):
        if indices is None:
            continue
        local = split_by_group(indices.to(weight.device), size, groups)
        if local is None:
            raise ValueError(f"its {groups} groups keep unequal numbers of channels")
        blocks = torch.stack([block.index_select(dim - 1, index) for block, index in zip(blocks, local, strict=True)])
    return blocks.flatten(0, 1)


def _sliced_attention(tensor_name: str, original: Tensor, kept: Kept) -> Tensor:
    """torch's own attention, pruned along its embedding: queries, keys and values are stacked in ``in_proj``."""
    features = kept.out_channels
    if features is None:
        return original
    if tensor_name in ("bias_k", "bias_v"):
        return _take(original, 2, features, kept.out_size)
    width = original.shape[0] // 3 if tensor_name.startswith("in_proj") else original.shape[0]
    _check_size(width, kept.out_size)
    stacked = torch.cat([features + part * width for part in range(original.shape[0] // width)])
    return _take(_take(original, 0, stacked), 1, features) if original.dim() == 2 else _take(original, 0, stacked)
