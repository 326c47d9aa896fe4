"""Running sums of one statistic. A batch's summands are kept apart until the batch is known to be finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from obc.statistics.errors import StatisticsError

Key = tuple[str, str]  # module, field


class Sums:
    """Float64 sums per module and field, on the device of what is added.

    Nothing is read from a GPU: there, a batch that is not finite is replaced by zeros, and named when asked.

    Args:
        name: of the statistic.
        checked: what of a summand shows whether it is finite; all of it by default.
        to: where the totals lie; None: where the summands do.
        dtype: of the totals.
    """

    def __init__(
        self,
        name: str,
        checked: Callable[[Tensor], Tensor] = lambda values: values,
        to: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.name, self.checked, self.to, self.dtype = name, checked, to, dtype
        self.totals: dict[Key, Tensor] = {}
        self.left_out: list[str] = []
        self._batch: dict[Key, Tensor] = {}
        self._buffers: dict[Key, Tensor] = {}  # products of the batch before, to be overwritten
        self._flags: list[tuple[int, list[Key], Tensor]] = []

    def add(self, module: str, field: str, values: Tensor) -> None:
        """Add ``values``, which is kept, to the summands of the current batch."""
        key = (module, field)
        if key in self._batch:
            self._batch[key] += values
        else:
            self._batch[key] = values

    def add_product(self, module: str, field: str, left: Tensor, right: Tensor) -> None:
        """Add left^T right of (rows, C) each, in their dtype."""
        key = (module, field)
        if key in self._batch:
            self._batch[key].addmm_(left.mT, right)
            return
        buffer = self._buffers.pop(key, None)
        if buffer is None or buffer.dtype != right.dtype or buffer.device != right.device:
            buffer = right.new_empty(left.shape[1], right.shape[1])
        self._batch[key] = torch.mm(left.mT, right, out=buffer)

    def begin(self) -> None:
        """Begin a batch, or begin it again: forget its summands."""
        self._batch.clear()

    def hand_over(self, other: Sums) -> None:
        """Add the summands of the current batch to those of ``other``."""
        for (module, field), values in self._batch.items():
            other.add(module, field, values)
        self._batch = {}

    def commit(self, batch: int) -> None:
        """End the batch: add its summands to the totals if all of them are finite."""
        added, self._batch = self._batch, {}
        if not added:
            return
        first = next(iter(added.values())).device
        flags = torch.stack([self.checked(values).isfinite().all().to(first) for values in added.values()])
        if reads_at_once(first):
            if not bool(flags.all()):
                self._name(batch, list(added), flags)
                return
            bad = None
        else:
            bad = ~flags.all()
            self._flags.append((batch, list(added), flags))
        for key, values in added.items():
            finite = values if bad is None else values.masked_fill_(bad.to(values.device), 0)
            self._add_to_total(key, finite)
            if finite.dim() == 2:
                self._buffers[key] = finite

    def free_buffers(self) -> None:
        """Free the memory of products: other modules are read from now on."""
        self._buffers.clear()

    def settle(self) -> list[str]:
        """What was left out so far. Reads from the device."""
        for batch, keys, flags in self._flags:
            if not bool(flags.all()):
                self._name(batch, keys, flags)
        self._flags.clear()
        return self.left_out

    def fields(self) -> dict[str, dict[str, Tensor]]:
        """Module -> field -> sum: the totals themselves, so that nothing is held twice."""
        found: dict[str, dict[str, Tensor]] = {}
        for (module, field), total in self.totals.items():
            found.setdefault(module, {})[field] = total
        return found

    def merge(self, group: object) -> None:
        """Add up the sums of all processes; what one of them never read counts as zero there."""
        mine = {key: tuple(total.shape) for key, total in self.totals.items()}
        everyone: list[Mapping[Key, tuple[int, ...]]] = [{}] * dist.get_world_size(group)  # type: ignore[arg-type]
        dist.all_gather_object(everyone, mine, group=group)  # type: ignore[arg-type]
        shapes: dict[Key, tuple[int, ...]] = {}
        for one in everyone:
            for key, shape in one.items():
                if shapes.setdefault(key, shape) != shape:
                    raise StatisticsError(
                        f"{self.name} of {key[0]!r} has shape {shape} in one process and {shapes[key]} in another: "
                        "the processes must hold the same model"
                    )
        device = next((total.device for total in self.totals.values()), torch.device("cpu"))
        for key in sorted(shapes):
            total = self.totals.setdefault(key, torch.zeros(shapes[key], dtype=self.dtype, device=device))
            dist.all_reduce(total, group=group)  # type: ignore[arg-type]

    def _add_to_total(self, key: Key, values: Tensor) -> None:
        device = self.to or values.device
        if key not in self.totals:
            with torch.inference_mode(False):  # later batches and processes add to it outside
                self.totals[key] = values.to(device, self.dtype, copy=True)
            return
        if self.totals[key].device != device:  # loaded from a checkpoint
            self.totals[key] = self.totals[key].to(device)
        self.totals[key] += values.to(device)

    def _name(self, batch: int, keys: list[Key], flags: Tensor) -> None:
        if any(line.startswith(f"batch {batch}: ") for line in self.left_out):
            return  # of an earlier block
        module = next(key[0] for key, finite in zip(keys, flags.tolist(), strict=True) if not finite)
        self.left_out.append(f"batch {batch}: {self.name} of {module!r} is not finite; the batch was left out of it")


def reads_at_once(device: torch.device) -> bool:
    """Whether it costs nothing to ask if a batch was finite; on a GPU the host would wait."""
    return device.type == "cpu"
