"""Turns the sums and kept rows of one scorer, or of several processes' scorers, into scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from obc.distribution import obc_version
from obc.scoring.errors import ScoringError
from obc.scoring.parts import Parts
from obc.scoring.reading.flat_row import Slot
from obc.scoring.results import merge
from obc.scoring.results.kept_rows import KeptRows
from obc.scoring.results.scores import ChannelScores, Scores


def scores_of(parts: Parts, rows: str, merged_over: Any) -> Scores:
    """The scores of all rows so far.

    Args:
        parts: the parts of the scorer.
        rows: "batch" or "sample".
        merged_over: the process group whose processes have rows of their own; None if this process has all rows.

    Raises:
        ScoringError: no finite row has ended.
    """
    facts = merge.Facts(parts.counter.count(), parts.coverage(), parts.counter.left_out)
    sums = {flat: flat.scores for flat in parts.flats}
    if merged_over is not None:
        facts = merge.all_facts(facts, merged_over)
        sums = {flat: merge.all_sums(scores, merged_over) for flat, scores in sums.items()}
    if facts.num_rows == 0:
        how = "; call backward inside `with scorer.row():`"
        why = f"; left out: {facts.left_out[0]}" if facts.left_out else how
        raise ScoringError(f"no row was read{why}")
    parts.refuse_unscored()
    slots = {name: parts.plan.sides(name) for name in parts.plan.readers if facts.coverage[name].scored}
    found = {
        name: {side: slot.of(sums[slot.flat]).detach().clone().float() for side, slot in sides.items()}
        for name, sides in slots.items()
    }
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
        rows = KeptRows(merge.all_rows(rows.matrices, merged_over), rows.columns)
    return rows
