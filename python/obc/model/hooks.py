"""Hooks that stay for a block of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks of these handles when the block ends, also after an exception."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
