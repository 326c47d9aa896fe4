"""Second moments: what they hold in memory, and the ridge that makes a Gram matrix solvable, raised step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obc.recovery.moments import RegressionMoments
from obc.recovery.normal_equations import RIDGE_STEP, RIDGE_STEPS, NormalEquations, SingularError

RIDGE = 1e-6


def equations(least_eigenvalue: float) -> NormalEquations:
    """One block of two columns, whose Gram matrix has diagonal 1; the error's products with them are the identity."""
    found = NormalEquations(1, 2, 2, torch.device("cpu"))
    found.gram += torch.tensor([[1.0, 1.0 - least_eigenvalue], [1.0 - least_eigenvalue, 1.0]])
    found.cross += torch.eye(2)
    found.rows, found.total = 7, 1.0
    return found


@pytest.mark.parametrize("step", range(RIDGE_STEPS + 1))
def test_the_first_ridge_that_suffices_is_taken(step: int) -> None:
    used = RIDGE * RIDGE_STEP**step
    sums = equations(-0.5 * used)
    (change,) = sums.solved([RIDGE], intercept=False)
    assert change.ridge == pytest.approx(used)
    torch.testing.assert_close(change.weight @ (sums.gram + used * torch.eye(2, dtype=torch.float64)), sums.cross)


def test_a_matrix_that_no_ridge_makes_solvable_is_an_error() -> None:
    with pytest.raises(SingularError, match="singular with a ridge of up to 1; it saw 7 positions for 2 columns"):
        equations(-2.0).solved([RIDGE], intercept=False)


@pytest.mark.parametrize("paired", [False, True])
def test_what_moments_hold_is_what_they_say(paired: bool) -> None:
    blocks, size, kept = 3, 7, 5
    moments = RegressionMoments(torch.arange(kept).expand(blocks, -1), size, paired)
    held = [
        tensor
        for name, tensor in vars(moments).items()
        if isinstance(tensor, Tensor) and name not in ("kept", "regressed")
    ]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == moments.bytes


@pytest.mark.parametrize("kept", [2, 28])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.7, 3e4])
@pytest.mark.parametrize("ridge", [1e-5, 1e-1])
def test_constant_inputs_leave_the_weight_and_fill_the_bias(kept: int, scale: float, ridge: float) -> None:
    """What centring leaves of them is rounding errors, which are no covariance; regressions of both kinds know it."""
    torch.manual_seed(0)
    rounding = 1e-14 * kept / ridge
    constants = scale * torch.rand(kept + 3, dtype=torch.float64)
    moments = RegressionMoments(torch.arange(kept)[None], kept + 3, paired=False)
    sums = NormalEquations(1, kept, 4, torch.device("cpu"))
    error = scale * torch.rand(4, dtype=torch.float64)
    for count in (7, 40, 1, 333):
        moments.add_inputs(constants.expand(count, -1))
        sums.add(constants[:kept].expand(1, count, -1), error.expand(1, count, -1))
    solution = moments.solve(ridge, intercept=True)
    selection = torch.eye(kept + 3, kept, dtype=torch.float64)
    torch.testing.assert_close(solution.decompressor, selection, rtol=0, atol=rounding)
    dropped = torch.where(torch.arange(kept + 3) < kept, 0.0, constants)
    torch.testing.assert_close(solution.intercept, dropped, rtol=rounding, atol=rounding * scale)
    (change,) = sums.changes([ridge], intercept=True)
    torch.testing.assert_close(change.weight, torch.zeros(1, 4, kept, dtype=torch.float64), rtol=0, atol=rounding)
    torch.testing.assert_close(change.bias, error[None], rtol=rounding, atol=rounding * scale)
