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

# Functions that return the numbers they are given. (Dropout does so in eval mode, the only mode observed.)
IDENTITIES = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("contiguous", "clone", "detach", "to", "type_as", "float"),
}


class _Readers(TorchFunctionMode):
    """Notes what reads a tensor that is followed: which BatchNorms, by their running means, or another function."""

    def __init__(self) -> None:
        super().__init__()
        self.followed: dict[int, tuple[str, Tensor]] = {}  # the tensor too, so that no other gets its id
        self.by_norms: dict[str, set[int]] = {}
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
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                reader, kept = self.followed.get(id(tensor), ("", None))
                if kept is not tensor or kept is None:
                    continue
                if name == "batch_norm":
                    mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
                    self.by_norms.setdefault(reader, set()).add(id(mean))
                elif name in IDENTITIES and isinstance(result, Tensor):
                    self.followed[id(result)] = reader, result
                elif isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):
                    self.by_others.add(reader)
        return result


def norms_behind(model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, list[str]]:
    """Those of ``layers`` whose output BatchNorms alone read, in every call -> the names of these.

    Args:
        model: in eval mode.
        layers: linear layers and convolutions of the model, by name.
        run: runs the model once.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return {}
    readers = _Readers()
    handles = [layer.register_forward_hook(partial(readers.follow, name)) for name, layer in layers.items()]
    with hooked(handles), torch.no_grad(), readers:
        run()
    return {
        layer: [name for name, norm in norms if id(norm.running_mean) in means]
        for layer, means in readers.by_norms.items()
        if layer not in readers.by_others
    }
