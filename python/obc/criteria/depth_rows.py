"""Rows of whole blocks and branches: a gate on what they add to the residual stream.

r_b[n] = sum over positions of y . dL_n/dy, where y is the output of a branch, or the output of a block minus its input:
the first-order change of the loss of row n when the block is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.evaluation import LossFn, first_floating, seek
from obc.model.groups import ChannelGroup
from obc.model.hooks import hooked
from obc.scoring.results.kept_rows import ChannelRows
from obc.statistics.taps import tapped

# (row, first sample): identifies one forward and backward pass.
_Part = tuple[int, int]


class DepthRows:
    """A loss function that reads rows of blocks while its gradient is computed.

    The caller says by ``seek(row, sample)`` which batch comes, and from which of its samples on. A batch that runs
    again, or whose backward does, counts once.

    Args:
        groups: of kinds "layers" and "sublayers".
        per_sample: rows belong to samples, which lie along dim 0 of the blocks' outputs.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], loss_fn: LossFn, per_sample: bool) -> None:
        self._model, self._groups, self._loss_fn, self._per_sample = model, list(groups), loss_fn, per_sample
        self._parts: dict[_Part, dict[str, Tensor]] = {}
        self._part: _Part = (0, 0)
        if hasattr(loss_fn, "identity"):
            self.identity = loss_fn.identity

    def seek(self, row: int, sample: int) -> None:
        """The next call belongs to batch ``row``, from ``sample`` on."""
        seek(self._loss_fn, row, sample)
        if sample == 0:
            self._parts = {part: found for part, found in self._parts.items() if part[0] != row}
        self._part = (row, sample)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self._loss_fn(model, batch)
        part = self._part
        inputs: dict[str, Tensor] = {}
        handles: list[Any] = []
        for group in self._groups:
            module = model.get_submodule(group.name)
            if group.kind == "layers":
                handles.append(module.register_forward_pre_hook(_keeps_input(inputs, group.name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._gated(group, inputs, part)))
        with hooked(handles):
            loss = self._loss_fn(model, batch)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(lambda grad: self._parts.__setitem__(part, {}))
        return loss

    def _gated(self, group: ChannelGroup, inputs: dict[str, Tensor], part: _Part) -> Callable[..., Any]:
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

    def _add(self, name: str, dot: Tensor, part: _Part) -> None:
        found = self._parts.setdefault(part, {})
        found[name] = found[name] + dot if name in found else dot

    def rows(self) -> dict[str, ChannelRows]:
        """(N, 1) finite rows of every block and branch; 0 if a batch did not reach it."""
        matrix = self._matrix()
        matrix = matrix[matrix.isfinite().all(1)]
        return {group.name: ChannelRows(matrix[:, [place]].float()) for place, group in enumerate(self._groups)}

    def _matrix(self) -> Tensor:
        """(N, groups) float64."""
        lines: list[Tensor] = []
        names = [group.name for group in self._groups]
        for row in sorted({row for row, _ in self._parts}):
            parts = [self._line(self._parts[part], names) for part in sorted(self._parts) if part[0] == row]
            lines.append(torch.cat(parts) if self._per_sample else torch.stack(parts).sum(0))
        return torch.cat(lines) if lines else torch.empty(0, len(names), dtype=torch.float64, device="cpu")

    def _line(self, found: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """(samples, groups), or (1, groups)."""
        count = max((len(dot) for dot in found.values()), default=1)
        nothing = torch.zeros(count, dtype=torch.float64, device="cpu")
        return torch.stack([found[name].double().cpu() if name in found else nothing for name in names], 1)


def _keeps_input(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = first_floating(args, kwargs)
        if x is not None:
            inputs[name] = x.detach().clone()  # the residual may be added in place

    return hook


def _dot(added: Tensor, grad: Tensor, per_sample: bool) -> Tensor:
    """added . gradient of every sample, or (1,) of all."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    products = (added.to(dtype) * grad.to(dtype)).flatten(1)
    return products.sum(1) if per_sample else products.sum().reshape(1)
