"""obc's distribution name, which differs from the import name, and its version."""

from __future__ import annotations

import functools
import importlib.metadata

# `pip install obc` is another project.
DISTRIBUTION = "optimal-brain-connection"


# Rebuilds the native libraries of a source tree.
REBUILD = "pip install --no-build-isolation -e . in obc's source tree, or reinstall obc"

# Where the native module is missing: it alone, and gates in C++, include Python's headers.
NATIVE_REMEDY = "install a C++17 compiler and Python's headers (python3-dev), and reinstall obc"


@functools.cache
def obc_version() -> str | None:
    """The installed version; None if obc is imported from its source tree without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
