"""fold: the folded weight of Equivalent Pruning, both factors in one launch.

    W'[k, j, s] = sum over o, i of C[k, o] * W[o, i, s] * D[i, j]

Shapes: weight (O, I, S), compressor (K, O), decompressor (I, J), folded (K, J, S); any strides of the inputs, S the
kernel positions or the repeats of a Linear after flatten.
FLOPs: 2 S K I (O + J). Bytes: inputs and folded once, the weight once more per further block of K (from cache).
Accumulation: float32. Products of float32, which the intermediate C W always is, are exact where
``torch.get_float32_matmul_precision()`` is "highest" (for half-precision inputs by three tf32 products, whose error is
that of float32), else tf32. The product of C and W runs in the tensor cores of the inputs' own dtype.

The intermediate never leaves the chip: a program holds ``BLOCK_K`` rows of it, ``BLOCK_I`` columns at a time, and
all J columns of the result. :func:`fold_fits` says where that holds and pays; elsewhere two matrix products do better.

Two things are left to matrix products, by these counts (4 TB/s, 6 TFLOP/s of bfloat16 a multiprocessor, 3 us a launch):

- The backward. With C W kept it is four products, 2 S K I (O + J) FLOPs for the factors and as many for the weight. One
  launch can't keep its sums on chip: dC adds over I and dD over K, so a program that owns rows of K has all of dD as a
  partial sum. For a 512 x 512 weight, K = J = 256, blocks of 32 rows: 8 programs, 0.4 GFLOP on 8 of 132
  multiprocessors (8 us), and 8 MiB of partial sums written and read (2 us). Four products move 3 MiB of intermediates
  (0.7 us) over the whole chip in four launches (12 us): nothing is gained, and at larger sizes the chip is lost.
- Several layers at once. Where a fold is no matter of launches, batching can't help: a 4096 x 11008 weight at half the
  channels is 0.4 TFLOP, half a millisecond beside one launch. Where it is (18 layers 64 x 64 x 3 x 3 of ResNet-56,
  3.5 MFLOP each) a batch saves 17 launches, 50 us, but its operands must lie together: 18 weights and their factors
  copied at every step (2.8 MiB read and written, a launch for each of three lists), and the layers, which are folded
  one by one as the forward reaches them, folded before it. A CUDA graph of the step saves the same launches, and all
  others, without either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels import autotune
from obc_kernels.case import Case, empty
from obc_kernels.launch import launch
from obc_kernels.layout import ceil_div, power_of_two

# A result row of 256 float32 takes 64 registers per thread of 256: as many as fit in addition to the operands.
MOST_KEPT_IN = 256
# The kernel saves launches of small products; larger ones go to the platform's library.
MOST_WEIGHTS = 2**20


@triton.jit
def _fold_kernel(
    folded_ptr,
    w_ptr,
    c_ptr,
    d_ptr,
    out_channels,
    in_channels,
    positions,
    kept_out,
    kept_in,
    stride_fk,
    stride_fj,
    stride_fs,
    stride_wo,
    stride_wi,
    stride_ws,
    stride_ck,
    stride_co,
    stride_di,
    stride_dj,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    pid = tl.program_id(0)
    s = (pid % positions).to(tl.int64)
    k = (pid // positions).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    j = tl.arange(0, BLOCK_J).to(tl.int64)  # [BLOCK_J]
    folded = tl.zeros((BLOCK_K, BLOCK_J), dtype=tl.float32)
    for first_i in range(0, in_channels, BLOCK_I):
        i = first_i + tl.arange(0, BLOCK_I).to(tl.int64)  # [BLOCK_I]
        compressed = tl.zeros((BLOCK_K, BLOCK_I), dtype=tl.float32)
        for first_o in range(0, out_channels, BLOCK_O):
            o = first_o + tl.arange(0, BLOCK_O).to(tl.int64)  # [BLOCK_O]
            c_mask = (k < kept_out)[:, None] & (o < out_channels)[None, :]
            w_mask = (o < out_channels)[:, None] & (i < in_channels)[None, :]
            c = tl.load(c_ptr + (k[:, None] * stride_ck + o[None, :] * stride_co), mask=c_mask, other=0.0)
            w = tl.load(
                w_ptr + s * stride_ws + (o[:, None] * stride_wo + i[None, :] * stride_wi), mask=w_mask, other=0.0
            )
            compressed = tl.dot(c, w, compressed, input_precision=PRECISION)
        d_mask = (i < in_channels)[:, None] & (j < kept_in)[None, :]
        d = tl.load(d_ptr + (i[:, None] * stride_di + j[None, :] * stride_dj), mask=d_mask, other=0.0)
        folded = tl.dot(compressed, d.to(tl.float32), folded, input_precision=PRECISION)
    out = folded_ptr + k[:, None] * stride_fk + j[None, :] * stride_fj + s * stride_fs
    tl.store(out, folded.to(folded_ptr.dtype.element_ty), mask=(k < kept_out)[:, None] & (j < kept_in)[None, :])


@dataclass(frozen=True)
class FoldConfig:
    """Launch parameters of one shape."""

    block_k: int
    block_o: int
    block_i: int
    block_j: int
    num_warps: int
    num_stages: int = 2

    @classmethod
    def from_heuristic(cls, kept_in: int, exact: bool) -> FoldConfig:
        """``exact``: float32 on the plain units, which hold both operands in registers and take smaller blocks."""
        # 16 is the least side of a tensor core's operand.
        block_j = max(16, power_of_two(kept_in, MOST_KEPT_IN))
        if exact:
            return cls(block_k=16, block_o=32, block_i=32, block_j=block_j, num_warps=8 if block_j > 64 else 4)
        # Beside a wide result, 64 columns of the intermediate in three tf32 parts would spill.
        return cls(
            block_k=32,
            block_o=64,
            block_i=64 if block_j <= 64 else 32,
            block_j=block_j,
            num_warps=8 if block_j > 128 else 4,
        )

    @classmethod
    def variations(cls, kept_in: int, exact: bool) -> dict[str, FoldConfig]:
        """The heuristic, half its rows a program (more programs), other warps, and another stage in flight."""
        base = cls.from_heuristic(kept_in, exact)
        return {
            autotune.HEURISTIC: base,
            "half rows": replace(base, block_k=max(16, base.block_k // 2)),
            "other warps": replace(base, num_warps=12 - base.num_warps),
            "one more stage": replace(base, num_stages=base.num_stages + 1),
        }


def _as_matrices(weight: Tensor, in_repeat: int) -> Tensor | None:
    """(O, I, S) as a view; None where the kernel positions don't form one axis in memory."""
    if in_repeat > 1:
        return weight.unflatten(1, (-1, in_repeat))
    try:
        return weight.view(*weight.shape[:2], -1)
    except RuntimeError:
        return None


def fold_fits(
    weight: Tensor, compressor: Tensor | None, decompressor: Tensor | None, groups: int, in_repeat: int
) -> bool:
    """Whether one launch serves this fold, and is expected to beat two matrix products.

    It needs both factors as plain matrices of a float32 or half-precision weight without groups, few kept in
    channels, in channels adjacent in memory (Linear, 1 x 1, channels-last: a warp reads them at once), and that
    multiplying by C first is the cheaper order.
    """
    if compressor is None or decompressor is None or groups != 1 or weight.dtype == torch.float64:
        return False
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        return False  # Triton's interpreter multiplies bfloat16 matrices as the integers that hold their bits
    if compressor.dim() != 2 or decompressor.dim() != 2 or not 0 < weight.numel() <= MOST_WEIGHTS:
        return False
    matrices = _as_matrices(weight, in_repeat)
    if matrices is None or matrices.stride(1) != 1:
        return False
    (out_channels, in_channels, _), kept_out, kept_in = matrices.shape, compressor.shape[0], decompressor.shape[1]
    compress_first = kept_out * in_channels * (out_channels + kept_in)
    decompress_first = out_channels * kept_in * (in_channels + kept_out)
    return kept_out > 0 and 0 < kept_in <= MOST_KEPT_IN and compress_first <= decompress_first


def fold_triton(
    weight: Tensor,
    compressor: Tensor | None,
    decompressor: Tensor | None,
    groups: int = 1,
    in_repeat: int = 1,
    config: FoldConfig | None = None,
) -> Tensor:
    """Launch :func:`obc.ops.fold` for checked arguments that :func:`fold_fits` accepts."""
    matrices = _as_matrices(weight, in_repeat)
    if matrices is None or compressor is None or decompressor is None or groups != 1:
        raise ValueError(
            f"obc::fold: one launch takes both factors, no groups and kernel positions on one axis in memory, "
            f"got groups={groups} and a weight {tuple(weight.shape)} of strides {weight.stride()}; "
            "fold it by matrix products"
        )
    out_channels, in_channels, positions = matrices.shape
    kept_out, kept_in = compressor.shape[0], decompressor.shape[1]
    folded = weight.new_empty((kept_out, kept_in, positions))
    highest = torch.get_float32_matmul_precision() == "highest"
    exact = highest and weight.dtype == torch.float32
    config = config or autotune.choose(
        "fold",
        FoldConfig,
        (kept_in, exact),
        (*autotune.size_class(*matrices.shape, kept_out, kept_in), exact, highest),
        weight,
        lambda config: fold_triton(weight, compressor, decompressor, groups, in_repeat, config),
    )
    launch(
        _fold_kernel,
        ceil_div(kept_out, config.block_k) * positions,
        folded,
        matrices,
        compressor,
        decompressor,
        out_channels,
        in_channels,
        positions,
        kept_out,
        kept_in,
        *folded.stride(),
        *matrices.stride(),
        *compressor.stride(),
        *decompressor.stride(),
        PRECISION="tf32" if not highest else "ieee" if exact else "tf32x3",
        BLOCK_K=config.block_k,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        BLOCK_J=config.block_j,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=255,
    )
    return folded.view(kept_out, kept_in * in_repeat, *weight.shape[2:])


def _case(precision: str, kept_in: int) -> Callable[[torch.dtype], Tensor]:
    def run(dtype: torch.dtype) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return fold_triton(empty(dtype, 512, 512), empty(dtype, 256, 512), empty(dtype, 512, kept_in))
        finally:
            torch.set_float32_matmul_precision(before)

    return run


CASES = tuple(
    Case("fold", f"{precision}, {kept_in} kept in", _case(precision, kept_in), dtypes=("f32", "bf16", "f16"))
    for precision in ("highest", "high")
    for kept_in in (64, 128, 256)
)
