"""Formats numbers of bytes."""

from __future__ import annotations


def readable(size: int) -> str:
    """``1536`` as "1.5 KiB"."""
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
