"""The provenance of a pruned model: the request and the software."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone

import torch
from torch import nn

from obc.distribution import obc_version


def provenance(model: nn.Module, choices: Mapping[str, object]) -> dict[str, str]:
    """The model's class, device and dtype, the choices that are not None, versions, and the time in UTC."""
    first = next(model.parameters(), None)
    found: dict[str, object] = {"model": type(model).__name__}
    found |= {name: value for name, value in choices.items() if value is not None}
    if first is not None:
        found |= {"device": str(first.device), "dtype": str(first.dtype).removeprefix("torch.")}
    found |= {
        "obc": obc_version() or "source tree",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return {name: str(value) for name, value in found.items()}
