"""What the commands share: errors of one clear line, and checks of installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

# Exit codes; 0 is success, 1 an error that obc did not foresee.
USAGE_ERROR = 2
INTERRUPTED = 130  # as a shell says of a process that SIGINT ended
BROKEN_PIPE = 141  # and of one that SIGPIPE ended
# What `obc prune` writes beside a model: of module:function, and of a transformers directory.
REPORT_FILES = ("report.json", "obc_report.json")


class UsageError(Exception):
    """What was asked can't be done as asked; the message says why and what to do. The command line exits with 2."""


def require(packages: Mapping[str, str]) -> None:
    """Refuse to go on without ``packages``: what is imported -> the package that brings it."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def folder(path: Path) -> Path:
    """``path`` as a folder, made where it is missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't make the folder {path}: {error}; choose another --out") from error
    return path


def writable(path: Path) -> Path:
    """``path`` as a file in a folder that exists, made where it is missing."""
    if path.is_dir():
        raise UsageError(f"can't write {path}: it is a folder; --out names a file")
    folder(path.parent)
    return path
