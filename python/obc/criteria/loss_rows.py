"""Rows that a loss function reads while its gradient is computed, beside those of the scorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.evaluation import LossFn, seek
from obc.model.hooks import hooked

# (row, first sample): identifies one forward and backward pass.
Part = tuple[int, int]


class LossRows:
    """A loss function that reads rows.

    The caller says by ``seek(row, sample)`` which batch comes, and from which of its samples on. A batch that runs
    again, or whose backward does, counts once.

    Args:
        sizes: of each thing that is read the number of channels.
        per_sample: rows belong to samples.
    """

    def __init__(self, loss_fn: LossFn, sizes: Mapping[Any, int], per_sample: bool) -> None:
        self._loss_fn, self._sizes, self._per_sample = loss_fn, dict(sizes), per_sample
        self._parts: dict[Part, dict[Any, Tensor]] = {}
        self._part: Part = (0, 0)
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
        with hooked(self._hooks(model, part)):
            loss = self._loss_fn(model, batch)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(lambda grad: self._parts.__setitem__(part, {}))
        return loss

    def _hooks(self, model: nn.Module, part: Part) -> list[Any]:
        """Prepare the model to be read; the hooks that this returns are removed after the forward pass."""
        raise NotImplementedError

    def _add(self, key: Any, dot: Tensor, part: Part) -> None:
        """Add (samples, channels), or (1, channels) of a batch."""
        found = self._parts.setdefault(part, {})
        found[key] = found[key] + dot if key in found else dot

    def found(self) -> dict[Any, Tensor]:
        """(N, channels) float32 rows of everything, those that are finite; 0 if a batch did not reach it."""
        lines: list[Tensor] = []
        for row in sorted({row for row, _ in self._parts}):
            parts = [self._line(self._parts[part]) for part in sorted(self._parts) if part[0] == row]
            lines.append(torch.cat(parts) if self._per_sample else torch.stack(parts).sum(0))
        width = sum(self._sizes.values())
        matrix = torch.cat(lines) if lines else torch.empty(0, width, dtype=torch.float64, device="cpu")
        matrix = matrix[matrix.isfinite().all(1)].float()
        return dict(zip(self._sizes, matrix.split(list(self._sizes.values()), 1), strict=True))

    def _line(self, found: Mapping[Any, Tensor]) -> Tensor:
        """(samples, all channels), or (1, all channels), float64."""
        count = max((len(dot) for dot in found.values()), default=1)
        nothing = torch.zeros(count, 1, dtype=torch.float64, device="cpu")
        lines = [found[key].double().cpu() if key in found else nothing.expand(-1, n) for key, n in self._sizes.items()]
        return torch.cat(lines, 1)
