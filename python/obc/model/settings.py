"""Settings of the whole process that obc changes for a while, also if several calls overlap, in threads or nested."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Setting:
    """One setting. The first block that needs another value sets it, and the last one to end restores the caller's.

    Args:
        read: returns the present value.
        write: sets a value.
        needed: the value inside the blocks.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any], needed: Any) -> None:
        self._read, self._write, self._needed = read, write, needed
        self._lock, self._blocks, self._callers = threading.Lock(), 0, None

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        """The setting has the needed value inside the block."""
        with self._lock:
            if self._blocks == 0:
                self._callers = self._read()
                self._write(self._needed)
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    self._write(self._callers)


# The fast path of torch's attention and encoder layers calls no submodule, so hooks see nothing.
every_submodule = Setting(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
# TF32 keeps too few bits of a matrix that is to be inverted.
float32_products = Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
