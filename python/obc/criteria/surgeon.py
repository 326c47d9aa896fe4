"""Optimal Brain Surgeon on one consumer: P = (E[x x^T] + lambda I)^-1, errors of units, and their removal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obc.criteria.protocol import CriterionError
from obc.criteria.units import Consumer
from obc.statistics.results import Statistics


@dataclass
class ConsumerState:
    """One consumer during greedy removal: its weight's columns and the inverse of what is left.

    Attributes:
        consumer: the consumer before any removal.
        gram: (in, in) E[x x^T], undamped.
        columns: (in, entries) the weight as updated by the removals so far; zero for removed channels.
        inverse: (in, in) P; the identity for removed channels.
        product: (in, entries) gram @ columns, once requested; removals apply low-rank updates to it.
    """

    consumer: Consumer
    gram: Tensor
    columns: Tensor
    inverse: Tensor
    product: Tensor | None = None

    @classmethod
    def of(cls, consumer: Consumer, gram: Tensor, ridge: float) -> ConsumerState:
        """The state before any removal; ``ridge`` is relative to the mean diagonal of ``gram``."""
        return cls(consumer, gram, consumer.columns.clone(), inverse(gram, ridge, consumer.name))

    def errors(self, heads: str = "exact") -> Tensor:
        """(units,) e_u of every remaining unit."""
        channels = self.consumer.channels
        columns = self.columns[channels]  # (units, k, entries)
        if channels.shape[1] == 1:
            return columns[:, 0].square().sum(1) / self.inverse.diagonal()[channels[:, 0]]
        blocks = self.inverse[channels[:, :, None], channels[:, None, :]]
        if heads == "cholesky":
            diagonal = torch.linalg.cholesky(blocks).diagonal(dim1=1, dim2=2).square()
            return (columns.square().sum(2) / diagonal).sum(1)
        return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))

    def first_order(self) -> Tensor:
        """(units,) the sum over the unit's columns j of |(G W^T)_j . W_j|."""
        if self.product is None:
            self.product = self.gram @ self.columns
        return (self.product * self.columns).sum(1).abs()[self.consumer.channels].sum(1)

    def remove(self, units: Tensor) -> None:
        """Remove these units and let the others take over."""
        gone = self.consumer.channels[units].flatten()
        solved = torch.linalg.solve(self.inverse[gone[:, None], gone], self.inverse[gone])  # (P_dd)^-1 P_d:
        if self.product is not None:
            self.product -= (self.gram @ solved.mT) @ self.columns[gone]
        self.columns.addmm_(solved.mT, self.columns[gone], alpha=-1)
        self.columns[gone] = 0.0
        self.inverse.addmm_(self.inverse[:, gone], solved, alpha=-1)
        self.inverse[gone] = 0.0
        self.inverse[:, gone] = 0.0
        self.inverse[gone, gone] = 1.0


def second_moment(consumer: Consumer, statistics: Statistics, centred: bool = False, share: bool = True) -> Tensor:
    """(in, in) E[x x^T] of a consumer's input, on the CPU; zero between channels of different conv groups.

    For an expert with ``share``, it is multiplied by the share of the mixture's tokens routed to it.
    """
    found = statistics.gram[consumer.name]
    count = found.count
    if consumer.routed and share:
        mixture = consumer.name.rpartition("[")[0]
        count = sum(other.count for name, other in statistics.gram.items() if name.rpartition("[")[0] == mixture)
    gram = (found.centred() if centred else found.total).cpu() / count
    if consumer.groups > 1:
        group = torch.arange(len(gram), device="cpu") // (len(gram) // consumer.groups)
        gram = gram.masked_fill(group[:, None] != group, 0.0)
    return gram


def inverse(gram: Tensor, ridge: float, layer: str) -> Tensor:
    """(G + lambda I)^-1, lambda = ridge * mean diagonal.

    Raises:
        CriterionError: it is singular; the message names ``layer``, whose input it is of.
    """
    mean = gram.diagonal().mean()
    damping = ridge * (mean if bool(mean > 0) else torch.ones_like(mean))
    identity = torch.eye(len(gram), dtype=gram.dtype, device="cpu")
    factor, failed = torch.linalg.cholesky_ex(gram + damping * identity)
    if bool(failed):
        raise CriterionError(
            f"the Gram matrix of what {layer!r} reads ({len(gram)} channels) is singular with ridge={ridge:g}; pass "
            "more batches, or a criterion with a larger ridge="
        )
    return torch.cholesky_inverse(factor)
