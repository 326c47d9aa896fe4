"""Several processes that each have some of the calibration batches and decide as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Processes:
    """A process group; ``group=None`` is this process alone, and nothing is exchanged.

    Args:
        group: a ``torch.distributed`` process group.
        device: where the backend can exchange tensors: the models' device.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group, self.device = group, device

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor, in place, by its sum over the processes."""
        self._reduce(tensors, "SUM")

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over all processes."""
        summed = torch.tensor(numbers, dtype=torch.float64)
        self.add([summed])
        return summed.tolist()

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The elementwise minimum of the processes' numbers."""
        least = torch.tensor(numbers, dtype=torch.int64)
        self._reduce([least], "MIN")
        return least.tolist()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor, in place, by the first process's."""
        if self.group is None:
            return
        source = torch.distributed.get_global_rank(self.group, 0)
        for tensor in tensors:
            there = tensor.to(self.device)
            torch.distributed.broadcast(there, source, group=self.group)
            tensor.copy_(there)

    def _reduce(self, tensors: Iterable[Tensor], how: str) -> None:
        if self.group is None:
            return
        for tensor in tensors:
            there = tensor.to(self.device)
            torch.distributed.all_reduce(there, getattr(torch.distributed.ReduceOp, how), group=self.group)
            tensor.copy_(there)


ALONE = Processes()
