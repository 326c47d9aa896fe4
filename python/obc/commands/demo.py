"""``obc demo``: small networks on digits, trained, pruned by four criteria, recovered, and fine-tuned where asked."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from obc.commands.common import folder, require

PACKAGES = {"sklearn": "scikit-learn", "torch_pruning": "torch-pruning", "matplotlib": "matplotlib"}


def add(commands: Any) -> None:
    """Add ``obc demo`` to the subparsers."""
    demo = commands.add_parser(
        "demo",
        help="train small networks on digits, prune them by four criteria, print what each kept",
        description="Train a residual CNN and a transformer on scikit-learn's digits, prune them by random, L1, Taylor "
        "and Jacobian criteria, and print held-out accuracy (raw, BN recalibrated, compensated), scoring time and peak "
        "memory. Needs no network.",
    )
    demo.add_argument("--seed", type=int, default=0, help="of splits, weights and the random criterion (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("obc-demo"), help="folder of demo.png (default: obc-demo)")
    demo.add_argument(
        "--full", action="store_true", help="then fine-tune shortly, naively and by Equivalent Pruning: minutes more"
    )
    demo.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    """Prune by every criterion, print and draw what each kept; with ``--full`` fine-tune as well."""
    require(PACKAGES)
    picture = folder(parsed.out) / "demo.png"
    from obc.demo import finetune, report
    from obc.demo import run as comparison

    def say(line: str) -> None:
        print(line, flush=True)

    start = time.perf_counter()
    results = comparison.run(parsed.seed, say=say)
    report.draw(results, picture)
    for part in (*map(report.table, results), report.protocol()):
        print(f"\n{part}", flush=True)
    if parsed.full:
        print()
        tuned = finetune.run(parsed.seed, say=say)
        for part in (*map(report.fine_tuning_table, tuned), report.fine_tuning_protocol()):
            print(f"\n{part}")
    print(f"\nDrawn in {picture}. Seed {parsed.seed}, {time.perf_counter() - start:.0f} s.")
    return 0
