"""``obc.info()``: what is installed, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from obc import backends
from obc.backends import native_gates
from obc.distribution import DISTRIBUTION, NATIVE_REMEDY, obc_version

ENVIRONMENT = {
    "OBC_BACKEND": "the backend of every operator (read when obc is imported)",
    "OBC_NATIVE_GATES": "0 reads rows by the gates in Python, not by those in C++ (read before every row)",
    "OBC_CPU_ISA": "the highest instruction set the CPU kernels may use: x86-64-v4, x86-64-v3 or baseline",
    "OBC_NUM_THREADS": "threads of the NumPy entry points (torch's operators use torch's own number)",
    "OBC_AUTOTUNE": "1 lets Triton search its launch configurations instead of using the fixed ones",
    "OBC_AUTOTUNE_FILE": "a JSON file that keeps these choices between processes",
    "TRITON_INTERPRET": "1 runs the Triton kernels on CPU tensors, for tests",
}
"""Environment variables that change what obc does while it runs. Those for building are in setup.py."""


def _build() -> dict[str, Any]:
    try:
        import obc._native as _native
    except ImportError as error:
        return {
            "available": False,
            "reason": f"the native module was not built, or can't be loaded here: {error}",
            "remedy": NATIVE_REMEDY,
        }
    return {"available": True, **_native.build_facts(), "instruction_set": _native.instruction_set()}


def _gates() -> dict[str, Any]:
    if reason := native_gates.why_unavailable():
        remedy = (
            "install obc again, with this torch, a C++20 compiler and Python's headers; until then gates run in Python"
        )
        return {"available": False, "reason": reason, "remedy": remedy}
    return {"available": True}


def info() -> dict[str, Any]:
    """Facts about this installation.

    Returns:
        "obc", "python", "torch", "platform": versions and the machine's kind;
        "distribution": the name of obc for pip;
        "backends": for each backend whether it is available, and if not "reason" and "remedy";
        "build": of the native code "compiler", "flags", the "torch" it was built with and the "instruction_set" in
        use, or why there is none and the remedy;
        "gates": whether scoring's gates run in C++, and if not "reason" and "remedy";
        "environment": obc's environment variables with their values, None where unset.
    """
    return {
        "obc": obc_version() or "not installed (imported from its source tree)",
        "distribution": DISTRIBUTION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "backends": backends.describe(),
        "build": _build(),
        "gates": _gates(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }
