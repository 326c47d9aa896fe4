"""What can go wrong while a row is read."""

from __future__ import annotations


class ScoringError(RuntimeError):
    """A row could not be read; the message names the module, and the model is as it was."""


class InplaceError(ScoringError):
    """An activation was changed in place after a gate had read it; the row was dropped and can be repeated."""


class SampleRowsError(ScoringError):
    """Modules of this model have no per-sample form: sample rows must come one sample at a time."""
