"""Turns batches into rows for ``obc.score``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from obc.model.arguments import positive
from obc.model.batches import RowKind, part_of, parts_of, refuse_empty, samples_in
from obc.model.errors import on_batch
from obc.model.evaluation import LossFn, seek
from obc.scoring.errors import RowError, SampleRowsError
from obc.scoring.scorer import JacobianScorer

logger = logging.getLogger("obc")

# A batch is repeated after each correction of how the model is read; the first row needs a few at most.
_REPEATS = 7
# In half precision another order of operations changes the same losses by up to a percent.
_SAME_LOSS = 1e-2


class BatchRows:
    """Turns batches into rows: splits them, repeats dropped rows, and goes sample by sample where needed.

    Attributes:
        one_at_a_time: whether sample rows must come one sample at a time.
        losses: of the last batch, detached. A loss can be infinite or NaN although its row is finite.
    """

    def __init__(
        self, scorer: JacobianScorer, loss_fn: LossFn, micro_batch: int | None = None, loss_scale: float = 1.0
    ) -> None:
        if micro_batch is not None:
            positive("micro_batch", micro_batch)
        self.scorer, self.loss_fn, self.micro_batch, self.loss_scale = scorer, loss_fn, micro_batch, loss_scale
        self.one_at_a_time, self._checks_on_a_sample = False, True
        self.losses: list[Tensor] = []
        self._read = 0  # samples of the current batch that are already rows: a repetition starts after them

    def batch(self, index: int, batch: Any) -> None:
        """Read the rows of batch ``index``, again if its row had to be dropped."""
        refuse_empty(index, batch)
        if self._checks_on_a_sample and self.scorer.can_check_on_a_sample:
            self._check_on_a_sample(index, batch)
        self._read, self.losses = 0, []
        for repeats_left in reversed(range(_REPEATS)):
            try:
                self._rows(index, batch)
                return
            except (RowError, SampleRowsError) as error:
                if not repeats_left:
                    raise
                if isinstance(error, RowError):
                    logger.warning("%s: it is repeated", error)
                else:
                    logger.warning("scoring sample by sample, which is slower: %s", error)
                    self.one_at_a_time = True

    def _check_on_a_sample(self, index: int, batch: Any) -> None:
        """Try the check on one sample; if the batch can't be cut or the model fails on it, check the first row."""
        self._checks_on_a_sample = False
        try:
            samples = samples_in(batch)
        except ValueError:
            return
        if samples < 2:
            return
        seek(self.loss_fn, index, 0)
        devices = [device for device in self.scorer.devices if device.type == "cuda"]
        try:
            with torch.random.fork_rng(devices), self.scorer.check_on_a_sample():
                loss = self.loss_fn(self.scorer.model, part_of(batch, 0, 1, samples))
                (checked_loss(index, loss, "batch") * self.loss_scale).backward()
        except (MemoryError, torch.OutOfMemoryError):
            raise  # a whole batch takes even more memory
        except Exception as error:  # a loss may raise anything for one sample; the first batch will show what is wrong
            logger.info("the check is made on the whole first batch, not on one sample: %s", error)

    def _rows(self, index: int, batch: Any) -> None:
        if self.scorer.rows == "batch":
            with self.scorer.row(self.loss_scale):
                for part, share, _ in self._parts(index, batch):
                    loss = checked_loss(index, self._loss(index, part), "batch")
                    (loss * (share * self.loss_scale)).backward()
                    self.losses.append(loss.detach())
                    del loss  # frees the graph before the next part builds its own
            return
        for part, _, start in self._parts(index, batch):
            with self.scorer.row(self.loss_scale):
                losses = checked_loss(index, self._loss(index, part), "sample")
                if losses.numel() == 0:
                    raise ValueError(f"batch {index} has no samples; leave empty batches out")
                self.scorer.check_samples(losses)
                self._check_spread(losses, index, part, start)
                (losses.sum() * self.loss_scale).backward()
                self.losses.append(losses.detach())
                del losses
            self._read = start + self.losses[-1].numel()

    def _loss(self, index: int, part: Any) -> Any:
        before = self.scorer.additions
        with on_batch(self.scorer.model, part, index):
            loss = self.loss_fn(self.scorer.model, part)
        if self.scorer.additions != before:
            raise ValueError(f"batch {index}: loss_fn called backward, which would count twice; return the loss alone")
        return loss

    def _check_spread(self, losses: Tensor, index: int, part: Any, start: int) -> None:
        """Raise if spreading look-ups over the samples changed the losses."""
        if not self.scorer.spread:
            return
        seek(self.loss_fn, index, start)
        with torch.no_grad():  # no gate is on
            plain = self.loss_fn(self.scorer.model, part)
        if plain.shape != losses.shape or not torch.allclose(plain, losses, rtol=_SAME_LOSS, equal_nan=True):
            raise self.scorer.unspread()

    def _parts(self, index: int, batch: Any) -> Iterator[tuple[Any, float, int]]:
        """The parts of a batch, each with its share of the samples and the index of its first sample."""
        seek(self.loss_fn, index, 0)
        size = 1 if self.one_at_a_time else self.micro_batch
        samples = None if size is None else self._samples_in(batch)
        for part, start, share in parts_of(batch, size, samples, self._read):
            seek(self.loss_fn, index, start)
            yield part, share, start

    def _samples_in(self, batch: Any) -> int:
        if self.micro_batch is not None:
            return samples_in(batch)
        # This pass belongs to no row. It needs a graph if the loss differentiates the model's outputs itself.
        return self.loss_fn(self.scorer.model, batch).numel()


def checked_loss(index: int, loss: Any, rows: RowKind, error: type[ValueError] = ValueError) -> Tensor:
    """What ``loss_fn`` returned for a batch, checked: it has a graph, and the shape that the kind of rows needs."""
    if not isinstance(loss, Tensor):
        raise error(f"batch {index}: loss_fn must return a tensor, got {type(loss).__name__}")
    if not loss.requires_grad:
        raise error(
            f"batch {index}: the loss has no graph ({loss}); compute it from the model's output without "
            "no_grad, detach or .item()"
        )
    if loss.is_complex():
        raise error(f"batch {index}: loss_fn returned {loss.dtype}; return a real number, such as its abs() or real")
    returned = f"batch {index}: loss_fn returned shape {tuple(loss.shape)}, but rows={rows!r} needs"
    if rows == "batch" and loss.numel() != 1:
        raise error(f"{returned} a scalar; take its mean, or score with rows='sample'")
    if rows == "sample" and loss.dim() != 1:
        raise error(f"{returned} the vector (B,) of per-sample losses; use reduction='none'")
    return loss
