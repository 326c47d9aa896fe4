"""The vectorised C++ kernels of ``csrc/cpu``, and ``fold`` by the platform's GEMM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from obc.backends import OPERATORS, gemm

LIBRARY = Path(__file__).resolve().parent.parent / "_lib" / "libobc_cpu.so"


def load() -> SimpleNamespace:
    """Load the library and return its operators; ImportError where it was not built."""
    if not LIBRARY.exists():
        raise ImportError("the CPU kernels were not built (no C++ compiler was found when obc was installed)")
    torch.ops.load_library(LIBRARY)
    native = {name: getattr(torch.ops.obc_cpu, name).default for name in OPERATORS if name != "fold"}
    return SimpleNamespace(**native, fold=gemm.fold)
