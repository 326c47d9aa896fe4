"""``obc prune --allocation``: a name, a name with options, or strengths by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from obc.commands.common import UsageError, refusing
from obc.selection.allocation import Allocation
from obc.selection.allocations import ALLOCATIONS

METAVAR = "NAME | NAME:OPTION=VALUE,... | GROUP=STRENGTH,..."
HELP = (
    f"{', '.join(ALLOCATIONS)}, with options as in search:generations=4,compensated=true; or a strength by name of a "
    "group or block (default: the criterion's own)"
)
_TRUTHS = {"true": True, "false": False}


def allocation_of_text(text: str) -> str | Allocation | Mapping[str, float]:
    """The value of ``obc.prune(allocation=...)`` that an option's text says.

    >>> allocation_of_text("two_classes:gamma=2").gamma
    2.0

    Raises:
        UsageError: an unknown allocation or option, or a value that the option can't have.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return _strengths(text) if "=" in text else text
    if name not in ALLOCATIONS:
        raise UsageError(f"--allocation: {name!r} is none of {', '.join(ALLOCATIONS)}")
    known = inspect.signature(ALLOCATIONS[name]).parameters
    given = {}
    for part in rest.split(","):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if option not in known or not equals:
            options = ", ".join(f"{key}={_said(one.default)}" for key, one in known.items())
            raise UsageError(f"--allocation {name} has no option {part!r}; it has {options or 'none'}")
        given[option] = _value(f"{name}:{option}", value, known[option].default)
    with refusing(ValueError, start=f"--allocation {name}: "):
        return ALLOCATIONS[name](**given)


def _value(option: str, text: str, default: Any) -> Any:
    """The text as a value like the default; where that is None, a whole number."""
    try:
        if isinstance(default, bool):
            return _TRUTHS[text.lower()]
        if isinstance(default, tuple):
            return tuple(text.split("+"))
        return (int if default is None else type(default))(text)
    except (ValueError, KeyError):
        kind = "a whole number" if default is None or type(default) is int else f"one such as {_said(default)}"
        raise UsageError(f"--allocation {option} must be {kind}, got {text!r}") from None


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(value)
    return "all" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def _strengths(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UsageError(f"--allocation {part}: a strength must be a number, got {value!r}") from None
    return found
