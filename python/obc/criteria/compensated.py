"""The Jacobian Criterion of the loss after compensation: whatever the others can reproduce is cheap.

For a consumer with input x (centred if it has a bias or a BatchNorm alone reads its output), H = E[x x^T] + lambda I,
P = H^-1, unit u a set of its channels, and y = dL_n/dx at the same positions:

    e_u = (P_uu)^-1 (P x)_u             x_u minus its best linear prediction from all other channels
    r_u[n] = sum over positions and c in u of e_c . dL_n/dx_c,          S_u = sum over n of r_u[n]^2
"""

from __future__ import annotations

from torch import Tensor

from obc.criteria.protocol import About, MeasuredRows
from obc.criteria.residual_rows import read_residuals
from obc.criteria.residuals import Residuals, free_of_means
from obc.criteria.scoring import collected
from obc.criteria.subject import Subject
from obc.criteria.token_rows import checked_tokens
from obc.criteria.units import consumers_of, have_consumers
from obc.statistics.gram import Gram, Held


class CompensatedJacobian(MeasuredRows):
    """S_u = sum over rows of r_u[n]^2, with r from the residuals e_u, which the other channels can't reproduce.

    Needs two runs: forward passes for H, then forward and backward. Sets of units can be chosen by the rows
    (``selection="joint"``). Meant for use with ``compensate="ls"``, step by step.

    Args:
        ridge: lambda, relative to the mean diagonal of E[x x^T].
        tokens: make a row of this many consecutive tokens of a sample; None: rows are batches or samples.
        to: where the Gram matrices are held (:class:`obc.statistics.Gram`).
    """

    name = "compensated_jacobian"
    about = About(
        "Optimal Brain Connection, compensated",
        "obc",
        "sum over n of (sum over positions of e_u . dL_n/dx_u)^2, e_u = (P_uu)^-1 (P x)_u",
        "labels",
    )
    update = "ls"

    def __init__(self, ridge: float = 1e-2, tokens: int | None = None, to: Held = "device") -> None:
        self.ridge, self.tokens, self.to = ridge, checked_tokens(tokens), to

    def measure_rows(self, subject: Subject) -> dict[str, Tensor]:
        """(N, units) rows of every group with a readable consumer."""
        if not have_consumers(subject.groups, subject.model):
            return {}
        statistics = collected([Gram(to=self.to)], (), subject)
        free = free_of_means(subject)
        taps = [
            Residuals.of(group.name, consumer, statistics, self.ridge, consumer.name in free)
            for group in subject.groups
            for consumer in consumers_of(group, subject.model)
            if consumer.name in statistics.gram
        ]
        return read_residuals(subject, taps, self.tokens)
