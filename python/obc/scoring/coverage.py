"""How one module was read: the values of ``Scores.coverage`` and ``Statistics.coverage``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_UNSCORED, _UNREAD = "unscored", "unread"
_CHAINED = re.compile(r", (out|in) channels from ")


class Coverage(str):
    """How a module was read, or why not: a string with its parts as attributes.

    >>> coverage = Coverage("gate", tied=["head"])
    >>> coverage, coverage.tied, coverage.scored
    ('gate, tied with head', ('head',), True)

    Attributes:
        how: "gate", "norm gradient", "weight gradient" or "unscored"; other statistics use "input" or "unread", for
            example.
        reason: why gates don't read it, or why nothing does; None if there is nothing to explain.
        copied: whether the gate keeps a copy of the activation.
        checked: whether its gates were compared with a weight gradient.
        tied: the other modules that use the same weight.
        chained: (side, source) of channels whose rows follow from other rows.
    """

    how: str
    reason: str | None
    copied: bool
    checked: bool
    tied: tuple[str, ...]
    chained: tuple[tuple[str, str], ...]

    def __new__(
        cls,
        how: str,
        reason: str | None = None,
        *,
        copied: bool = False,
        checked: bool = True,
        tied: Iterable[str] = (),
        chained: Iterable[Iterable[str]] = (),
    ) -> Coverage:
        tied, pairs = tuple(tied), tuple((side, source) for side, source in chained)
        text = how + " on a copy" * copied + " (unchecked)" * (not checked)
        text += "" if reason is None else f": {reason}"
        text += f", tied with {', '.join(tied)}" if tied else ""
        text += "".join(f", {side} channels from {source}" for side, source in pairs)
        self = super().__new__(cls, text)
        self.how, self.reason, self.copied, self.checked, self.tied, self.chained = (
            *(how, reason, copied, checked),
            *(tied, pairs),
        )
        return self

    @classmethod
    def unscored(cls, reason: str) -> Coverage:
        """The coverage of a module that has no scores, for a ``reason``."""
        return cls(_UNSCORED, reason)

    @classmethod
    def unread(cls, reason: str) -> Coverage:
        """The coverage of a module that a statistic could not read, for a ``reason``."""
        return cls(_UNREAD, reason)

    @classmethod
    def parse(cls, text: str) -> Coverage:
        """The coverage whose text is ``text``; early file formats store only the text."""
        if isinstance(text, cls):
            return text
        before, *chained = _CHAINED.split(text)
        head, _, tied = before.partition(", tied with ")
        how, explained, reason = head.partition(": ")
        copied, checked = " on a copy" in how, " (unchecked)" not in how
        found = cls(
            how.removesuffix(" (unchecked)").removesuffix(" on a copy"),
            reason if explained else None,
            copied=copied,
            checked=checked,
            tied=tied.split(", ") if tied else (),
            chained=zip(chained[::2], chained[1::2], strict=True),
        )
        return found if found == text else cls(text)

    @property
    def scored(self) -> bool:
        """Whether the module was read and has scores or sums."""
        return self.how not in (_UNSCORED, _UNREAD)

    def fields(self) -> dict[str, Any]:
        """The attributes as plain values; ``Coverage(**coverage.fields())`` is the same coverage."""
        return dict(vars(self))

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), self.fields()


def merged(coverages: Sequence[Mapping[str, Coverage]]) -> dict[str, Coverage]:
    """The coverage over several processes: a module counts as read if any process read it."""
    found: dict[str, Coverage] = {}
    for coverage in coverages:
        for name, how in coverage.items():
            if name not in found or not found[name].scored:
                found[name] = how
    return found
