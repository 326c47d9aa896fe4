"""Errors raised while a row is read."""

from __future__ import annotations


class ScoringError(RuntimeError):
    """A row could not be read. The message names the module; the model is left as it was."""


class RowError(ScoringError):
    """A row was dropped and can be repeated; the repetition is read in another way."""


class InplaceError(RowError):
    """An activation was changed in place after a gate had read it."""


class ChainError(RowError):
    """The model took another path than in the checking row, so a chain does not hold."""


class SampleRowsError(ScoringError):
    """Some modules have no per-sample form: sample rows must come one sample at a time."""

    @classmethod
    def of(cls, names: list[str]) -> SampleRowsError:
        """The error for these modules."""
        shown = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return cls(
            f"no gate can read {shown} per sample; pass one sample a row, or leave them out with fallback='skip'"
        )
