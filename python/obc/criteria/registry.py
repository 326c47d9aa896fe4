"""Criteria by name, and how ``obc.prune(criterion=...)`` interprets its argument."""

from __future__ import annotations

from typing import Any

from obc.criteria.protocol import Criterion, FromFunction
from obc.model.arguments import one_of

_REGISTERED: dict[str, Any] = {}


def register(name: str, criterion: Any) -> None:
    """Make ``criterion`` known as ``name`` in this process, also to the command line that imports the caller's module.

    Args:
        name: an unused name, or the name of the same criterion.
        criterion: an object with ``needs`` and ``score``, or a function (group, statistics, model) -> (units,).

    Raises:
        ValueError: the name is taken.
        TypeError: it is not a criterion.
    """
    if name in _REGISTERED and _REGISTERED[name] is not criterion:
        raise ValueError(f"a criterion {name!r} is registered already; choose another name")
    as_criterion(criterion)
    _REGISTERED[name] = criterion


def available() -> list[str]:
    """The names of all registered criteria."""
    return list(_REGISTERED)


def get(criterion: str | Any) -> Any:
    """The criterion for a name, an object or a function.

    Raises:
        ValueError: unknown name; the message lists the known names.
        TypeError: it is not a criterion.
    """
    if isinstance(criterion, str):
        one_of("criterion", criterion, _REGISTERED)
        criterion = _REGISTERED[criterion]
    return as_criterion(criterion)


def as_criterion(criterion: Any) -> Any:
    """An object with ``needs`` and ``score``; wraps functions.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(criterion, type):
        raise TypeError(f"criterion must be an object, got the class {criterion.__name__}: call it")
    if isinstance(criterion, Criterion) or (hasattr(criterion, "score") and hasattr(criterion, "needs")):
        return criterion
    if callable(criterion):
        return FromFunction(criterion)
    raise TypeError(
        "a criterion is a name, an object with needs and score(group, statistics, model), or such a function, got "
        f"{criterion!r}"
    )
