"""Tensors that modules hold as plain attributes, such as tables of positions that are computed when they are built."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from obc.model.names import joined, named_modules


def held_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, attribute, full name) of every floating tensor with several entries that is neither registered nor kept
    from a call with gradients.
    """
    for name, module in named_modules(model):
        own = {} if type(module).__module__.startswith("torch.") else dict(vars(module))
        for key, value in own.items():
            plain = type(value) is Tensor and value.layout is torch.strided and not value.requires_grad
            if plain and value.is_floating_point() and value.numel() > 1:
                yield module, key, joined(name, key)


def register_held(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Make those of these full names, or all, buffers that are not saved: attributes as before, which can be cut."""
    for module, key, name in held_tensors(model):
        if names is None or name in names:
            module.register_buffer(key, vars(module).pop(key), persistent=False)
