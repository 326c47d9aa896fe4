"""Gates in C++ (``csrc/torch_gates.cpp``), used if they were built for the running torch and Python.

They read the same rows as :mod:`obc.scoring.reading.gates`, bit for bit, in a sixth of the time. The library also has
``channel_dot`` with its checks, for which Python takes longer than the kernel of a small call. A library with
autograd nodes serves one version of torch, so its file name contains that version. Without a library for this one, with
``OBC_NATIVE_GATES=0`` and under ``torch.compile``, the gates in Python are used.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch

from obc import backends
from obc.backends.native import FOLDER, LibraryMismatchError
from obc.distribution import REBUILD

logger = logging.getLogger("obc")

SWITCH = "OBC_NATIVE_GATES"

# Backends whose results equal those of the library's own sums, bit for bit.
_SAME_SUMS = (None, "cpu", "cuda")


def path() -> Path:
    """The path of the library for this torch and this Python, whether or not it was built."""
    version = ".".join(torch.__version__.split(".")[:2])
    name = f"gates-torch{version}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return FOLDER / name


@functools.cache
def _load() -> Any:
    """Load the library; raises ImportError with the reason if it can't be used."""
    if not path().exists():
        raise ImportError(
            f"{path().name} was not built: install obc again with this torch, a C++20 compiler and Python's headers"
        )
    backends.BACKENDS["cpu"].load()  # for the cases that the gates' own kernel does not serve
    spec = importlib.util.spec_from_file_location("obc_gates", path())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := [name for name in ("gate", "Gate", "channel_dot") if not hasattr(module, name)]:
        raise LibraryMismatchError(
            f"{path().name} was built from another version of obc than its Python code: it lacks "
            f"{', '.join(missing)}. Rebuild it: {REBUILD}"
        )
    return module


@functools.cache
def why_unavailable() -> str | None:
    """Why gates run in Python on this installation; None if they run in C++."""
    try:
        _load()
    except ImportError as error:
        logger.info("gates run in Python: %s", error)
        return str(error)
    return None


def library() -> Any | None:
    """The library, or None if Python must do its work; asked before every row and every call of ``channel_dot``."""
    if os.environ.get(SWITCH) == "0" or backends.requested() not in _SAME_SUMS:
        return None
    return None if why_unavailable() else _load()
