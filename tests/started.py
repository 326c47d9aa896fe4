"""Starts processes of their own for tests: a server imports torch and obc once, and each process is its fork."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch

# Spawned, each process would take longer for its imports than most tests for their work.
IMPORTED = ["obc", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]


def context() -> ForkServerContext:
    """Where processes start that have run nothing yet."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


def processes(function: Callable[..., None], arguments: tuple[Any, ...], count: int = 1) -> None:
    """Run ``function(rank, *arguments)`` in ``count`` processes; the first error in one of them is raised."""
    context()
    torch.multiprocessing.start_processes(function, arguments, nprocs=count, start_method="forkserver")
