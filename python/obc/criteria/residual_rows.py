"""Reads rows of residuals at consumers' inputs during the backward pass."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from obc.criteria.joined_rows import by_group
from obc.criteria.protocol import Subject
from obc.criteria.residual_reader import ResidualReader
from obc.criteria.residuals import Cut, Residuals
from obc.model.evaluation import evaluating
from obc.model.hooks import hooked
from obc.model.usable_batches import UsableBatches, all_finite
from obc.statistics.loss import WatchedLoss, frozen, run_backward


class Also(Protocol):
    """Reads something else from the same backward passes.

    Attributes:
        now: what was read from the current batch.
    """

    now: dict[str, Tensor]

    def attach(self) -> list[Any]:
        """Hooks, to be removed at the end."""

    def begin(self) -> None:
        """A batch begins."""

    def take(self, rows: int) -> None:
        """Keep what was read from the batch, which has so many rows."""


def read_residuals(
    subject: Subject, taps: list[Residuals], tokens: int | None = None, also: Also | None = None
) -> dict[str, Tensor]:
    """Forward and backward over the batches: the finite rows of every group.

    Groups whose experts compute something other than a gated product and a down projection have no rows.

    Args:
        subject: the model, its batches and loss.
        taps: what to read.
        tokens: tokens per row; None: rows are those of ``subject.rows``.
        also: what else to read from the same backward passes.

    Raises:
        CriterionError: with ``tokens``: layers saw different numbers of positions, so their rows don't belong together.
            With rows of tokens or samples: a layer's positions are no multiple of the batch's samples.
    """
    if not taps:
        return {}
    cut = Cut(subject.rows == "sample", tokens)
    reader = ResidualReader(taps, cut)
    handles = [*reader.attach(), *([] if also is None else also.attach())]
    loss, batches = WatchedLoss(subject.loss_fn, reader.part, []), UsableBatches.of(subject.batches)
    with hooked(handles), evaluating(subject.model), frozen(subject.model):
        for index, batch in enumerate(batches):
            reader.begin()
            if also is not None:
                also.begin()
            run_backward(subject.model, loss, index, batch, subject.rows, subject.micro_batch)
            rows = reader.of_batch()
            if not all_finite((list(rows.values()), None if also is None else also.now)):
                batches.leave_out("its rows are not finite")
                continue
            for tap, values in rows.items():
                tap.rows.append(values)
            if also is not None:
                also.take(max(map(len, rows.values()), default=0) if cut.several else 1)
    return by_group(taps, cut.several)
