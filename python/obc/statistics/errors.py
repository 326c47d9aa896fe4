"""What can go wrong while statistics are collected or read."""

from __future__ import annotations


class StatisticsError(ValueError):
    """A statistic can't be collected, was not collected, or its file is not one; the message says what to do."""
