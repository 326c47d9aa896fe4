"""Copies tables to a device without waiting for it, in captured CUDA graphs too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Reserve:
    """Pinned host memory for the tables of captured calls.

    The copy in a captured graph reads its host memory at every replay, so that must live as long as the graph, whose
    end torch does not tell: it is kept for good, a few kilobytes a capture. It is pinned before any capture, because
    pinning may wait for the device, which CUDA refuses meanwhile; a capture that finds too little left tries it.
    """

    ENTRIES = 2**17  # 1 MiB: tables of thirty captured calls for ResNet-50

    def __init__(self, pinned: bool = True) -> None:
        self._pinned = pinned  # tests without a GPU can't pin
        self._memory: list[Tensor] = []
        self._left = torch.empty(0, dtype=torch.int64)

    def fill(self) -> None:
        """Ensure half of it for the next captures."""
        if len(self._left) < self.ENTRIES // 2:
            self._left = torch.empty(self.ENTRIES, dtype=torch.int64, pin_memory=self._pinned)
            self._memory.append(self._left)

    def take(self, table: Tensor) -> Tensor:
        """A copy of a table in pinned memory that nothing else will use."""
        if len(table) > len(self._left):
            self._memory.append(table.pin_memory() if self._pinned else table.clone())
            return self._memory[-1]
        taken, self._left = self._left.split([len(table), len(self._left) - len(table)])
        return taken.copy_(table)


_reserve = Reserve()


def uploaded(table: np.ndarray, device: torch.device) -> Tensor:
    """The table on the device, without waiting for the copy."""
    host = torch.from_numpy(table)
    if device.type != "cuda":
        return host.to(device)
    if torch.cuda.is_current_stream_capturing():
        return _reserve.take(host).to(device, non_blocking=True)
    _reserve.fill()
    return host.pin_memory().to(device, non_blocking=True)
