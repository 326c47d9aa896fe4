"""Rows r_m,u[n] = w . dL_n/dw of every group, and the Jacobian Criterion, which sums their squares."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from obc.criteria.depth_rows import DepthRows
from obc.criteria.parameter_rows import ParameterRows, weights_outside_calls
from obc.criteria.protocol import About, Criterion
from obc.criteria.subject import Subject
from obc.model.evaluation import LossFn, evaluating
from obc.model.groups import ChannelGroup, Side, Sided, Slices
from obc.scoring.coverage import Coverage
from obc.scoring.run import score
from obc.statistics.loss import frozen, run_backward
from obc.statistics.results import Statistics
from obc.statistics.rows import Rows


@dataclass(frozen=True)
class GroupRows:
    """Rows of every group, and the modules without rows.

    Attributes:
        rows: module -> (N, channels) on both sides.
        unscored: module -> why it has no rows.
    """

    rows: Mapping[str, Sided]
    unscored: Mapping[str, str]


def read_rows(subject: Subject) -> GroupRows:
    """Read the rows that the groups' scores need: of consumers for gates, otherwise of every slice.

    Rows of whole blocks and branches, and of weights for which no layer is called, are read in the same passes
    (:mod:`obc.criteria.depth_rows`, :mod:`obc.criteria.parameter_rows`).
    """
    wanted = Rows(subject.slices).wanted(subject.model, subject.groups) or {}
    readers: list[DepthRows | ParameterRows] = []
    loss, micro_batch, per_sample = subject.loss_fn, subject.micro_batch, subject.rows == "sample"
    if depth := [group for group in subject.groups if group.is_depth]:
        loss = DepthRows(depth, loss, per_sample)
        readers.append(loss)
    with contextlib.ExitStack() as stack:
        if dims := weights_outside_calls(subject.model, subject.groups, subject.slices):
            loss = stack.enter_context(ParameterRows(subject.model, dims, loss, per_sample))
            readers.append(loss)
            micro_batch = 1 if per_sample else micro_batch
        if wanted or not readers:
            found = _scored(subject, wanted, loss, micro_batch)
        else:
            found = GroupRows({}, {})
            with evaluating(subject.model), frozen(subject.model):
                for row, batch in enumerate(subject.batches):
                    run_backward(subject.model, loss, row, batch, subject.rows, micro_batch)
    return GroupRows(_joined([found.rows, *(reader.rows() for reader in readers)]), found.unscored)


def _scored(subject: Subject, wanted: dict[str, set[Side]], loss: LossFn, micro_batch: int | None) -> GroupRows:
    modules = dict(subject.model.named_modules())
    check = subject.rows == "sample" or not all(
        _is_confirmed(subject, name, modules[name], sides) for name, sides in wanted.items()
    )
    scores = score(
        subject.model,
        subject.batches,
        loss,
        rows=subject.rows,
        keep_rows=True,
        micro_batch=micro_batch,
        modules=wanted,
        check=check,
        progress=False,
    )
    if check:
        plain = {Coverage("gate"), Coverage("norm gradient")}  # neither copied, nor tied, nor following from other rows
        subject.confirmed.update((n, (modules[n], wanted[n])) for n, how in scores.coverage.items() if how in plain)
    unscored = {name: str(how.reason) for name, how in scores.coverage.items() if name in wanted and not how.scored}
    return GroupRows(scores.rows, unscored)


def _joined(found: list[Mapping[str, Sided]]) -> dict[str, Sided]:
    """Rows of several readers, each of the same batches.

    Raises:
        ValueError: some batches are finite for one and not for another.
    """
    joined = {name: rows for one in found for name, rows in one.items()}
    sides = [side for rows in joined.values() for side in (rows.out_channels, rows.in_channels) if side is not None]
    if len(counts := {len(side) for side in sides}) > 1:
        raise ValueError(
            f"of some layers {min(counts)} rows are finite, of others {max(counts)}; leave out the batches that are "
            "not finite"
        )
    return joined


def _is_confirmed(subject: Subject, name: str, module: nn.Module, sides: set[Side]) -> bool:
    """Whether an earlier check confirmed the gates of this same module on these sides."""
    known, read = subject.confirmed.get(name, (None, set()))
    return known is module and sides <= read


class Jacobian(Criterion):
    """S_u = sum over n and m of r_m,u[n]^2; for the gate, sum over n of (sum over consumers r_m,u[n])^2.

    The Jacobian Criterion (arXiv 2508.05521). ``selection="joint"`` uses the gate's rows instead of scores.

    Args:
        slices: "gate" or "all"; "all" is the paper's.
    """

    name = "jacobian"
    reads_parameters = True
    about = About(
        "Optimal Brain Connection",
        "arXiv 2508.05521",
        "sum over rows n of (sum over consumers of w . dL_n/dw)^2",
        "labels",
        kinds="all that have rows",
        differs="slices='all' squares every slice separately, as the paper does",
    )

    def __init__(self, slices: Slices = "gate") -> None:
        self.slices = slices
        self.needs = (Rows(slices),)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) sum over n of squared rows, of every slice or of the gate."""
        return group.scores(statistics.rows, self.slices)
