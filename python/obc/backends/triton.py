"""The Triton kernels of :mod:`obc_kernels`; ``fold`` uses one fused launch or two products, whichever fits."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from obc.backends import gemm
from obc.backends.operators import OPERATORS


def load() -> SimpleNamespace:
    """Return the launchers as operators; raises ImportError if Triton or a GPU is missing."""
    import obc_kernels

    obc_kernels.require()
    launchers = {name: getattr(obc_kernels, f"{name}_triton") for name in OPERATORS if name != "fold"}
    return SimpleNamespace(**launchers, fold=fold)


def fold(weight: Tensor, compressor: Tensor | None, decompressor: Tensor | None, groups: int, in_repeat: int) -> Tensor:
    """:func:`obc.ops.fold` in one launch if :func:`obc_kernels.fold.fold_fits`, else by two matrix products."""
    from obc_kernels.fold import fold_fits, fold_triton

    if fold_fits(weight, compressor, decompressor, groups, in_repeat):
        return fold_triton(weight, compressor, decompressor, groups, in_repeat)
    return gemm.fold(weight, compressor, decompressor, groups, in_repeat)
