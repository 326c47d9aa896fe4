"""Matrix products for :mod:`obc.backends.gemm`: half precision summed in float32, and the faster of two libraries.

On the CPU torch multiplies float32 matrices by MKL, which uses 512-bit registers on Intel's processors alone. oneDNN,
whose operator torch's compiler calls for linear layers, uses them on any. It adds in another order, the same one on any
number of threads.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obc.reference import accumulation_dtype

# Of fewer multiplications, torch.mm takes less time than the call of oneDNN's operator.
LEAST_MULTIPLICATIONS = 2**20
# The same of matrices with a short side, for which oneDNN would copy one operand into its own order for few uses.
LEAST_SIDE = 16
# oneDNN splits longer sums among the threads, so that their bits depend on how many there are: those of 2^14 terms not
# yet. That of torch 2.11 does so from some hundred terms on, and its operator is torch's own affair: only versions for
# which tests/ops/test_matrix_products.py has passed are here.
MOST_TERMS = 2**13
TORCH = ("2.13",)


@lru_cache(maxsize=1)
def _onednn() -> Any:
    """oneDNN's x @ w.T where it beats torch.mm, on AMD processors with AVX-512; else None."""
    if not splits_alike() or not sys.platform.startswith("linux") or not torch.backends.mkldnn.is_available():
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        return None
    return torch.ops.mkldnn._linear_pointwise.default


def splits_alike() -> bool:
    """Whether oneDNN's sums of up to MOST_TERMS terms have the same bits on any number of threads."""
    return ".".join(torch.__version__.split(".")[:2]) in TORCH


def _by_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies these matrices; its operator has no derivative and no rule for traced tensors."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return False
    if any(type(x) not in (Tensor, nn.Parameter) or x.dtype != torch.float32 for x in (left, right)):
        return False
    (rows, terms), columns = left.shape, right.shape[1]
    if terms > MOST_TERMS or min(rows, terms, columns) < LEAST_SIDE:
        return False
    return left.device.type == "cpu" and rows * terms * columns >= LEAST_MULTIPLICATIONS and _onednn() is not None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices of one dtype."""
    return _onednn()(left, right.mT, None, "none", [], "") if _by_onednn(left, right) else torch.mm(left, right)


def _wide(tensor: Tensor) -> Tensor:
    dtype = accumulation_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of (blocks, rows, columns), accumulated and returned in at least float32."""
    if left.is_cuda and torch.bfloat16 in (left.dtype, right.dtype):
        return _bfloat16_product(left, right)
    if left.is_cuda and left.dtype == right.dtype == torch.float16:
        return torch.bmm(left, right, out_dtype=torch.float32)
    left, right = _wide(left), _wide(right)
    return _product(left[0], right[0])[None] if left.shape[0] == 1 else torch.bmm(left, right)


def _bfloat16_product(left: Tensor, right: Tensor) -> Tensor:
    """A product with a bfloat16 operand in the tensor cores; a float32 one is the sum of three bfloat16 parts."""
    if left.dtype == right.dtype:
        return torch.bmm(left, right, out_dtype=torch.float32)
    wide, product = (left, lambda part: torch.bmm(part, right, out_dtype=torch.float32))
    if right.dtype == torch.float32:
        wide, product = (right, lambda part: torch.bmm(left, part, out_dtype=torch.float32))
    high = wide.bfloat16()
    rest = wide - high
    middle = rest.bfloat16()
    return product((rest - middle).bfloat16()) + product(middle) + product(high)


def mm_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target = left @ right, into a slice of a larger tensor; without a copy where dtypes and library allow it."""
    if left.dtype != target.dtype or right.dtype != target.dtype:
        target.copy_(mm(left, right))
    elif target.shape[0] > 1:
        target.baddbmm_(left, right, beta=0)
    elif _by_onednn(left[0], right[0]):
        target[0].copy_(_product(left[0], right[0]))
    else:
        target[0].addmm_(left[0], right[0], beta=0)


def mm_added(summand: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """summand + left @ right, accumulated and returned in at least float32."""
    if not summand.dtype == left.dtype == right.dtype == accumulation_dtype(left.dtype):
        return mm(left, right).add_(summand)
    if left.shape[0] > 1:
        return torch.baddbmm(summand, left, right)
    if _by_onednn(left[0], right[0]):
        return mm(left, right).add_(summand)
    return torch.addmm(summand[0], left[0], right[0])[None]
