"""The share of its consumers' outputs that is lost with a unit."""

from __future__ import annotations

from obc.criteria.energies import relative_errors
from obc.criteria.protocol import About, GroupScores, MeasuredCriterion, Subject


class Reconstruction(MeasuredCriterion):
    """S_u = sum over consumers m of E|W_m x_u|^2 / E|y_m|^2: the error of their outputs if u is zero.

    y_m is the consumer's output and x_u the part of its input that belongs to u. Needs no labels and no gradients.
    """

    name = "reconstruction"
    about = About("reconstruction error", "baseline", "sum over consumers of E|W x_u|^2 / E|y|^2", "forward")

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group: relative errors, from one pass over the batches."""
        return relative_errors(subject.model, subject.groups, subject.batches, subject.forward_fn)
