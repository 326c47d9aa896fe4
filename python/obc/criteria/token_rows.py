"""The Jacobian Criterion with rows of tokens: thousands of rows from a few dozen sequences.

Joint selection needs about as many rows as units to tell their interactions from noise, and with one row per sequence
that many sequences. A sequence's row is a sum over its positions; here each part of the sum is a separate row:

    r_u[n, t] = sum over consumers, positions p in chunk t of sequence n, and channels c of u of x_pc . dL/dx_pc

where L is the loss of the whole batch. The sum over t is the row of the sequence. Rows of neighbouring tokens are not
independent, so they count for less than their number.
"""

from __future__ import annotations

from torch import Tensor

from obc.criteria.protocol import About, MeasuredRows
from obc.criteria.residual_rows import read_residuals
from obc.criteria.residuals import Residuals
from obc.criteria.subject import Subject
from obc.criteria.units import consumers_of


class TokenJacobian(MeasuredRows):
    """S_u = sum over rows of r_u[n, t]^2; sets of units can be chosen by the rows (``selection="joint"``).

    Needs forward and backward once. Layers that read a group's channels must have a sample's tokens along the first
    dimension after the samples, as in transformers.

    Args:
        tokens: tokens per row.
    """

    name = "token_jacobian"
    about = About(
        "Optimal Brain Connection, rows of tokens",
        "obc",
        "sum over n and t of (sum over positions of chunk t of x_u . dL/dx_u)^2",
        "labels",
    )
    per_cost = True

    def __init__(self, tokens: int = 16) -> None:
        self.tokens = checked_tokens(tokens)

    def measure_rows(self, subject: Subject) -> dict[str, Tensor]:
        """(rows, units) of every group with a readable consumer."""
        taps = [
            Residuals(group.name, consumer)
            for group in subject.groups
            for consumer in consumers_of(group, subject.model)
        ]
        return read_residuals(subject, taps, self.tokens)


def checked_tokens(tokens: int | None) -> int | None:
    """``tokens``, if it is a valid number of tokens."""
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    return tokens
