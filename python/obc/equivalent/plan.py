"""What pruning kept of every layer: recorded, composed over steps, verified exactly, saved without pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from obc.equivalent.layers import Layout, expand, is_depthwise, layout_of, split_by_group
from obc.files import atomic_write, parse_json

_FORMAT = {"format": "obc.PruningPlan", "version": 1}

# Channels, columns and blocks lie below; a damaged file may say otherwise.
_LARGEST = 2**31
# Fields that may be 0 or missing.
_DIMENSIONS = ("dim", "in_dim")


class PlanError(ValueError):
    """A plan doesn't describe how the pruned model came from the original; names the layer and the two shapes."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What one layer, or one parameter outside any layer, kept.

    Attributes:
        out_channels: int64 indices of the kept channels on the output side, ascending; None where all are kept. Norms,
            embeddings (their features) and parameters outside layers use this side.
        in_channels: the same of the input side.
        in_repeat: for a Linear after flatten, how many consecutive columns each in channel owns.
        out_blocks: into how many diagonal blocks a compressor of the output falls (attention heads).
        dim: for a parameter outside any layer, the dimension that ``out_channels`` indexes.
        in_dim: the same for ``in_channels``, where such a parameter was pruned in two dimensions (fused experts).
    """

    out_channels: Tensor | None = None
    in_channels: Tensor | None = None
    in_repeat: int = 1
    out_blocks: int = 1
    dim: int | None = None
    in_dim: int | None = None

    @property
    def in_columns(self) -> Tensor | None:
        """The kept columns: ``in_channels`` expanded by ``in_repeat``."""
        return None if self.in_channels is None else expand(self.in_channels, self.in_repeat)


class PruningPlan(Mapping[str, Kept]):
    """What every pruned layer kept of the original model, by module name (raw parameters: by parameter name)."""

    def __init__(self, kept: Mapping[str, Kept] | None = None) -> None:
        self._kept = dict(kept or {})

    def __getitem__(self, name: str) -> Kept:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"PruningPlan({len(self)} layers)"

    def verify(self, original_state_dict: Mapping[str, Tensor], pruned_model: nn.Module) -> None:
        """Check that slicing the original by this plan gives every tensor of the pruned model, value by value.

        Layers without an entry must be unchanged.

        Raises:
            PlanError: naming the first tensor that differs, and both shapes.
        """
        known = {name for name, _ in named_modules(pruned_model)} | {
            name for name, _ in pruned_model.named_parameters()
        }
        for name in self:
            if name not in known:
                raise PlanError(
                    f"the plan has an entry for {name!r}, which the pruned model lacks; pass the plan made for it"
                )
        for module_name, module, tensor_name, pruned in named_tensors(pruned_model):
            self.verify_tensor(original_state_dict, module_name, module, tensor_name, pruned)

    def verify_tensor(
        self,
        original_state_dict: Mapping[str, Tensor],
        module_name: str,
        module: nn.Module,
        tensor_name: str,
        pruned: Tensor,
    ) -> None:
        """:meth:`verify` of one tensor: ``pruned``, the tensor ``tensor_name`` of the pruned ``module``."""
        key = f"{module_name}.{tensor_name}" if module_name else tensor_name
        original = original_tensor(original_state_dict, key)
        # torch's attention has one entry for itself and its output projection.
        kept = self.get(key) or self.get(module_name) or self.get(module_name.removesuffix(".out_proj"))
        expected = sliced(module, tensor_name, original, kept, key)
        if expected.shape != pruned.shape:
            raise PlanError(
                f"{key}: the plan makes {tuple(expected.shape)} of the original's {tuple(original.shape)}, "
                f"the pruned model has {tuple(pruned.shape)}; record the plan with prune_step while pruning"
            )
        if expected.dtype != pruned.dtype:
            raise PlanError(
                f"{key}: the original is {expected.dtype}, the pruned model {pruned.dtype}; convert one of them"
            )
        if not torch.equal(expected.to(pruned.device), pruned):
            raise PlanError(
                f"{key}: the original's {tuple(original.shape)} sliced by the plan has the pruned model's shape "
                f"{tuple(pruned.shape)} but other values; the plan must be verified before anything trains"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON.

        Raises:
            OSError: the file can't be written; a file that was there is what it was.
        """
        layers = {name: {field: _plain(value) for field, value in vars(kept).items()} for name, kept in self.items()}
        content = json.dumps(_FORMAT | {"layers": layers}).encode()
        with atomic_write(path) as file:
            file.write(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: the file is no plan, one of another version, or damaged.
            OSError: it can't be read.
        """
        with open(path, "rb") as file:
            text = file.read()
        name = os.fspath(path)
        try:
            content = parse_json(text, dict[str, Any])
        except ValueError as error:
            raise PlanError(f"{name} is not a pruning plan: {error}") from error
        if any(content.get(key) != value for key, value in _FORMAT.items()):
            raise PlanError(f"{name} is not a pruning plan of version {_FORMAT['version']}")
        layers = content.get("layers")
        if not isinstance(layers, dict):
            raise PlanError(f"{name} is a damaged pruning plan: it has no layers")
        try:
            return cls({layer: _kept(fields) for layer, fields in layers.items()})
        except ValueError as error:
            raise PlanError(f"{name} is a damaged pruning plan: {error}") from error

    @classmethod
    def from_models(cls, original_state_dict: Mapping[str, Tensor], pruned_model: nn.Module) -> PruningPlan:
        """The plan of a model that was pruned elsewhere, found by matching values, and verified.

        Channels with equal values are interchangeable and matched in ascending order. Whether a Linear follows a
        flatten is inferred: its columns were kept in blocks and an earlier layer kept those channels.

        Raises:
            PlanError: a tensor of the pruned model is no slice of the original, or several slices explain it.
        """
        from obc.equivalent.matching import match

        plan = cls(match(original_state_dict, pruned_model))
        plan.verify(original_state_dict, pruned_model)
        return plan


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _kept(fields: Any) -> Kept:
    """The entry of one layer, from a file; ValueError where it is none."""
    known = {field.name for field in dataclasses.fields(Kept)}
    if not isinstance(fields, dict) or not fields.keys() <= known:
        raise ValueError(f"a layer has the fields {', '.join(sorted(known))}, got {reprlib.repr(fields)}")
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name.endswith("_channels"):
            values[name] = None if value is None else _indices(name, value)
        elif type(value) is int and 0 <= value < _LARGEST and (value > 0 or name in _DIMENSIONS):
            values[name] = value
        elif name not in _DIMENSIONS or value is not None:
            raise ValueError(f"{name} must be a positive number, got {reprlib.repr(value)}")
    return Kept(**values)


def _indices(name: str, value: Any) -> Tensor:
    if not isinstance(value, list) or not all(type(index) is int and 0 <= index < _LARGEST for index in value):
        raise ValueError(f"{name} must be a list of indices, got {reprlib.repr(value)}")
    return torch.tensor(value, dtype=torch.int64)


def original_tensor(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    """``state_dict[key]``, detached; PlanError where it is missing."""
    if key not in state_dict:
        raise PlanError(f"the original state dict lacks {key!r} of the pruned model; pass the unpruned model's")
    return state_dict[key].detach()


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module under the first of its names: a module used twice has one entry in a plan."""
    return iter(model.named_modules(remove_duplicate=True))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(module name, module, tensor name, tensor) of everything that a state dict holds, once per module."""
    for module_name, module in named_modules(model):
        yield from ((module_name, module, name, p.detach()) for name, p in module.named_parameters(recurse=False))
        persistent = (
            (name, buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        )
        yield from ((module_name, module, name, buffer) for name, buffer in persistent)


def sliced(module: nn.Module, tensor_name: str, original: Tensor, kept: Kept | None, key: str) -> Tensor:
    """What pruning leaves of ``original``, the tensor ``tensor_name`` of a layer like ``module``.

    Raises:
        PlanError: the indices don't fit.
    """
    if kept is None:
        return original
    try:
        return _sliced(module, tensor_name, original, kept)
    except (IndexError, ValueError) as error:
        raise PlanError(
            f"{key}: the plan does not fit the original's shape {tuple(original.shape)}: {error}"
        ) from error


def _sliced(module: nn.Module, tensor_name: str, original: Tensor, kept: Kept) -> Tensor:
    if kept.dim is not None or kept.in_dim is not None:
        taken = original if kept.dim is None else _take(original, kept.dim, kept.out_channels)
        return taken if kept.in_dim is None else _take(taken, kept.in_dim, kept.in_channels)
    if isinstance(module, nn.MultiheadAttention):
        return _sliced_attention(tensor_name, original, kept)
    if isinstance(module, nn.Embedding):
        return _take(original, 1, kept.out_channels)
    layout = layout_of(module)
    if layout is None or tensor_name != "weight":
        # Norms, PReLU, biases: one entry per channel; counters and single slopes have none.
        return original if original.numel() == 1 and original.dim() == 0 else _take(original, -1, kept.out_channels)
    if is_depthwise(module, original):
        return _take(original, 0, kept.out_channels)
    return sliced_weight(original, layout, kept)


def sliced_weight(weight: Tensor, layout: Layout, kept: Kept) -> Tensor:
    """The rows and columns of ``weight`` that ``kept`` names, in its order: of a grouped convolution in each group."""
    if kept.in_channels is not None and len(kept.in_channels) * kept.in_repeat > weight.numel():
        raise ValueError(f"{len(kept.in_channels)} in channels of {kept.in_repeat} columns each are more than it has")
    rows, columns = kept.out_channels, kept.in_columns
    if layout.transposed:
        rows, columns = columns, rows
    if layout.groups == 1:
        return _take(_take(weight, 0, rows), 1, columns)
    return _sliced_groups(weight, rows, columns, layout.groups)


def _take(tensor: Tensor, dim: int, indices: Tensor | None) -> Tensor:
    if indices is None:
        return tensor
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < tensor.shape[dim]:
        # torch says so with another error for every number of dimensions.
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
    """torch's own attention, pruned along its embedding: queries, keys and values lie stacked in ``in_proj``."""
    features = kept.out_channels
    if features is None:
        return original
    if tensor_name in ("bias_k", "bias_v"):
        return _take(original, 2, features)
    width = original.shape[0] // 3 if tensor_name.startswith("in_proj") else original.shape[0]
    stacked = torch.cat([features + part * width for part in range(original.shape[0] // width)])
    return _take(_take(original, 0, stacked), 1, features) if original.dim() == 2 else _take(original, 0, stacked)


def narrowed(kept: Tensor | None, size: int, removed: Tensor) -> Tensor:
    """The kept indices after a further step removed the positions ``removed`` of the ``size`` that were left."""
    current = torch.arange(size) if kept is None else kept
    stays = torch.ones(len(current), dtype=torch.bool)
    stays[removed] = False
    return current[stays]


def with_columns(kept: Kept, columns: Tensor, repeat: int) -> Kept:
    """``kept`` with in_channels from kept columns: blocks of ``repeat`` where they are whole, else single columns."""
    channels = columns[::repeat] // repeat
    if repeat > 1 and len(columns) % repeat == 0 and torch.equal(expand(channels, repeat), columns):
        return replace(kept, in_channels=channels, in_repeat=repeat)
    return replace(kept, in_channels=columns, in_repeat=1)
