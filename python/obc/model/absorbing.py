"""Finds the layers whose output's mean no later layer sees: a BatchNorm alone reads it, and subtracts its own mean.

If an input channel of such a layer goes, the mean of what it added is absorbed by the norm once its statistics follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from obc.model.hooks import hooked
from obc.model.layouts import layout_of


class _Readers(TorchFunctionMode):
    """Notes whether a BatchNorm or another function reads a tensor that is followed."""

    def __init__(self) -> None:
        super().__init__()
        self.followed: dict[int, tuple[str, Tensor]] = {}  # the tensor too, so that no other gets its id
        self.by_norms: set[str] = set()
        self.by_others: set[str] = set()

    def follow(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Follow the output of a call of the layer ``name``."""
        layout = layout_of(module)
        if isinstance(output, Tensor) and layout is not None and (layout.convolution or output.dim() == 2):
            self.followed[id(output)] = name, output
        else:  # a BatchNorm's channels lie along dim 1
            self.by_others.add(name)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        for value in (*args, *(kwargs or {}).values()):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                reader, kept = self.followed.get(id(tensor), ("", None))
                if kept is not tensor or kept is None:
                    continue
                if name == "batch_norm":
                    self.by_norms.add(reader)
                elif isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):
                    self.by_others.add(reader)
        return result


def mean_absorbed(model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> set[str]:
    """Those of ``layers`` whose output a BatchNorm alone reads, in every call.

    Args:
        model: in eval mode.
        layers: linear layers and convolutions of the model, by name.
        run: runs the model once.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return set()
    readers = _Readers()
    handles = [layer.register_forward_hook(partial(readers.follow, name)) for name, layer in layers.items()]
    with hooked(handles), torch.no_grad(), readers:
        run()
    return readers.by_norms - readers.by_others
