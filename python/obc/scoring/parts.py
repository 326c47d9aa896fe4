"""The parts of a scorer, shared by the steps that read rows, resume, and compute scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from obc.model.arguments import instance
from obc.scoring.coverage import Coverage
from obc.scoring.errors import ScoringError
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.flat_row import FlatRow
from obc.scoring.reading.module_readers import RowReading
from obc.scoring.reading.reading_plan import Plan
from obc.scoring.reading.row_counter import RowCounter
from obc.scoring.results.row_store import RowStore
from obc.scoring.sharding import SharedRows


@dataclass
class Parts:
    """The parts of one scorer.

    Attributes:
        model: the model that is scored.
        strict: raise if a module ends unscored.
        was_checked: whether gates are compared with weight gradients.
        plan: what is read, and the sums of squares.
        reading: which kind of row is read.
        counter: counts rows and names those left out.
        shared: adds up rows that are spread over several processes.
        store: keeps rows, or None.
        attachment: what is attached to the model, or None.
    """

    model: nn.Module
    strict: bool
    was_checked: bool
    plan: Plan
    reading: RowReading
    counter: RowCounter
    shared: SharedRows
    store: RowStore | None
    attachment: Attachment | None = None

    @property
    def flats(self) -> list[FlatRow]:
        """The flat rows, one per device and dtype."""
        return list(self.plan.flats.values())

    @property
    def devices(self) -> set[torch.device]:
        """The devices of the flat rows."""
        return {flat.device for flat in self.flats}

    @property
    def nbytes(self) -> int:
        """Bytes held between rows: the row, its gates, the sums, and kept rows in memory."""
        norms = [] if self.attachment is None else self.attachment.norms
        store = 0 if self.store is None else self.store.memory_bytes
        gradients = sum(part.gradient.nbytes for part in norms)
        return sum(flat.nbytes for flat in self.flats) + self.counter.nbytes + gradients + store

    def coverage(self) -> dict[str, Coverage]:
        """Module name -> how it is read, or why not."""
        return self.plan.coverage(self.model, self.was_checked)

    def refuse_unscored(self, later_rows: bool = False) -> None:
        """If strict, raise if a module ends unscored.

        Args:
            later_rows: more rows follow, so a module that was not used yet is accepted.
        """
        if not self.strict:
            return
        unscored = {name: how for name, how in self.coverage().items() if not how.scored}
        if later_rows:
            readers = self.plan.readers
            unscored = {name: how for name, how in unscored.items() if name not in readers or not readers[name].scored}
        if unscored:
            raise ScoringError(f"strict: {'; '.join(f'{name!r} is {how}' for name, how in unscored.items())}")


def state_of(parts: Parts, rows: str, kept_rows: bool) -> dict[str, Any]:
    """See :meth:`obc.JacobianScorer.state_dict`."""
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
    instance("state", state, dict, "what state_dict() gave")
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
