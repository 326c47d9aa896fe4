"""``obc.score``: the whole scoring run over an iterable of batches."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from obc.scoring.scorer import InplaceError, JacobianScorer, Rows, SampleRowsError
from obc.scoring.scores import Scores

logger = logging.getLogger("obc")

LossFunction = Callable[[nn.Module, Any], Tensor]


def score(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    rows: Rows = "batch",
    progress: bool | None = None,
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
        **options: of :class:`obc.JacobianScorer`: modules, check, strict, fallback, process_group, fold_groups.

    Returns:
        The scores, float32, with the coverage: how each module was read, or why it was not.

    Raises:
        ValueError: ``batches`` is empty, or a loss has the wrong shape or no graph.
        ScoringError: no row was finite, or (``strict``) something is unscored or not finite.
    """
    scorer = JacobianScorer(model, rows=rows, **options)
    run = _Run(scorer, loss_fn)
    total = len(batches) if isinstance(batches, Sized) else None
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


class _Run:
    """Turns batches into rows: repeats a row that had to be dropped, and goes sample by sample where it must."""

    def __init__(self, scorer: JacobianScorer, loss_fn: LossFunction) -> None:
        self.scorer, self.loss_fn = scorer, loss_fn
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
        if not self.one_at_a_time:
            self._row(index, batch)
            return
        with torch.no_grad():  # no gate is on, so that this pass belongs to no row
            samples = self.loss_fn(self.scorer.model, batch).numel()
        for sample in range(samples):
            self._row(index, _sample_of(batch, sample, samples))

    def _row(self, index: int, batch: Any) -> None:
        scorer = self.scorer
        if scorer.rows == "batch":
            with scorer.row():
                _checked_loss(index, self.loss_fn(scorer.model, batch)).backward()
            return
        with scorer.row():
            losses = _checked_losses(index, self.loss_fn(scorer.model, batch))
            scorer.check_samples(losses)
            losses.sum().backward()


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


def _sample_of(batch: Any, sample: int, samples: int) -> Any:
    """One sample of a batch: every tensor in it with ``samples`` entries along dim 0 is cut, the rest stays."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples:
            return leaf[sample : sample + 1]
        return leaf

    return pytree.tree_map(cut, batch)
