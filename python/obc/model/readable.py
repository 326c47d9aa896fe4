"""Formats for reading: bytes, numbers of parameters and operations, tables."""

from __future__ import annotations

from collections.abc import Sequence

_LARGE = 10_000  # from here on three digits and a letter say enough


def readable(size: float) -> str:
    """``1536`` bytes as "1.5 KiB"."""
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def count(number: float) -> str:
    """``94160448`` as "94.2 M", ``7264`` as "7264"."""
    if number < _LARGE:
        return f"{number:g}"
    digits, _, exponent = f"{number:.2e}".partition("e")
    power = min(int(exponent) // 3, 5)
    value = float(digits) * 10 ** (int(exponent) - 3 * power)
    return f"{value:.{max(0, 2 - int(exponent) % 3)}f} {'_kMGTP'[power]}"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with their cells in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
