"""Counts that a module holds, by path: an attribute's name, or ``"config.n_head"`` for one inside a config or dict."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any


def count_of(holder: Any, path: str) -> Any:
    """What an object holds under this path; None if it holds nothing there."""
    for key in path.split("."):
        holder = holder.get(key) if isinstance(holder, dict) else getattr(holder, key, None)
    return holder


def set_count(holder: Any, path: str, value: Any) -> None:
    """Set what an object holds under this path.

    A config or dict on the way is copied, because other modules may hold it too, whose widths stay as they are.
    """
    key, _, rest = path.partition(".")
    if rest:
        inner = copy.copy(count_of(holder, key))
        set_count(inner, rest, value)
        value = inner
    if isinstance(holder, dict):
        holder[key] = value
    elif rest or not dataclasses.is_dataclass(holder):
        setattr(holder, key, value)
    else:  # it may be frozen, and is this module's own
        object.__setattr__(holder, key, value)
