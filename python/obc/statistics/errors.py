"""Errors raised while statistics are collected or read."""

from __future__ import annotations


class StatisticsError(ValueError):
    """A statistic can't be collected, was not collected, or its file is invalid; the message says what to do."""


class NothingToReadError(StatisticsError):
    """The model has no part that a statistic reads, such as residual blocks.

    Attributes:
        statistic: its name.
        reason: which part is missing; the message may also say what to do.
    """

    def __init__(self, statistic: str, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}: {remedy}" if remedy else reason)
        self.statistic, self.reason = statistic, reason


class TooLargeError(StatisticsError):
    """The sums of a statistic are more than a device can hold."""
