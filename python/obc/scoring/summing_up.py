"""Turns the sums and kept rows of one scorer, or of several processes' scorers, into scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obc.distribution import obc_version
from obc.model.processes import gather_tensors, gathered, reduce_tensor
from obc.model.usable import not_finite
from obc.scoring.coverage import Coverage, merged
from obc.scoring.errors import ScoringError
from obc.scoring.parts import Parts
from obc.scoring.reading.flat_row import Slot
from obc.scoring.results.kept_rows import KeptRows
from obc.scoring.results.scores import ChannelScores, Scores


def scores_of(parts: Parts, rows: str, merged_over: Any) -> Scores:
    """The scores of all rows so far.

    Args:
        rows: "batch" or "sample".
        merged_over: the process group whose processes have rows of their own; None if this process has all rows.

    Raises:
        ScoringError: no finite row has ended, or a score lies beyond float32.
    """
    facts = Facts(parts.counter.count(), parts.coverage(), parts.counter.left_out)
    sums = {flat: flat.scores for flat in parts.flats}
    if merged_over is not None:
        facts = all_facts(facts, merged_over)
        sums = {flat: scores.clone() for flat, scores in sums.items()}
        for total in sums.values():
            reduce_tensor(total, merged_over)
    if facts.num_rows == 0:
        how = "; call backward inside `with scorer.row():`"
        why = f"; left out: {facts.left_out[0]}{not_finite(parts.model)}" if facts.left_out else how
        raise ScoringError(f"no row was read{why}")
    parts.refuse_unscored()
    slots = {name: parts.plan.sides(name) for name in parts.plan.readers if facts.coverage[name].scored}
    found = {
        name: {side: slot.of(sums[slot.flat]).detach().clone().float() for side, slot in sides.items()}
        for name, sides in slots.items()
    }
    for name, values in ((name, values) for name, sides in found.items() for values in sides.values()):
        if not bool(values.isfinite().all()):
            raise ScoringError(
                f"scores of {name!r} lie beyond the largest float32; divide the loss by a power of ten, which changes "
                "no ranking"
            )
    metadata = {"model": type(parts.model).__name__, "rows": rows, "obc": obc_version() or "unknown"}
    if facts.left_out:
        metadata["left_out"] = "; ".join(facts.left_out)
    return Scores(
        {name: ChannelScores(**({"out_channels": None} | sides)) for name, sides in found.items()},
        num_rows=facts.num_rows,
        coverage=facts.coverage,
        metadata=metadata,
        rows=_kept_rows(parts, slots, merged_over),
    )


def _kept_rows(parts: Parts, slots: Mapping[str, Mapping[str, Slot]], merged_over: Any) -> KeptRows | None:
    if parts.store is None:
        return None
    rows = parts.store.kept(slots)
    if merged_over is not None:
        rows = KeptRows(all_rows(rows.matrices, merged_over), rows.columns)
    return rows


@dataclass(frozen=True)
class Facts:
    """The results of one process, or of all of them together.

    Attributes:
        num_rows: number of rows added.
        coverage: module name -> how it is read.
        left_out: the rows left out, each with its reason.
    """

    num_rows: int
    coverage: dict[str, Coverage]
    left_out: list[str]


def all_facts(facts: Facts, group: Any) -> Facts:
    """The facts of all processes, merged. A module counts as scored if any process scored it."""
    everyone = gathered(facts, group)
    coverage = merged([one.coverage for one in everyone])
    left_out = [f"process {rank}: {what}" for rank, one in enumerate(everyone) for what in one.left_out]
    return Facts(sum(one.num_rows for one in everyone), coverage, left_out)


def all_rows(matrices: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The rows of every process, one below another in the order of the processes: (rows, channels) each."""
    counts = gathered(len(matrices[0]), group)
    return [_gathered(matrix, counts, group) for matrix in matrices]


def _gathered(matrix: Tensor, counts: list[int], group: Any) -> Tensor:
    padded = matrix.new_zeros(max(counts), matrix.shape[1])
    padded[: len(matrix)] = matrix
    parts = gather_tensors(padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
