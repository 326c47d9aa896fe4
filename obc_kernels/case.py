"""Cases to compile ahead of time: a kernel's file lists, in ``CASES``, arguments that lead to different kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Arguments for one launcher that lead to specialisations of their own.

    Attributes:
        operator: the operator's name.
        name: the special feature.
        run: launches on tensors of a dtype, which :func:`empty` makes.
        aligned: its inputs are adjacent in memory, of sizes divisible by 16: some load must be of 16 bytes.
        dtypes: names among ``DTYPES``.
    """

    operator: str
    name: str
    run: Callable[[torch.dtype], Any]
    aligned: bool = True
    dtypes: tuple[str, ...] = tuple(DTYPES)


def empty(dtype: torch.dtype, *shape: int, step: int = 1) -> Tensor:
    """A tensor without memory; with ``step``, every such element of the last dimension."""
    return torch.empty(*shape[:-1], shape[-1] * step, dtype=dtype, device="meta")[..., ::step]
