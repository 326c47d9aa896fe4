"""Second-order criteria: w . Hw from differences of rows at scaled weights (FastOBA)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from obc.criteria.protocol import About, GroupScores, MeasuredCriterion
from obc.criteria.rows import read_rows
from obc.criteria.subject import Subject
from obc.criteria.units import relative


class FastOBA(MeasuredCriterion):
    """S_u = |mean over slices m and rows n of sum over i in W_m,u of w_i (H_n w)_i|, relative to the group's mean.

    The second-order term of FastOBA ("Optimal Brain Apoptosis"; code NEU-REAL/OBA). With every parameter of the model
    scaled by (1 + t), dr_u/dt at t = 0 is r_u + sum w_i (Hw)_i, so two more runs replace the double backward:

        sum w_i (Hw)_i = (r_u(1 + eps) - r_u(1 - eps)) / 2 eps - r_u(1)

    At kinks of activations (ReLU) the difference sees those that the step crosses; the double backward does not.

    Args:
        epsilon: the step. The error is the rounding of r divided by it, so about 1e-2 suits float32.
        relative: divide by the group's mean, as the code does.

    Raises:
        ValueError: ``epsilon`` is not positive.
    """

    name = "fastoba"
    reads_parameters = True
    about = About(
        "FastOBA (Optimal Brain Apoptosis)",
        "arXiv 2502.17941; code NEU-REAL/OBA",
        "|mean over slices and rows of sum w_i (Hw)_i|, / group mean",
        "labels",
        kinds="all that have rows",
        differs="its code leaves biases and norms out; here H acts on all parameters, and a slice has its bias",
        missing="OBA's series and parallel terms between layers",
    )

    def __init__(self, epsilon: float = 1e-2, relative: bool = True) -> None:
        if epsilon <= 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.epsilon, self.relative = epsilon, relative

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group, from three runs of rows: at the weights, and at (1 +- epsilon) times them."""
        subject = replace(subject, slices="all")
        rows_at = {0.0: _rows(subject)}
        for step in (self.epsilon, -self.epsilon):
            with _scaled(subject.model, 1 + step):
                rows_at[step] = _rows(subject)
        found: GroupScores = {}
        for group in subject.groups:
            parts = []
            for key, rows in rows_at[0.0][group.name].items():
                higher, lower = (rows_at[step][group.name][key] for step in (self.epsilon, -self.epsilon))
                parts.append(((higher - lower) / (2 * self.epsilon) - rows).mean(0))
            if parts:
                scores = torch.stack(parts).mean(0).abs()
                found[group.name] = relative(scores) if self.relative else scores  # type: ignore[assignment]
        return found


def _rows(subject: Subject) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Group -> slice -> (N, units) rows, float64 on the CPU."""
    rows = read_rows(subject).rows
    return {
        group.name: {key: values.double().cpu() for key, values in group.parts(rows).items()}  # type: ignore[misc]
        for group in subject.groups
    }


@contextlib.contextmanager
def _scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Inside the block the model's parameters are multiplied by ``factor``; afterwards their bits are restored."""
    parameters = {id(parameter): parameter for parameter in model.parameters() if parameter.is_floating_point()}
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(before[key])
