"""Checks of arguments that many functions take."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def one_of(name: str, value: object, allowed: Iterable[object], error: type[ValueError] = ValueError) -> None:
    """Raises ``error`` if the argument's value is none of ``allowed``."""
    known = tuple(allowed)
    if not any(isinstance(value, type(one)) and value == one for one in known):  # an array has no one truth value
        named = " or ".join(map(repr, known)) if len(known) == 2 else f"one of {', '.join(map(repr, known))}"
        raise error(f"{name} must be {named}, got {value!r}{meant(value, known)}")


def meant(value: object, known: Iterable[object]) -> str:
    """The end of a message about an unknown name: which known ones are spelled alike; empty if none is."""
    if not isinstance(value, str):
        return ""
    names = {name.lower(): name for name in known if isinstance(name, str)}
    close = [names[name] for name in difflib.get_close_matches(value.lower(), names)]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def listed(words: Sequence[object], most: int = 3) -> str:
    """The first words, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(map(str, words[:most])) + more


def positive(name: str, value: object, error: type[ValueError] = ValueError) -> None:
    """Raises ``error`` if the argument's value is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise error(f"{name} must be a positive integer, got {value!r}")


def number(name: str, value: object, finite: bool = False) -> None:
    """Raises ValueError if the argument's value is no real number, or not ``finite``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if finite and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def instance(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises TypeError if the argument's value is of none of these ``kinds``; ``expected`` says what it must be."""
    if not isinstance(value, kinds):
        got = repr(value) if value is None or isinstance(value, str) else type(value).__name__
        raise TypeError(f"{name} must be {expected}, got {got}")


def refuse_uncallable(**values: object) -> None:
    """Raises TypeError if one of the arguments' values is neither callable nor None."""
    for name, value in values.items():
        instance(name, value, (Callable, type(None)), "a function")  # type: ignore[arg-type]


def several(argument: str, value: Any, error: type[ValueError] = ValueError) -> None:
    """Raises ``error`` if the value of an argument that takes several names is one name, or a single object."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        got = repr(value) if isinstance(value, str) else type(value).__name__
        raise error(f"{argument} must be a list or another iterable, got {got}; of a single one, pass [it]")


def no_batches(use: str) -> str:
    """The message about batches of which there are none, where something was to be done with them."""
    return f"batches is empty: there is nothing to {use}; a generator can be read only once"


def iterable_batches(batches: Any) -> None:
    """Raises ValueError if ``batches`` can't be iterated over, or is a single batch: a mapping gives its keys."""
    if isinstance(batches, (Mapping, str)) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise ValueError(
            f"batches must be a list or another iterable of batches, got {type(batches).__name__}; of a single batch, "
            "pass [batch]"
        )
