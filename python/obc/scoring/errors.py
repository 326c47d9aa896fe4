"""What can go wrong while a row is read."""

from __future__ import annotations


class ScoringError(RuntimeError):
    """A row could not be read; the message names the module, and the model is as it was."""


class RowError(ScoringError):
    """A row was dropped and can be repeated: it will be read in another way."""


class InplaceError(RowError):
    """An activation was changed in place after a gate had read it."""


class ChainError(RowError):
    """The model took another path than in the checking row, so rows can't be derived from other rows along it."""


class SampleRowsError(ScoringError):
    """Modules of this model have no per-sample form: sample rows must come one sample at a time."""

    @classmethod
    def of(cls, names: list[str]) -> SampleRowsError:
        """The error for these modules."""
        shown = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return cls(
            f"no gate can read {shown} per sample; pass one sample a row, or leave them out with fallback='skip'"
        )
