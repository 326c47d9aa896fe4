"""Checks of arguments that many functions take."""

from __future__ import annotations

from collections.abc import Iterable


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises ValueError if the argument's value is none of ``allowed``."""
    if value not in (known := tuple(allowed)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def positive(name: str, value: object) -> None:
    """Raises ValueError if the argument's value is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
