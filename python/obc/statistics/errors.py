"""Errors raised while statistics are collected or read."""

from __future__ import annotations


class StatisticsError(ValueError):
    """A statistic can't be collected, was not collected, or its file is invalid; the message says what to do."""
