"""The CUDA C++ kernels of ``csrc/cuda``, and ``fold`` by cuBLAS through torch.

``fold`` is a chain of matrix products. No kernel of ours was shown to beat cuBLAS at it, so there is none.

Strides are honoured. Only tensors whose axes can't be merged into four (permuted slices of six or more dimensions) are
first copied to contiguous memory. ``end_row`` reads nothing back: if groups descend or are out of range, it reports the
row as not finite and adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from obc.backends import gemm, native


def load() -> SimpleNamespace:
    """Load the library and return its operators; raises ImportError if torch has no CUDA or it was not built."""
    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")
    return operators(native.load("cuda", "the CUDA kernels were not built (no nvcc was found when obc was installed)"))


def operators(library: Any) -> SimpleNamespace:
    """The operators of the loaded library, with the signatures of :mod:`obc.ops`."""

    def weight_dot_list(
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        bias_grads: Sequence[Tensor | None],
        groups: Sequence[int],
        transposed: Sequence[bool],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One launch for up to 70 layers of one dtype."""
        outs, ins = list(weights), list(weights)
        columns = (weights, grads, biases, bias_grads, groups, transposed)
        for dtype in dict.fromkeys(weight.dtype for weight in weights):
            members = [i for i, weight in enumerate(weights) if weight.dtype == dtype]
            dots = library.weight_dot_list.default(*([column[i] for i in members] for column in columns))
            for i, out_dot, in_dot in zip(members, *dots, strict=True):
                outs[i], ins[i] = out_dot, in_dot
        return outs, ins

    own = {"weight_dot_list": weight_dot_list, "fold": gemm.fold}
    return SimpleNamespace(**native.callables("cuda", library) | own)
