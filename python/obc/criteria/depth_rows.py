"""Rows of whole blocks and branches: a gate on what they add to the residual stream.

r_b[n] = sum over positions of y . dL_n/dy, where y is the output of a branch, or the output of a block minus its input:
the first-order change of the loss of row n when the block is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obc.criteria.loss_rows import LossRows, Part
from obc.model.evaluation import LossFn, first_floating
from obc.model.groups import ChannelGroup
from obc.scoring.results.kept_rows import ChannelRows
from obc.statistics.taps import tapped


class DepthRows(LossRows):
    """A loss function that reads rows of blocks.

    Args:
        groups: of kinds "layers" and "sublayers".
        per_sample: rows belong to samples, which lie along dim 0 of the blocks' outputs.
    """

    def __init__(self, groups: Sequence[ChannelGroup], loss_fn: LossFn, per_sample: bool) -> None:
        super().__init__(loss_fn, {group.name: 1 for group in groups}, per_sample)
        self._groups = list(groups)

    def _hooks(self, model: nn.Module, part: Part) -> list[Any]:
        inputs: dict[str, Tensor] = {}
        handles: list[Any] = []
        for group in self._groups:
            module = model.get_submodule(group.name)
            if group.kind == "layers":
                handles.append(module.register_forward_pre_hook(_keeps_input(inputs, group.name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._gated(group, inputs, part)))
        return handles

    def _gated(self, group: ChannelGroup, inputs: dict[str, Tensor], part: Part) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            y = output[0] if isinstance(output, (tuple, list)) else output
            x = inputs.pop(group.name, None)
            if group.kind == "layers" and (x is None or x.shape != y.shape):
                raise ValueError(f"{group.name!r} is not a residual block: it changes the shape of its input")
            with torch.no_grad():
                added = y.detach() if x is None else y.detach() - x

            def read(added: Tensor, grad: Tensor) -> None:
                self._add(group.name, _dot(added, grad, self._per_sample), part)

            gated = tapped(y, read, copy=False, saved=[added])
            return (gated, *output[1:]) if isinstance(output, (tuple, list)) else gated

        return hook

    def rows(self) -> dict[str, ChannelRows]:
        """(N, 1) finite rows of every block and branch."""
        return {name: ChannelRows(rows) for name, rows in self.found().items()}


def _keeps_input(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = first_floating(args, kwargs)
        if x is not None:
            inputs[name] = x.detach().clone()  # the residual may be added in place

    return hook


def _dot(added: Tensor, grad: Tensor, per_sample: bool) -> Tensor:
    """(samples, 1) added . gradient of every sample, or (1, 1) of all."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    products = (added.to(dtype) * grad.to(dtype)).flatten(1)
    return products.sum(1, keepdim=True) if per_sample else products.sum().reshape(1, 1)
