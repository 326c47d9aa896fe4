"""Finds the plan of a model that was pruned elsewhere, from the values of its tensors.

Every kernel (for a linear layer, every scalar) becomes an integer id, equal for equal values. Pruning keeps the order,
so a row of a pruned weight is a subsequence of its original row. A few such rows give the columns, and the columns give
all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from obc.model.kept import Kept, PlanError, with_columns
from obc.model.layouts import expand, has_several_weights, is_depthwise, layout_of
from obc.model.linear_like import is_linear
from obc.model.names import joined, named_modules, saved_buffers
from obc.model.slicing import original_tensor

# Rows whose subsequences are intersected before the columns count as found; one row is ambiguous if values repeat.
_PIVOTS = 4


def match(original_state_dict: Mapping[str, Tensor], pruned_model: nn.Module) -> dict[str, Kept]:
    """The ``Kept`` of every module of ``pruned_model`` whose tensors are smaller than the original's."""
    kept: dict[str, Kept] = {}
    for name, module in named_modules(pruned_model):
        tensors = {
            tensor_name: (
                original_tensor(original_state_dict, joined(name, tensor_name)),
                tensor.detach(),
            )
            for tensor_name, tensor in (*module.named_parameters(recurse=False), *saved_buffers(module))
        }
        if all(original.shape == pruned.shape for original, pruned in tensors.values()):
            continue
        found = _match_module(name, module, tensors)
        if is_linear(module) and found.in_channels is not None:
            width = original_state_dict[f"{name}.weight"].shape[1]
            channel_first = {n: k for n, k in kept.items() if _is_channel_first(pruned_model.get_submodule(n))}
            found = _with_flatten(found, width, channel_first, original_state_dict)
        kept[name] = found
    return kept


def _match_module(name: str, module: nn.Module, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Kept:
    layout = layout_of(module)
    if layout is None or (is_depthwise(module) and tensors["weight"][0].shape[1] == 1):
        return _match_channels(name, module, tensors)
    original, pruned = tensors["weight"]
    if layout.transposed:
        original, pruned = original.transpose(0, 1), pruned.transpose(0, 1)
    if original.dim() != pruned.dim() or original.shape[2:] != pruned.shape[2:]:
        raise PlanError(
            f"{name}.weight: {tuple(pruned.shape)} is not a slice of the original's {tuple(original.shape)}"
        )
    if layout.groups > 1:
        if layout.transposed:
            raise PlanError(f"{name}: a grouped transposed convolution can't be matched; record it with prune_step")
        return _match_groups(name, original, pruned, layout.groups)
    ids, pruned_ids = _ids(original, pruned)
    if "bias" in tensors:  # treated as one more column, which every row keeps
        bias, pruned_bias = _ids(*(bias[:, None] for bias in tensors["bias"]))
        extra = ids.max() + 1
        ids, pruned_ids = torch.cat([bias + extra, ids], 1), torch.cat([pruned_bias + extra, pruned_ids], 1)
    rows, columns = _match_matrix(f"{name}.weight", original, pruned, ids, pruned_ids)
    if "bias" in tensors:
        columns = columns[1:] - 1
    return _kept_of(rows, columns, original.shape[0], original.shape[1])


def _match_channels(name: str, module: nn.Module, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Kept:
    """Match norms, embeddings and depthwise convolutions: one set of channels explains all their tensors."""
    if has_several_weights(module):
        raise PlanError(f"{name}: a pruned {type(module).__name__} can't be matched; take the plan of obc.prune")
    dim = 1 if isinstance(module, nn.Embedding) else 0
    columns = [
        _ids(original.transpose(0, dim).flatten(1)[..., None], pruned.transpose(0, dim).flatten(1)[..., None])
        if original.dim() > 1
        else _ids(original[:, None], pruned[:, None])
        for original, pruned in tensors.values()
        if original.shape != pruned.shape
    ]
    originals, pruneds = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
    rows = _match_rows(originals, pruneds)
    if rows is None:
        tensor_name, (original, pruned) = next(iter(tensors.items()))
        raise PlanError(
            f"{name}.{tensor_name}: {tuple(pruned.shape)} is not a slice of the original's {tuple(original.shape)}"
        )
    depthwise = layout_of(module) is not None
    size = len(originals)
    return Kept(rows, rows, out_size=size, in_size=size) if depthwise else Kept(rows, out_size=size)


def _match_groups(name: str, original: Tensor, pruned: Tensor, groups: int) -> Kept:
    rows, columns = [], []
    blocks = zip(original.chunk(groups), pruned.chunk(groups), strict=True)
    for group, (block, pruned_block) in enumerate(blocks):
        found = _match_matrix(f"{name}.weight (group {group})", block, pruned_block, *_ids(block, pruned_block))
        rows.append(found[0] + group * block.shape[0])
        columns.append(found[1] + group * block.shape[1])
    return _kept_of(torch.cat(rows), torch.cat(columns), original.shape[0], original.shape[1] * groups)


def _kept_of(rows: Tensor, columns: Tensor, out_size: int, in_size: int) -> Kept:
    """The entry of these rows and columns; a side that kept all has none."""
    found = Kept() if len(rows) == out_size else Kept(rows, out_size=out_size)
    return found if len(columns) == in_size else replace(found, in_channels=columns, in_size=in_size)


def _ids(original: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of integers, equal where the kernels are equal."""
    kernels = torch.cat([tensor.reshape(-1, tensor.shape[2:].numel()) for tensor in (original, pruned)])
    if kernels.shape[1] == 1:
        ids = torch.unique(kernels, return_inverse=True)[1].flatten()
    else:
        ids = torch.unique(kernels, dim=0, return_inverse=True)[1]
    count = original.shape[0] * original.shape[1]
    return ids[:count].reshape(original.shape[:2]), ids[count:].reshape(pruned.shape[:2])


def _match_matrix(
    name: str, original: Tensor, pruned: Tensor, ids: Tensor, pruned_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Ascending rows and columns with ids[rows][:, columns] == pruned_ids."""
    shapes = f"{tuple(pruned.shape)} is not a slice of the original's {tuple(original.shape)}"
    columns: Tensor | None
    if ids.shape[1] == pruned_ids.shape[1]:
        columns = torch.arange(ids.shape[1], device="cpu")
    elif ids.shape[0] == pruned_ids.shape[0]:
        columns = _match_rows(ids.T, pruned_ids.T)
    else:
        columns = _columns_from_pivots(ids, pruned_ids)
    rows = None if columns is None else _match_rows(ids[:, columns], pruned_ids)
    if rows is None or columns is None:
        raise PlanError(f"{name}: {shapes}")
    return rows, columns


def _columns_from_pivots(ids: Tensor, pruned_ids: Tensor) -> Tensor | None:
    """Find the columns from a few rows: their possible original rows, then one subsequence through all of them."""
    pivots = pruned_ids[: min(_PIVOTS, len(pruned_ids))]
    candidates = [_supersequences(ids, pivot) for pivot in pivots]
    if any(len(rows) == 0 for rows in candidates):
        return None
    chosen = torch.stack([rows[0] for rows in candidates])
    return _match_rows(ids[chosen].T, pivots.T)


def _supersequences(ids: Tensor, wanted: Tensor) -> Tensor:
    """The rows of ``ids`` that contain ``wanted`` in order."""
    position = torch.zeros(len(ids), dtype=torch.int64, device="cpu")
    padded = torch.cat([wanted, wanted.new_full((1,), -1)])
    for column in ids.T:
        position += column == padded[position]
    return (position == len(wanted)).nonzero().flatten()


def _match_rows(originals: Tensor, pruneds: Tensor) -> Tensor | None:
    """Ascending indices with originals[indices] == pruneds, first of equals first; None if there are none."""
    ids = torch.unique(torch.cat([originals, pruneds]), dim=0, return_inverse=True)[1].tolist()
    available, wanted = enumerate(ids[: len(originals)]), ids[len(originals) :]
    found = [next((index for index, value in available if value == target), None) for target in wanted]
    indices = [index for index in found if index is not None]
    return torch.tensor(indices, dtype=torch.int64, device="cpu") if len(indices) == len(wanted) else None


def _is_channel_first(module: nn.Module) -> bool:
    """Whether flatten turns each channel into a run of columns; linear layers have their channels last."""
    layout = layout_of(module)
    if layout is not None:
        return layout.convolution
    return isinstance(module, _NormBase | nn.GroupNorm)


def _with_flatten(found: Kept, width: int, earlier: Mapping[str, Kept], state_dict: Mapping[str, Tensor]) -> Kept:
    """Infer in_repeat of a Linear: its columns are whole blocks of the channels that the last such layer kept."""
    columns = found.in_channels
    if columns is None:
        return found
    for name, kept in reversed(list(earlier.items())):
        channels = kept.out_channels
        if channels is None or f"{name}.weight" not in state_dict or len(columns) % len(channels):
            continue
        repeat = len(columns) // len(channels)
        if repeat * len(state_dict[f"{name}.weight"]) == width and torch.equal(expand(channels, repeat), columns):
            return with_columns(found, columns, repeat)
    return found
