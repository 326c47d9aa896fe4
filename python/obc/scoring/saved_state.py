"""The state of a scorer, from which another scorer of the same model and options resumes exactly."""

from __future__ import annotations

from typing import Any

from obc.scoring.errors import ScoringError
from obc.scoring.parts import Parts


def state_of(parts: Parts, rows: str, kept_rows: bool) -> dict[str, Any]:
    """See :meth:`obc.JacobianScorer.state_dict`.

    Args:
        parts: the parts of the scorer.
        rows: "batch" or "sample".
        kept_rows: False omits the kept rows.
    """
    num_rows = parts.counter.count()
    state = {
        "rows": rows,
        "num_rows": num_rows,
        "rows_ended": parts.counter.read().ended,
        "left_out": list(parts.counter.left_out),
        "checking": parts.reading.checking,
        **parts.plan.state_dict(),
    }
    if kept_rows and parts.store is not None:
        state["kept_rows"] = parts.store.matrices()
    return state


def load_state(parts: Parts, rows: str, state: dict[str, Any]) -> None:
    """See :meth:`obc.JacobianScorer.load_state_dict`."""
    if parts.attachment is not None:
        raise ScoringError("load the state before entering `with scorer:`")
    if missing := sorted(state_of(parts, rows, kept_rows=False).keys() - state.keys()):
        raise ValueError(f"this is not the state of a scorer: it has no {missing[0]!r}; pass what state_dict() gave")
    if state["rows"] != rows:
        raise ValueError(f"this state has rows={state['rows']!r}, this scorer rows={rows!r}")
    if ("kept_rows" in state) != (parts.store is not None):
        kept = "kept" if "kept_rows" in state else "no kept"
        raise ValueError(f"this state has {kept} rows, this scorer keep_rows={parts.store is not None}")
    parts.plan.load_state_dict(state)
    if parts.store is not None:
        parts.store.load(state["kept_rows"])
    parts.counter.load(state["rows_ended"], state["num_rows"], state["left_out"])
    parts.reading.checking = state["checking"]
