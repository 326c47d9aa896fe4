"""Second moments: what they hold in memory, and the ridge that makes a Gram matrix solvable, raised step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obc.recovery.moments import _RIDGE_STEP, _RIDGE_STEPS, Moments, SingularError, _regress
from obc.recovery.normal_equations import NormalEquations

RIDGE = 1e-6


def gram(least_eigenvalue: float) -> Tensor:
    """One block of two channels with diagonal 1."""
    return torch.tensor([[[1.0, 1.0 - least_eigenvalue], [1.0 - least_eigenvalue, 1.0]]], dtype=torch.float64)


@pytest.mark.parametrize("step", range(_RIDGE_STEPS + 1))
def test_the_first_ridge_that_suffices_is_taken(step: int) -> None:
    used = RIDGE * _RIDGE_STEP**step
    target, matrix = torch.eye(2, dtype=torch.float64)[None], gram(-0.5 * used)
    solution, relative, damping = _regress(target, matrix, torch.ones(1, 1, dtype=torch.float64), RIDGE)
    assert relative == pytest.approx(used)
    assert float(damping) == pytest.approx(used)
    torch.testing.assert_close(solution @ (matrix + used * torch.eye(2, dtype=torch.float64)), target)


def test_a_matrix_that_no_ridge_makes_solvable_is_an_error() -> None:
    with pytest.raises(SingularError, match="singular with a ridge of up to 1"):
        _regress(torch.eye(2, dtype=torch.float64)[None], gram(-2.0), torch.ones(1, 1, dtype=torch.float64), RIDGE)


@pytest.mark.parametrize("paired", [False, True])
def test_what_moments_hold_is_what_they_say(paired: bool) -> None:
    blocks, size, kept = 3, 7, 5
    moments = Moments(torch.zeros(blocks, kept, dtype=torch.int64), size, paired)
    held = [tensor for name, tensor in vars(moments).items() if isinstance(tensor, Tensor) and name != "kept"]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == Moments.bytes_for(
        blocks, size, kept, paired
    )


@pytest.mark.parametrize("kept", [2, 28])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.7, 3e4])
@pytest.mark.parametrize("ridge", [1e-5, 1e-1])
def test_constant_inputs_leave_the_weight_and_fill_the_bias(kept: int, scale: float, ridge: float) -> None:
    """What centring leaves of them is rounding errors, which are no covariance; regressions of both kinds know it."""
    torch.manual_seed(0)
    rounding = 1e-14 * kept / ridge
    constants = scale * torch.rand(kept + 3, dtype=torch.float64)
    moments = Moments(torch.arange(kept)[None], kept + 3, paired=False)
    equations = NormalEquations(1, kept, 4, torch.device("cpu"))
    error = scale * torch.rand(4, dtype=torch.float64)
    for count in (7, 40, 1, 333):
        moments.add(constants.expand(count, -1))
        equations.add(constants[:kept].expand(1, count, -1), error.expand(1, count, -1))
    solution = moments.solve(ridge, intercept=True)
    selection = torch.eye(kept + 3, kept, dtype=torch.float64)
    torch.testing.assert_close(solution.decompressor, selection, rtol=0, atol=rounding)
    dropped = torch.where(torch.arange(kept + 3) < kept, 0.0, constants)
    torch.testing.assert_close(solution.intercept, dropped, rtol=rounding, atol=rounding * scale)
    (change,) = equations.changes([ridge], intercept=True)
    torch.testing.assert_close(change.weight, torch.zeros(1, 4, kept, dtype=torch.float64), rtol=0, atol=rounding)
    torch.testing.assert_close(change.bias, error[None], rtol=rounding, atol=rounding * scale)
