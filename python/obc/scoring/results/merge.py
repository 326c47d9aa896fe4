"""Merges the scores of several processes with rows of their own: sums are added, rows gathered, coverage merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from obc.model.processes import gather_tensors, gathered, reduce_tensor
from obc.scoring.coverage import Coverage, merged


@dataclass(frozen=True)
class Facts:
    """The results of one process, or of all of them together.

    Attributes:
        num_rows: number of rows added.
        coverage: module name -> how it is read.
        left_out: the rows left out, each with its reason.
    """

    num_rows: int
    coverage: dict[str, Coverage]
    left_out: list[str]


def all_facts(facts: Facts, group: Any) -> Facts:
    """The facts of all processes, merged. A module counts as scored if any process scored it."""
    everyone = gathered(facts, group)
    coverage = merged([one.coverage for one in everyone])
    left_out = [f"process {rank}: {what}" for rank, one in enumerate(everyone) for what in one.left_out]
    return Facts(sum(one.num_rows for one in everyone), coverage, left_out)


def all_sums(sums: Tensor, group: Any) -> Tensor:
    """The sum of every process's sums of squares."""
    total = sums.clone()
    reduce_tensor(total, group)
    return total


def all_rows(matrices: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The rows of every process, one below another in the order of the processes: (rows, channels) each."""
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=matrices[0].device)
    counts[dist.get_rank(group)] = len(matrices[0])
    reduce_tensor(counts, group)
    return [_gathered(matrix, counts.tolist(), group) for matrix in matrices]


def _gathered(matrix: Tensor, counts: list[int], group: Any) -> Tensor:
    padded = matrix.new_zeros(max(counts), matrix.shape[1])
    padded[: len(matrix)] = matrix
    parts = gather_tensors(padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
