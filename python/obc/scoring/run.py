"""``obc.score``: the whole scoring run over an iterable of batches."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from obc.scoring.errors import InplaceError, SampleRowsError
from obc.scoring.scorer import JacobianScorer, Rows
from obc.scoring.scores import Scores
from obc.scoring.splitting import part_of, samples_in

logger = logging.getLogger("obc")

LossFunction = Callable[[nn.Module, Any], Tensor]


def score(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    rows: Rows = "batch",
    progress: bool | None = None,
    micro_batch: int | None = None,
    loss_scale: float = 1.0,
    **options: Any,
) -> Scores:
    """Score every channel of a model by the Jacobian Criterion (arXiv 2508.05521).

    S[c] = sum over rows n of (w_c . dL_n/dw_c)^2. The model is in eval mode while it is scored and is left as it was:
    training flags, ``requires_grad``, ``.grad``, hooks, also after an exception.

    Args:
        model: any module; put the batches on its device yourself, for example in ``loss_fn``.
        batches: any iterable; about 50 mini-batches in the paper.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar loss for ``rows="batch"``, or the vector (B,) of per-sample
            losses for ``rows="sample"``.
        rows: "batch": each batch is one row, the gradient of its loss. "sample": each sample is one row.
        progress: show a progress bar; None shows it in a terminal only.
        micro_batch: run a batch in parts of at most this many samples, cut along dim 0 of its tensors. A batch row is
            then the sum of the parts' losses, each weighted by its share of the samples: the mean loss of the batch,
            where ``loss_fn`` is a mean over samples.
        loss_scale: what each loss is multiplied by before its backward and each row divided by after it, so that
            gradients in float16 do not vanish; a power of two.
        **options: of :class:`obc.JacobianScorer`: modules, check, strict, fallback, process_group, fold_groups,
            keep_rows, rows_to.

    Returns:
        The scores, float32, with the coverage: how each module was read, or why it was not.

    Raises:
        ValueError: ``batches`` is empty, or a loss has the wrong shape or no graph.
        ScoringError: no row was finite, or (``strict``) something is unscored or not finite.
    """
    scorer = JacobianScorer(model, rows=rows, **options)
    run = Run(scorer, loss_fn, micro_batch, loss_scale)
    total = len(batches) if isinstance(batches, Sized) else None
    if scorer.keeps_rows and rows == "batch" and total:
        scorer.reserve_rows(total)
    index = -1
    with _evaluating(model), scorer:
        disable = None if progress is None else not progress
        for index, batch in enumerate(tqdm(batches, desc="score", unit="row", total=total, disable=disable)):
            run.batch(index, batch)
    if index < 0:
        raise ValueError("batches is empty: there is nothing to score; a generator can be read only once")
    return scorer.scores()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module's own training flag is restored after it."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


class Run:
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
        except InplaceError as error:
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
            return
        for part, _ in self._parts(index, batch):
            with self.scorer.row(self.loss_scale):
                losses = _checked_losses(index, self.loss_fn(self.scorer.model, part))
                self.scorer.check_samples(losses)
                (losses.sum() * self.loss_scale).backward()

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
