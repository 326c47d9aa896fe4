"""``obc.score``: the whole scoring run over an iterable of batches."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterable, Sized
from os import PathLike
from typing import Any

import torch
from torch import nn

from obc.model.arguments import iterable_batches, listed, meant, no_batches, number, positive, refuse_uncallable
from obc.model.batches import RowKind, usable_in_autograd
from obc.model.evaluation import LossFn, evaluating
from obc.model.functional_uses import calling_layers
from obc.model.processes import failing_together, gathered, notice
from obc.model.progress import ProgressLog, progress_bar
from obc.model.usable_batches import UsableBatches, all_finite
from obc.scoring.batch_rows import BatchRows
from obc.scoring.checkpoint import CheckpointError, ScorerCheckpoint
from obc.scoring.label_free import label_free_loss
from obc.scoring.results.report import PeakMemory, Report
from obc.scoring.results.scores import Scores
from obc.scoring.scorer import JacobianScorer

logger = logging.getLogger("obc")

_FIRST_CALLS = 3

# Options that may differ between a checkpoint and the run that resumes from it; modules are compared by name.
_MAY_DIFFER = ("model", "modules", "process_group", "rows_to")


def score(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    rows: RowKind = "batch",
    labels: bool = True,
    seed: int = 0,
    progress: bool | None = None,
    micro_batch: int | None = None,
    loss_scale: float = 1.0,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 10,
    **options: Any,
) -> Scores:
    """Score every channel of a model by the Jacobian Criterion (arXiv 2508.05521).

    S[c] = sum over rows n of (w_c . dL_n/dw_c)^2. The model is in eval mode while it is scored. Afterwards everything
    is restored, also after an exception: training flags, ``requires_grad``, ``.grad``, hooks. With batch rows
    ``loss_fn`` is first called once more, on one sample of the first batch, to check how every module is read
    (:class:`obc.JacobianScorer`, ``check``); this is not counted as a row. Activation checkpointing switched on by
    ``model.gradient_checkpointing_enable()`` (transformers) stays on.

    Args:
        model: any module; put the batches on its device yourself, for example in ``loss_fn``.
        batches: any iterable; about 50 mini-batches in the paper. Rows that are not finite are left out and named.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar loss for ``rows="batch"``, or the vector (B,) of per-sample
            losses for ``rows="sample"``. With ``labels=False`` it may be omitted, or returns the model's outputs.
        rows: "batch": each batch is one row, the gradient of its loss. "sample": each sample is one row.
        labels: False scores without labels, from gradients of random projections of the outputs
            (:func:`obc.scoring.label_free_loss`).
        seed: seed of these projections.
        progress: show a progress bar; None shows it only in a terminal.
        micro_batch: run a batch in parts of at most this many samples, cut along dim 0 of its tensors; lists with one
            entry for each sample are cut too. A batch row is then the sum of the parts' losses, each weighted by its
            share of the samples. This equals the mean loss of the batch if ``loss_fn`` is a mean over samples.
        loss_scale: each loss is multiplied by it before its backward and each row divided by it afterwards, so that
            float16 gradients do not underflow; use a power of two.
        checkpoint: a file to which the state is written after every ``every`` batches. A run that was killed and is
            started again with the same arguments resumes from it and gives the same bits. Finished batches are not
            loaded again if ``batches`` can be indexed, but for the last one; otherwise they are skipped. Batches must
            come in the same order, which may be drawn from torch's generators: these are restored. If the last finished
            batch is another, a list is refused, and a loader warned of. The file is removed at the end. Each process
            needs a file of its own.
        every: batches between checkpoints.
        **options: options of :class:`obc.JacobianScorer`: modules, check, strict, fallback, process_group, combine,
            fold_groups, keep_rows, rows_to, chains.

    Returns:
        The float32 scores, with the coverage (how each module was read, or why not) and a report of time and memory.

    Raises:
        ValueError: ``batches`` is empty, a loss has the wrong shape or no graph, or all rows are zero. (Modules whose
            scores are all zero or too small for float32 are named in a log message.)
        ScoringError: the model is compiled, no row was finite, or (``strict``) a module is unscored or a row is not
            finite.
        CheckpointError: the checkpoint is damaged, or belongs to another model, other weights or other arguments.
    """
    with failing_together(options.get("process_group"), model):
        if unknown := sorted(options.keys() - (known := inspect.signature(JacobianScorer).parameters.keys())):
            raise TypeError(f"obc.score got an unexpected keyword argument {unknown[0]!r}{meant(unknown[0], known)}")
        positive("every", every)
        refuse_uncallable(loss_fn=loss_fn)
        number("loss_scale", loss_scale, finite=True)
        if not labels:
            loss_fn = label_free_loss(loss_fn, rows=rows, seed=seed)
        elif loss_fn is None:
            raise ValueError("loss_fn is missing; pass one, or labels=False to score by the model's outputs alone")
        iterable_batches(batches)
        scorer = JacobianScorer(model, rows=rows, **options)
        # Functional uses in later batch rows the scorer sees itself: it reads such layers by their weights' gradients.
        loss_fn = calling_layers(loss_fn, first=_FIRST_CALLS if rows == "batch" else None)
        reader = BatchRows(scorer, loss_fn, micro_batch, loss_scale)
        total = len(batches) if isinstance(batches, Sized) else None
        if isinstance(batches, UsableBatches):
            total = batches.count
        saved = None
        if checkpoint is not None:
            all_options = inspect.signature(JacobianScorer).bind(model, rows=rows, **options)
            all_options.apply_defaults()
            same = {name: value for name, value in all_options.arguments.items() if name not in _MAY_DIFFER}
            same |= {"batches": total, "micro_batch": micro_batch, "loss_scale": loss_scale}
            saved = ScorerCheckpoint(checkpoint, scorer, same | getattr(loss_fn, "identity", {}))
        return _Run(reader, total, saved, every).over(batches, progress)


class _Run:
    """One run, or the rest of a run that was killed."""

    def __init__(self, reader: BatchRows, total: int | None, saved: ScorerCheckpoint | None, every: int) -> None:
        self.reader, self.total, self.saved, self.every = reader, total, saved, every
        self.scorer = reader.scorer
        self.done, self.earlier_seconds = 0, 0.0
        self._has_room = False  # for all kept rows; with sample rows their number is known only after a batch
        if saved is not None and (state := saved.resume()) is not None:
            self.done, self.earlier_seconds = state["batches"], state["seconds"]
            reader.one_at_a_time = state["one_at_a_time"]
            whole = "" if total is None else f" of {total}"
            logger.warning("resuming from %s: %d batches%s are done", saved.path, self.done, whole)
        if saved is not None:
            self._refuse_other_places()

    def _refuse_other_places(self) -> None:
        """Processes that read rows together must resume from the same row."""
        for group in self.scorer.groups_in_step:
            places = gathered(self.done, group)
            if len(set(places)) > 1:
                raise CheckpointError(
                    f"the checkpoints of the processes are at different rows, {places} batches are done: some were "
                    "killed before they wrote theirs; delete them all to start again"
                )

    def over(self, batches: Iterable[Any], progress: bool | None) -> Scores:
        scorer, total = self.scorer, self.total
        if scorer.row_store is not None and total and scorer.rows == "batch":
            scorer.reserve_rows(total - self.done)
            self._has_room = True
        usable = batches if isinstance(batches, UsableBatches) else None
        given = batches if usable is None else usable.all
        left = map(usable_in_autograd, given) if self.saved is None else self.saved.place.left(given)
        if usable is not None:
            left = usable.over(left, self.done)
        memory, started = PeakMemory(scorer.devices), time.perf_counter()
        with evaluating(scorer.model), scorer:
            bar = progress_bar(progress, left, desc="score", unit="row", total=total, initial=self.done)
            log = ProgressLog("obc.score", progress)
            for batch in bar:
                notice()
                log.tick(self.done, total)
                left_out = 0 if usable is None else scorer.count_left_out()
                self.reader.batch(self.done, batch)
                self.done += 1
                if usable is not None:
                    self._judge(usable, scorer.count_left_out() > left_out)
                self._after_batch(self.earlier_seconds + time.perf_counter() - started)
            kept_bytes = scorer.kept_bytes
        if self.done == 0:
            raise ValueError(no_batches("score"))
        scores = scorer.scores()
        _judge_sizes(scores)
        seconds = self.earlier_seconds + time.perf_counter() - started
        scores.report = Report(seconds, scores.num_rows, memory.read(), kept_bytes)
        if self.saved is not None:
            self.saved.remove()
        return scores

    def _judge(self, usable: UsableBatches, row_left_out: bool) -> None:
        if row_left_out:
            usable.leave_out(self.scorer.left_out[-1].partition(", and was left out")[0])
        elif not all_finite(self.reader.losses):
            usable.leave_out("its loss is not finite")

    def _after_batch(self, seconds: float) -> None:
        scorer, total = self.scorer, self.total
        if not self._has_room and scorer.row_store is not None and total is not None:
            self._has_room = True
            rows = scorer.count_rows()
            scorer.reserve_rows(-(-rows * total // self.done) - rows)
        if self.saved is not None and self.done % self.every == 0:
            state = {"batches": self.done, "seconds": seconds, "one_at_a_time": self.reader.one_at_a_time}
            self.saved.save(state)


def _judge_sizes(scores: Scores) -> None:
    """Refuse scores that are all too small for float32, and name the modules of which they are."""
    largest = {
        name: max(float(values.max()) for values in found)
        for name, one in scores.items()
        if (found := [values for values in (one.out_channels, one.in_channels) if values is not None and len(values)])
    }
    least = torch.finfo(torch.float32).tiny  # smaller squares lose digits, then all of them
    small = [name for name, value in largest.items() if value < least]
    if len(small) < len(largest):
        if small:
            logger.warning(
                "all scores of %s are below %.1e, and rank nothing: either no loss depends on these channels, as where "
                "a weight of zeros follows, or squares of their rows are too small for float32; then multiply the loss "
                "by a constant, which changes no ranking",
                listed([repr(name) for name in small]),
                least,
            )
    elif not any(largest.values()):
        raise ValueError(
            "all rows are zero: no loss depends on what was scored; check loss_fn, and rows='sample' with losses "
            "that couple samples (then rows='batch'); or the loss is so small, below about 1e-19, that the squares of "
            "rows are zero in float32: multiply it by a constant"
        )
    else:
        raise ValueError(
            f"the largest score is {max(largest.values()):.1e}, too small for float32: the loss is so small that "
            "squares of rows lose their digits; multiply it by a constant, which changes no ranking"
        )
