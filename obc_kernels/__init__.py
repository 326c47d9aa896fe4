"""Triton kernels of obc: one file per operator, each loaded at its first use.

Importing this package needs torch alone; :func:`require` says whether its kernels can run here.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

_LAUNCHERS = {
    "channel_dot_triton": "obc_kernels.channel_dot",
    "channel_moments_triton": "obc_kernels.channel_moments",
    "weight_dot_triton": "obc_kernels.weight_dot",
    "weight_dot_list_triton": "obc_kernels.weight_dot_list",
    "weight_moments_triton": "obc_kernels.weight_moments",
    "fold_triton": "obc_kernels.fold",
    "end_row_triton": "obc_kernels.end_row",
}

__all__ = ["require", *_LAUNCHERS]


def require() -> None:
    """Raise ImportError with the reason where these kernels can't run: no Triton, or no GPU and no interpreter."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(f"triton can't be imported: {error}") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise ImportError("torch sees no GPU (set TRITON_INTERPRET=1 to interpret the kernels on CPU tensors)")


def __getattr__(name: str) -> Any:
    if name not in _LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAUNCHERS[name]), name)
