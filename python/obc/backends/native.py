"""Loads the native libraries and checks that they register what this version of obc calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from obc.backends.operators import TABLE, Operator
from obc.distribution import REBUILD

FOLDER = Path(__file__).resolve().parent.parent / "_lib"


class LibraryMismatchError(RuntimeError):
    """A native library was built from other sources than the Python code that loads it."""


def load(library: str, remedy: str) -> Any:
    """Load ``libobc_<library>.so`` and return its operators, checked.

    Args:
        library: ``cpu`` or ``cuda``.
        remedy: why it may be missing, for the error message.

    Raises:
        ImportError: the library was not built.
        LibraryMismatchError: it lacks an operator of the table, or registers it with another schema.
    """
    path = FOLDER / f"libobc_{library}.so"
    if not path.exists():
        raise ImportError(remedy)
    torch.ops.load_library(path)
    check(library)
    return getattr(torch.ops, f"obc_{library}")


def callables(library: str, found: Any) -> dict[str, Any]:
    """Name -> callable of every operator in the table that the library registers."""
    return {operator.name: getattr(found, operator.name).default for operator in TABLE if library in operator.libraries}


def check(library: str, table: Sequence[Operator] = TABLE, namespace: str | None = None) -> None:
    """Compare what the loaded library registered with the table.

    Raises:
        LibraryMismatchError: an operator is missing or has another schema.
    """
    namespace = namespace or f"obc_{library}"
    faults = []
    for operator in table:
        if library not in operator.libraries:
            continue
        expected = torch._C.parse_schema(f"{namespace}::{operator.native_schema(library)}")
        packet = getattr(getattr(torch.ops, namespace), operator.name, None)
        if packet is None:
            faults.append(f"{operator.name} is missing")
        elif str(packet.default._schema) != str(expected):
            faults.append(f"it registers {packet.default._schema}, expected {expected}")
    if faults:
        raise LibraryMismatchError(
            f"libobc_{library}.so was built from another version of obc than its Python code: {'; '.join(faults)}. "
            f"Rebuild it: {REBUILD}"
        )
