"""Shared parts of the commands: one-line errors, and checks of installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

# Exit codes; 0 is success, 1 an error that obc did not foresee.
USAGE_ERROR = 2
INTERRUPTED = 130  # as shells report a process that SIGINT ended
BROKEN_PIPE = 141  # as shells report a process that SIGPIPE ended
# What `obc prune` writes beside a model, for module:function and for a transformers directory.
REPORT_FILES = ("report.json", "obc_report.json")


class UsageError(Exception):
    """The request can't be carried out; the message says why and what to do. The command line exits with 2."""


def require(packages: Mapping[str, str]) -> None:
    """Raise unless ``packages`` are installed: import name -> name of the package."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def folder(path: Path) -> Path:
    """``path`` as a folder, created if it is missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't make the folder {path}: {error}; choose another --out") from error
    return path


def writable(path: Path) -> Path:
    """``path`` as a file; its folder is created if it is missing."""
    if path.is_dir():
        raise UsageError(f"can't write {path}: it is a folder; --out names a file")
    folder(path.parent)
    return path
