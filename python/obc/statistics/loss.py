"""A loss function that tells readers which part of a batch is run, and when each backward begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.batches import RowKind, parts_of
from obc.model.errors import on_batch
from obc.model.evaluation import LossFn, seek
from obc.scoring.batch_rows import checked_loss
from obc.scoring.reading.single_samples import guard
from obc.statistics.errors import StatisticsError
from obc.statistics.reader import Readers


class WatchedLoss:
    """A loss function that tells the readers what is run.

    A batch may run again if its row had to be dropped; ``seek(row, 0)`` says that it begins. A part's backward may run
    twice, to test whether samples are independent; the gradient at the loss says that one begins. A forward pass
    without gradients only counts samples and is not read.

    Attributes:
        losses: losses of the last batch, detached.
    """

    def __init__(self, loss_fn: LossFn, readers: Readers) -> None:
        self._loss_fn, self._part, self._readers = loss_fn, readers.part, readers
        self.losses: list[Tensor] = []

    def seek(self, row: int, sample: int) -> None:
        """The next call belongs to batch ``row``, from ``sample`` on."""
        seek(self._loss_fn, row, sample)
        if sample == 0:
            self.losses.clear()
            self._readers.begin()
        else:
            self._readers.part_ends()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            self._part.reading = False
            return self._loss_fn(model, batch)
        self._part.begin(batch)
        self._part.reading = True
        losses = self._loss_fn(model, batch)
        if isinstance(losses, Tensor) and losses.requires_grad:
            self.losses.append(losses.detach())
            losses.register_hook(self._backward_begins)
        return losses

    def _backward_begins(self, grad: Tensor) -> None:
        for reader in self._readers.values():
            reader.backward_begins()


def run_backward(model: nn.Module, loss: LossFn, index: int, batch: Any, rows: RowKind, size: int | None) -> None:
    """Forward and backward of one batch, when no rows are read.

    Raises:
        StatisticsError: the loss has no graph, or its shape does not fit ``rows``.
    """
    for part, start, share in parts_of(batch, size):
        seek(loss, index, start)
        with on_batch(model, part, index):
            losses = loss(model, part)
        losses = checked_loss(index, losses, rows, StatisticsError)
        (losses.sum() * (share if rows == "batch" else 1.0)).backward()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters inside the block, so that only gradients of activations are computed.

    Norms are protected against misreading gradients of single samples (:mod:`obc.scoring.reading.single_samples`).
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    guards = [handle for module in model.modules() if (handle := guard(module)) is not None]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for handle in guards:
            handle.remove()
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
