"""The CUDA C++ kernels of ``csrc/cuda``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from obc.backends import OPERATORS, gemm

LIBRARY = Path(__file__).resolve().parent.parent / "_lib" / "libobc_cuda.so"


def load() -> SimpleNamespace:
    """Load the library and return its operators; ImportError where torch has no CUDA or it was not built."""
    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")
    if not LIBRARY.exists():
        raise ImportError("the CUDA kernels were not built")
    torch.ops.load_library(LIBRARY)
    native = {name: getattr(torch.ops.obc_cuda, name).default for name in OPERATORS if name != "fold"}
    return SimpleNamespace(**native, fold=gemm.fold)
