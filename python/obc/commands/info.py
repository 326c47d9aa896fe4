"""``obc info``: what is installed, what is missing, and how to get it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import obc


def add(commands: Any) -> None:
    """Add ``obc info`` to the subparsers."""
    info = commands.add_parser("info", help="print what is installed, what is missing, and how to get it")
    info.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    """Print :func:`obc.info`, a line per fact."""
    print("\n".join(lines(obc.info())))
    return 0


def lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """``key: value`` lines; nested values are indented under their key."""
    written = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            written += [f"{indent}{key}:", *lines(value, indent + "  ")]
        else:
            written.append(f"{indent}{key}: {_words(value)}")
    return written


def _words(value: Any) -> str:
    """The value without Python's spelling of None, bool and sequences."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
