"""Lets torchaudio, and what imports it, be imported beside a torch that its wheel's compiled part was not built for."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def import_torchaudio() -> None:
    """Import torchaudio, without its compiled part where that can't be loaded; its networks do not call it."""
    try:
        import torchaudio
    except (OSError, RuntimeError):  # a library is missing, or it was built for another torch
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        extension: Any = ModuleType("torchaudio._extension")
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
        extension.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = extension
        import torchaudio  # noqa: F401
