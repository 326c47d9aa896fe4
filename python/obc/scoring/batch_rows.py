"""From batches to rows: what ``obc.score`` does with each batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.batches import part_of, samples_in
from obc.scoring.errors import RowError, SampleRowsError
from obc.scoring.scorer import JacobianScorer

logger = logging.getLogger("obc")

LossFunction = Callable[[nn.Module, Any], Tensor]


class BatchRows:
    """Turns batches into rows: splits them, repeats a row that had to be dropped, goes sample by sample where it must.

    Attributes:
        one_at_a_time: sample rows must come one sample at a time.
    """

    def __init__(
        self, scorer: JacobianScorer, loss_fn: LossFunction, micro_batch: int | None = None, loss_scale: float = 1.0
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        self.scorer, self.loss_fn, self.micro_batch, self.loss_scale = scorer, loss_fn, micro_batch, loss_scale
        self.one_at_a_time = False

    def batch(self, index: int, batch: Any) -> None:
        try:
            self._rows(index, batch)
        except RowError as error:
            logger.warning("%s: it is repeated", error)
            self._rows(index, batch)
        except SampleRowsError as error:
            logger.warning("scoring sample by sample, which is slower: %s", error)
            self.one_at_a_time = True
            self._rows(index, batch)

    def _rows(self, index: int, batch: Any) -> None:
        if self.scorer.rows == "batch":
            with self.scorer.row(self.loss_scale):
                for part, share in self._parts(index, batch):
                    loss = _checked_loss(index, self.loss_fn(self.scorer.model, part))
                    (loss * (share * self.loss_scale)).backward()
                    del loss  # and with it the graph, before the next part makes its own
            return
        for part, _ in self._parts(index, batch):
            with self.scorer.row(self.loss_scale):
                losses = _checked_losses(index, self.loss_fn(self.scorer.model, part))
                self.scorer.check_samples(losses)
                (losses.sum() * self.loss_scale).backward()
                del losses

    def _parts(self, index: int, batch: Any) -> Iterator[tuple[Any, float]]:
        """The parts that a batch is read in, each with its share of the samples."""
        self._seek(index, 0)
        size = 1 if self.one_at_a_time else self.micro_batch
        samples = 0 if size is None else self._samples_in(batch)
        if size is None or size >= samples:
            yield batch, 1.0
            return
        for start in range(0, samples, size):
            stop = min(start + size, samples)
            self._seek(index, start)
            yield part_of(batch, start, stop, samples), (stop - start) / samples

    def _samples_in(self, batch: Any) -> int:
        if self.micro_batch is not None:
            return samples_in(batch)
        with torch.no_grad():  # no gate is on, so that this pass belongs to no row
            return self.loss_fn(self.scorer.model, batch).numel()

    def _seek(self, row: int, sample: int) -> None:
        """A loss that draws random numbers draws the same ones however the batch is split, and in a repeated row."""
        if (seek := getattr(self.loss_fn, "seek", None)) is not None:
            seek(row, sample)


def _checked_loss(index: int, loss: Any) -> Tensor:
    loss = _checked_graph(index, loss)
    if loss.numel() != 1:
        raise ValueError(
            f"batch {index}: loss_fn returned shape {tuple(loss.shape)}, but rows='batch' needs a scalar; "
            "take its mean, or score with rows='sample'"
        )
    return loss


def _checked_losses(index: int, losses: Any) -> Tensor:
    losses = _checked_graph(index, losses)
    if losses.dim() != 1:
        raise ValueError(
            f"batch {index}: loss_fn returned shape {tuple(losses.shape)}, but rows='sample' needs the vector (B,) of "
            "per-sample losses; use reduction='none'"
        )
    return losses


def _checked_graph(index: int, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ValueError(f"batch {index}: loss_fn must return a tensor, got {type(loss).__name__}")
    if not loss.requires_grad:
        raise ValueError(
            f"batch {index}: the loss has no graph ({loss}); compute it from the model's output without "
            "no_grad, detach or .item()"
        )
    return loss
