"""The options of ``obc prune`` that say how much must remain."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from obc.commands import model_directory
from obc.commands.allocation_option import allocation_of_text
from obc.commands.common import UsageError, expecting, positive, refusing
from obc.model.latency_table import LatencyTable, LatencyTableError
from obc.pruning.budgets import COUNTED, Argument, Budget, Meters
from obc.structures.memory import MemoryUse

# The file to which obc prune writes a latency table that it measured, and from which it reads one.
TABLE_FILE = "latency_table.json"


def add(prune: argparse.ArgumentParser) -> None:
    """Add the options: budgets, of which one can be given, and how memory and latency are counted."""
    share = prune.add_mutually_exclusive_group()
    share.add_argument("--macs", type=_share, help="share of the MACs that remains (default: 0.5)")
    share.add_argument("--params", type=_share, help="instead: share of the parameters that remains")
    share.add_argument("--blocks", type=_share, help="instead: share that remains of the parameters that can be pruned")
    share.add_argument(
        "--active-params", type=_share, help="instead: share that remains of the parameters used by one token"
    )
    share.add_argument(
        "--memory", type=_amount, help="instead: share of the bytes of weights and cache; above 1: a number of bytes"
    )
    share.add_argument(
        "--latency", type=_share, help="instead: share of the seconds of a forward pass, from a latency table"
    )
    share.add_argument("--ratio", type=_share, help="share of the MACs to remove: --ratio 0.3 is --macs 0.7")
    prune.add_argument(
        "--latency-table",
        type=Path,
        metavar="FILE",
        help=f"a saved table (default: measure one, and write it as {TABLE_FILE})",
    )
    prune.add_argument(
        "--cache-length", type=positive, help="for --memory: tokens in the cache (default: count weights only)"
    )
    prune.add_argument("--cache-batch", type=positive, help="for --memory: sequences in the cache (default: 1)")
    prune.add_argument(
        "--memory-dtype", choices=tuple(model_directory.DTYPES), help="for --memory: dtype (default: the model's)"
    )
    prune.add_argument("--measure", action="store_true", help="time a forward pass before and after")
    prune.add_argument("--kinds", nargs="+", metavar="KIND", help="ffn, heads, layers ...: see obc.transformer_groups")


def budget_of(parsed: argparse.Namespace) -> Budget:
    """The budget that the options give."""
    dtype = None if parsed.memory_dtype is None else model_directory.DTYPES[parsed.memory_dtype]
    if parsed.cache_batch is not None and parsed.cache_length is None:
        raise UsageError("--cache-batch needs --cache-length: without it only weights are counted")
    use = MemoryUse(parsed.cache_length or 0, parsed.cache_batch or 1, dtype)
    with refusing(OSError, LatencyTableError, start="--latency-table: "):
        table = None if parsed.latency_table is None else LatencyTable.load(parsed.latency_table)
    given: dict[Argument, float | None] = {name: getattr(parsed, name) for name in COUNTED}
    if parsed.ratio is not None:
        given["macs"] = 1 - parsed.ratio
    return Budget.of(given, Meters(use, table))


def keywords(parsed: argparse.Namespace, budget: Budget, *names: str) -> dict[str, Any]:
    """The options as keyword arguments of ``obc.prune``: the budget, what is always there, those of ``names`` given."""
    meters, found = budget.meters, {name: getattr(parsed, name) for name in ("round_to", "seed", "measure")}
    found[budget.argument] = budget.share if budget.amount is None else budget.amount
    found |= {"memory_use": meters.memory_use, "latency_table": meters.table}
    for name in ("max_pruning_ratio", "protected_blocks", *names):
        if (value := getattr(parsed, name)) is not None:
            found[name] = value
    if parsed.compensate is not None:
        found["compensate"] = None if parsed.compensate == "none" else parsed.compensate
    if parsed.allocation is not None:
        found["allocation"] = allocation_of_text(parsed.allocation)
    return found


def _between(text: str) -> float:
    """A number strictly between 0 and 1."""
    if not 0 < (value := float(text)) < 1:
        raise ValueError
    return value


_SHARE = "a share above 0 and below 1, such as 0.7"
_share = expecting(_SHARE)(_between)


@expecting(f"{_SHARE}, or a number of bytes above 1")
def _amount(text: str) -> float:
    """A share, or a number of bytes."""
    value = float(text)
    return value if 1 < value < math.inf else _between(text)
