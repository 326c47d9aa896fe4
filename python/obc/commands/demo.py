"""``obc demo``: small networks on digits, trained, pruned by four criteria, recovered, and optionally fine-tuned.

``obc demo --real``: a pretrained model from a Python package, pruned and compensated without training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from obc.commands.common import UsageError, folder, refusing, require
from obc.commands.run_log import add_log, say
from obc.files import made_folder

PACKAGES = {"sklearn": "scikit-learn", "torch_pruning": "torch-pruning", "matplotlib": "matplotlib"}


def add(commands: Any) -> None:
    """Add ``obc demo`` to the subparsers."""
    demo = commands.add_parser(
        "demo",
        help="train small networks on digits, prune them by four criteria, print what each kept",
        description="Train a residual CNN and a transformer on scikit-learn's digits, prune them by random, L1, Taylor "
        "and Jacobian criteria, and print held-out accuracy (raw, BN recalibrated, compensated), scoring time and peak "
        "memory. With --real, prune a pretrained model that a package carries instead, without training: the sentence "
        "encoder all-MiniLM-L6-v2 or SmolLM2-135M, in a few minutes. Needs no network.",
    )
    demo.add_argument(
        "--real",
        nargs="?",
        const="encoder",
        choices=("encoder", "smollm2"),
        help="prune this pretrained model instead (without a value: encoder)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of splits, weights and the random criterion (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("obc-demo"), help="folder of demo.png (default: obc-demo)")
    demo.add_argument(
        "--full", action="store_true", help="then fine-tune shortly, naively and by Equivalent Pruning: minutes more"
    )
    add_log(demo)
    demo.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    """Prune by every criterion, print and draw what each kept; ``--full`` also fine-tunes."""
    if parsed.real is not None:
        return run_real(parsed)
    require(PACKAGES)
    picture = folder(parsed.out) / "demo.png"
    import torch

    from obc.demo import finetune, report
    from obc.demo import run as comparison

    start = time.perf_counter()
    results = comparison.run(parsed.seed, say=say, processes=torch.get_num_threads())
    with made_folder(parsed.out):
        report.draw(results, picture)
    for part in (*map(report.table, results), report.protocol()):
        say(f"\n{part}")
    if parsed.full:
        say("")
        tuned = finetune.run(parsed.seed, say=say)
        for part in (*map(report.fine_tuning_table, tuned), report.fine_tuning_protocol()):
            say(f"\n{part}")
    say(f"\nDrawn in {picture}. Seed {parsed.seed}, {time.perf_counter() - start:.0f} s.")
    return 0


def run_real(parsed: argparse.Namespace) -> int:
    """Prune a pretrained model, print its figures and its answers, and draw them."""
    if parsed.full:
        raise UsageError("--full fine-tunes the networks on digits; --real trains nothing: pass one of them")
    require({"transformers": "transformers", "matplotlib": "matplotlib"})
    picture = folder(parsed.out) / f"demo-{parsed.real}.png"
    from obc.demo import real

    with refusing(ImportError):
        result = real.run(parsed.real, parsed.seed, say=say)
    with made_folder(parsed.out):
        real.draw(result, picture)
    say(f"\n{real.shown(result)}\n\nDrawn in {picture}. Seed {parsed.seed}, {result.seconds:.0f} s.")
    return 0
