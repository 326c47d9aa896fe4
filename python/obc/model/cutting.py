"""Applies a plan to the unpruned model: cuts every tensor to what was kept and updates the layers' sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from obc.model.evaluation import kept_by, tensors_in
from obc.model.held_tensors import register_held
from obc.model.kept import Kept, PlanError, kept_of
from obc.model.layouts import is_depthwise, layout_of, set_held_width
from obc.model.linear_like import is_linear, sizes_of
from obc.model.names import joined, named_modules, saved_buffers
from obc.model.recurrent import is_recurrent, sync_recurrent
from obc.model.shared_copy import shared_copy
from obc.model.slicing import same_values, sliced


def cut(model: nn.Module, plan: Mapping[str, Kept]) -> None:
    """Cut ``model`` in place; shared parameters stay shared, and are cut if one of their modules has an entry.

    What modules keep of former calls in eval mode is forgotten. Tensors that they hold as plain attributes become
    buffers that are not saved, if they have an entry.

    Raises:
        PlanError: the plan does not fit a tensor, or keeps different parts of a shared one; nothing was changed.
    """
    register_held(model, plan)
    made: dict[int, tuple[str, Tensor]] = {}
    uses: list[tuple[nn.Module, str, Tensor]] = []
    for module_name, module in named_modules(model):
        saved_only = isinstance(module, (nn.Embedding, nn.RNNBase, nn.MultiheadAttention))  # other buffers are tables
        buffers = saved_buffers(module) if saved_only else module.named_buffers(recurse=False)
        for name, tensor in (*module.named_parameters(recurse=False), *buffers):
            uses.append((module, name, tensor))
            key = joined(module_name, name)
            if (kept := kept_of(plan, module_name, key)) is None:
                continue
            taken = _cut_tensor(module, name, tensor, kept, key)
            other_key, other = made.setdefault(id(tensor), (key, taken))
            differ = other.shape != taken.shape or not (taken.is_meta or same_values(other, taken))
            if other is not taken and differ:
                raise PlanError(f"{other_key} and {key} are one tensor, of which the plan keeps different channels")
    for module, name, tensor in uses:
        holder: Any = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        holder[name] = made[id(tensor)][1] if id(tensor) in made else tensor
    for module in dict.fromkeys(module for module, _, tensor in uses if id(tensor) in made):
        _sync_sizes(module)
    for module, _, tensor in uses:
        if id(tensor) in made and not type(module).__module__.startswith("torch.nn."):
            _sync_shapes(module, tensor.shape, made[id(tensor)][1].shape)
    for module_name, module in named_modules(model):
        kept = plan.get(module_name)
        if kept is not None and kept.out_channels is not None and module._parameters.get("weight") is None:
            set_held_width(module, len(kept.out_channels))  # a norm without a weight
    for module in model.modules():
        _forget_kept(module)


def _cut_tensor(module: nn.Module, name: str, tensor: Tensor, kept: Kept | None, key: str) -> Tensor:
    taken = sliced(module, name, tensor.detach(), kept, key, getattr(module, "weight", None))
    if taken.shape == tensor.shape:
        return tensor
    taken = _laid_out_like(tensor, taken)
    return nn.Parameter(taken, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else taken


def _laid_out_like(tensor: Tensor, taken: Tensor) -> Tensor:
    """``taken`` in the memory format of ``tensor``, which picking channels loses: channels last stays channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.dim())
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return taken
    return taken.contiguous(memory_format=last)


def _sync_sizes(module: nn.Module) -> None:
    """Set the sizes that a layer keeps as attributes to those of its tensors; before that they are the former ones."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        module.embed_dim = module.kdim = module.vdim = module.out_proj.out_features = module.out_proj.weight.shape[0]
        module.out_proj.in_features = module.out_proj.weight.shape[1]
        module.head_dim = module.embed_dim // module.num_heads
    elif is_recurrent(module):
        sync_recurrent(module)
    elif (own := weight if weight is not None else module._buffers.get("running_mean")) is None:
        return
    elif isinstance(module, _ConvNd) and is_depthwise(module):
        module.groups = module.in_channels = module.out_channels = len(own)
    elif isinstance(module, _ConvNd) or is_linear(module):
        layout = layout_of(module)
        assert layout is not None
        for names in sizes_of(module):
            for name, size in zip(names, layout.sizes(own), strict=True):
                setattr(module, name, size)
    elif not set_held_width(module, own.shape[-1]) and layout_of(module) is not None:  # GPT-2's linear layer
        module.nx, module.nf = own.shape  # type: ignore[assignment]


def _sync_shapes(module: nn.Module, before: torch.Size, after: torch.Size) -> None:
    """Change tuples and lists of a module that are the former shape of a tensor of its own, up to dimensions of one.

    Such are ``normalized_shape`` of norms outside torch, and shapes that ``forward`` gives to a scale with ``view``.
    What a class of torch declares of modules that derive from it is none: with 4 channels left, a kernel of 4 stays.
    """
    torchs = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    declared = {name for kind in torchs for name in vars(kind).get("__constants__", ())}
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old != 1]
    for key, value in list(vars(module).items()):
        ints = isinstance(value, (tuple, list)) and all(type(size) is int for size in value)
        own = key[0] != "_" and key not in declared
        if own and ints and value and [size for size in value if size != 1] == [old for old, _ in pairs]:
            left = iter(new for _, new in pairs)
            setattr(module, key, type(value)(1 if size == 1 else next(left) for size in value))


def _forget_kept(module: nn.Module) -> None:
    """Drop the tensors that a module keeps of its calls in eval mode, such as tables of biases, if ``train()`` does."""
    kept = {key: value for key, value in kept_by(module).items() if tensors_in(value)}
    if kept:
        tried = shared_copy(module)
        for parameter in tried.parameters():
            parameter.data = parameter.data.clone()  # train() may merge weights
        tried.train()
        vars(module).update(
            {key: value for key, value in kept_by(tried).items() if key in kept and not tensors_in(value)}
        )
