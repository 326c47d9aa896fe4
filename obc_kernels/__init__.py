"""Triton kernels of obc: one file per operator, each loaded at its first use.

Importing this package needs torch alone; :func:`require` says whether its kernels can run here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

_LAUNCHER = "_triton"


def require() -> None:
    """Raise ImportError with the reason if these kernels can't run: no Triton, or no GPU and no interpreter."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(f"triton can't be imported: {error}") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise ImportError("torch sees no GPU (set TRITON_INTERPRET=1 to interpret the kernels on CPU tensors)")


def __getattr__(name: str) -> Any:
    """The launcher ``<operator>_triton``, from the operator's file."""
    module = f"{__name__}.{name.removesuffix(_LAUNCHER)}"
    if not name.endswith(_LAUNCHER) or importlib.util.find_spec(module) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
