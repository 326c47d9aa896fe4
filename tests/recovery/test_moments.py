"""Second moments: what they hold in memory, and the ridge that makes a Gram matrix solvable, raised step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obc.recovery.moments import _RIDGE_STEP, _RIDGE_STEPS, Moments, SingularError, _regress

RIDGE = 1e-6


def gram(least_eigenvalue: float) -> Tensor:
    """One block of two channels with diagonal 1."""
    return torch.tensor([[[1.0, 1.0 - least_eigenvalue], [1.0 - least_eigenvalue, 1.0]]], dtype=torch.float64)


@pytest.mark.parametrize("step", range(_RIDGE_STEPS + 1))
def test_the_first_ridge_that_suffices_is_taken(step: int) -> None:
    used = RIDGE * _RIDGE_STEP**step
    target, matrix = torch.eye(2, dtype=torch.float64)[None], gram(-0.5 * used)
    solution, relative, damping = _regress(target, matrix, RIDGE)
    assert relative == pytest.approx(used)
    assert float(damping) == pytest.approx(used)
    torch.testing.assert_close(solution @ (matrix + used * torch.eye(2, dtype=torch.float64)), target)


def test_a_matrix_that_no_ridge_makes_solvable_is_an_error() -> None:
    with pytest.raises(SingularError, match="singular with a ridge of up to 1"):
        _regress(torch.eye(2, dtype=torch.float64)[None], gram(-2.0), RIDGE)


@pytest.mark.parametrize("paired", [False, True])
def test_what_moments_hold_is_what_they_say(paired: bool) -> None:
    blocks, size, kept = 3, 7, 5
    moments = Moments(torch.zeros(blocks, kept, dtype=torch.int64), size, paired)
    held = [tensor for name, tensor in vars(moments).items() if isinstance(tensor, Tensor) and name != "kept"]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == Moments.bytes_for(
        blocks, size, kept, paired
    )
