"""The one table of tolerances of the operators, and the one comparison that uses it.

An operator's sum of n products p carries the rounding of each product and of n - 1 additions. Whatever the order of
the additions, each partial sum is at most sum|p|, and the roundings are independent in sign, so the error grows like
a random walk: about eps * sqrt(n) * sum|p|. The product, and in a square the product's square, add at most 2 eps.

    |actual - truth| <= ROUNDING[dtype] * (2 + sqrt(n)) * sum|p| + STORAGE[dtype] * |truth|

The truth is computed in float64 from the same, already rounded inputs. No tolerance was fitted to an error that some
backend showed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# By the inputs' dtype, the spacing of the numbers in which the sum is formed. Products of two bfloat16 or two float16
# numbers are exact in float32. For float64 the truth itself has such an error: twice the spacing.
ROUNDING = {
    torch.float32: torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float32).eps,
    torch.float64: 2 * torch.finfo(torch.float64).eps,
}

# By the dtype in which a result is stored (only fold stores in the inputs' dtype), half the spacing: one last rounding.
STORAGE = {dtype: torch.finfo(dtype).eps / 2 for dtype in ROUNDING}

# float16 results below the normal numbers are rounded to a fixed spacing instead.
SUBNORMAL = {dtype: torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in ROUNDING}


def allowed_error(truth: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype, stored: torch.dtype) -> Tensor:
    """The bound above for every element; ``magnitude`` is sum|p|, ``terms`` n."""
    summed = ROUNDING[dtype] * (2 + math.sqrt(terms)) * magnitude
    return summed + STORAGE[stored] * truth.abs() + SUBNORMAL[stored]


def assert_sum_close(
    actual: Tensor, truth: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype, stored: torch.dtype | None = None
) -> None:
    """``actual``, computed from inputs of ``dtype``, is the float64 ``truth`` up to rounding."""
    stored = stored or (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.dtype == stored, f"result is {actual.dtype}, expected {stored}"
    assert actual.shape == truth.shape, f"result has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth, magnitude = actual.detach().double().cpu(), truth.cpu(), magnitude.cpu()
    assert truth.isfinite().all(), "the truth itself is not finite: choose smaller inputs"
    error, allowed = (actual - truth).abs(), allowed_error(truth, magnitude, terms, dtype, stored)
    wrong = ~(error <= allowed)  # a NaN is wrong too
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off; the first, at {first}, is {actual[first]:.9g} "
            f"instead of {truth[first]:.9g}: error {error[first]:.3g}, allowed {allowed[first]:.3g}"
        )
