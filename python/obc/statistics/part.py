"""The part of a batch that the model is run on: which positions count, and whether anything is read."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from obc.model.batches import attention_mask
from obc.statistics.routed import RoutedCalls


class Part:
    """Tells readers about the forward pass that they see.

    Attributes:
        batch: the part of the batch.
        mask: the batch's ``attention_mask``, or None.
        valid: the mask if it is (B, T); None: every position counts.
        reading: False while the model runs for another purpose.
        calls: reads the inputs of fused experts, once for all readers.
    """

    def __init__(self) -> None:
        self.batch: Any = None
        self.mask: Tensor | None = None
        self.valid: Tensor | None = None
        self.reading = False
        self.calls = RoutedCalls()
        self._copied: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None  # a tensor and its copy

    def begin(self, batch: Any) -> None:
        """Record the part that the model is about to run on."""
        self.batch = batch
        self.calls.begin()
        self.mask = attention_mask(batch)
        self.valid = self.mask if self.mask is not None and self.mask.dim() == 2 else None

    def valid_positions(self, x: Tensor, channel_dim: int) -> Tensor | None:
        """(B, T) bool if the positions of ``x`` are those of the attention mask; None if all count.

        ``x`` is (B, T, C), or (B * T, C) as mixtures of experts flatten it. In (B, C) every sample counts.
        """
        if self.valid is None or channel_dim % x.dim() != x.dim() - 1:
            return None
        if x.shape[:-1] == self.valid.shape or (x.dim() == 2 and x.shape[0] == self.valid.numel()):
            return self.valid.to(x.device)
        return None

    def ignores_mask(self, x: Tensor, channel_dim: int) -> bool:
        """Whether the batch has a mask that does not fit ``x``, so that padding counts."""
        if self.mask is None or self.valid_positions(x, channel_dim) is not None:
            return False
        return not (x.dim() == 2 and x.shape[0] == len(self.mask))

    def copy_of(self, x: Tensor) -> Tensor:
        """A copy of ``x``; all readers of one tensor get the same copy, until the tensor changes."""
        original, held = (None, None) if self._copied is None else (ref() for ref in self._copied)
        if held is not None and original is x and torch.equal(x, held):
            return held
        copy = x.clone()
        self._copied = weakref.ref(x), weakref.ref(copy)
        return copy


def is_running_again() -> bool:
    """Whether a forward pass runs inside a backward, as in activation checkpointing: it was read before."""
    return torch._C._current_graph_task_id() != -1
