"""Running sums of one statistic. A batch's summands are kept separate until the batch is known to be finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from obc.model.processes import gathered, reduce_tensor
from obc.statistics.errors import StatisticsError

Key = tuple[tuple[str, ...], str]  # the modules with this sum, which read the very same tensor; field

# Numbers converted to the totals' dtype at once, so that no converted copy of a whole matrix is made.
_AT_ONCE = 65536


class Sums:
    """Float64 sums per module and field, on the device of the summands.

    Modules share a sum as long as they read the very same tensor; a module's total adds all keys that contain it.
    Adding reads nothing from a GPU: a batch that is not finite is replaced by zeros there, and named when asked.

    Args:
        checked: ``checked(module, field, summand)`` returns the part that shows whether it is finite; by default all of
            it.
        to: device of the totals; None: the summands' device.
        dtype: dtype of the totals.
        reused: fields whose summands' memory :meth:`memory` reuses.
        unpacked: ``unpacked(module, field, total)`` converts a total for the caller.
    """

    def __init__(
        self,
        name: str,
        checked: Callable[[str, str, Tensor], Tensor] = lambda module, field, values: values,
        to: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
        reused: frozenset[str] = frozenset(),
        unpacked: Callable[[str, str, Tensor], Tensor] = lambda module, field, total: total,
    ) -> None:
        self.name, self.to, self.dtype, self.reused = name, to, dtype, reused
        self.checked, self.unpacked = checked, unpacked
        self.totals: dict[Key, Tensor] = {}
        self.left_out: list[str] = []
        self._batch: dict[Key, Tensor] = {}
        self._spare: list[Tensor] = []
        self._flags: list[tuple[int, list[Key], Tensor]] = []

    def add(self, modules: str | tuple[str, ...], field: str, values: Tensor) -> None:
        """Add ``values``, which is kept, to the summands of the current batch."""
        key = ((modules,) if isinstance(modules, str) else modules, field)
        if key in self._batch:
            self._batch[key] += values
            self._free(key, values)
        else:
            self._batch[key] = values

    def memory(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(count,) numbers to overwrite and then add as one of the fields ``reused``."""
        for place, spare in enumerate(self._spare):
            if (spare.numel(), spare.dtype, spare.device) == (count, dtype, device):
                return self._spare.pop(place)
        return torch.empty(count, dtype=dtype, device=device)

    def begin(self) -> None:
        """Begin a batch, for the first time or again: forget its summands."""
        self._batch.clear()

    def hand_over(self, other: Sums) -> None:
        """Add the summands of the current batch to those of ``other``."""
        for (modules, field), values in self._batch.items():
            other.add(modules, field, values)
        self._batch = {}

    def commit(self, batch: int) -> None:
        """End the batch: add its summands to the totals if all of them are finite."""
        added, self._batch = self._batch, {}
        if not added:
            return
        checked = [self.checked(modules[0], field, values) for (modules, field), values in added.items()]
        if all(reads_at_once(values.device) for values in checked):
            if not bool(torch.cat([values.reshape(-1).double() for values in checked]).isfinite().all()):
                self._name(batch, list(added), _finite(checked))
                return
            bad = None
        else:
            flags = _finite(checked)
            bad = ~flags.all()
            self._flags.append((batch, list(added), flags))
        for key, values in added.items():
            finite = values if bad is None else values.masked_fill_(bad.to(values.device), 0)
            self._add_to_total(key, finite)
            self._free(key, finite)

    def free_memory(self) -> None:
        """Free the memory of earlier summands, because other modules, or none, are read from now on."""
        self._spare.clear()

    def settle(self) -> list[str]:
        """The batches left out so far. Reads from the device."""
        for batch, keys, flags in self._flags:
            if not bool(flags.all()):
                self._name(batch, keys, flags)
        self._flags.clear()
        return self.left_out

    def take(self) -> dict[str, dict[str, Tensor]]:
        """Module -> field -> sum; clears them. Modules that always read the same tensor get the same sum."""
        self.free_memory()
        found: dict[str, dict[str, Tensor]] = {}
        for modules, field in list(self.totals):
            total = self.unpacked(modules[0], field, self.totals.pop((modules, field)))
            for module in modules:
                fields = found.setdefault(module, {})
                fields[field] = fields[field] + total if field in fields else total
        return found

    def merge(self, group: object) -> None:
        """Add up the sums of all processes; a sum that a process lacks counts as zero."""
        mine = {key: tuple(total.shape) for key, total in self.totals.items()}
        everyone: list[Mapping[Key, tuple[int, ...]]] = gathered(mine, group)
        shapes: dict[Key, tuple[int, ...]] = {}
        for one in everyone:
            for key, shape in one.items():
                if shapes.setdefault(key, shape) != shape:
                    raise StatisticsError(
                        f"{self.name} of {key[0][0]!r} has shape {shape} in one process and {shapes[key]} in another: "
                        "the processes must hold the same model"
                    )
        device = next((total.device for total in self.totals.values()), torch.device("cpu"))
        for key in sorted(shapes):
            total = self.totals.setdefault(key, torch.zeros(shapes[key], dtype=self.dtype, device=device))
            reduce_tensor(total, group)

    def _free(self, key: Key, values: Tensor) -> None:
        """Reuse or release ``values``, which has been added."""
        if key[1] in self.reused:
            self._spare.append(values)

    def _add_to_total(self, key: Key, values: Tensor) -> None:
        device = self.to or values.device
        if key not in self.totals:
            with torch.inference_mode(False):  # later batches and processes add to it outside
                self.totals[key] = values.to(device, self.dtype, copy=True)
            return
        if self.totals[key].device != device:  # loaded from a checkpoint
            self.totals[key] = self.totals[key].to(device)
        total, values = self.totals[key], values.to(device)
        if device.type != "cpu" or total.numel() <= _AT_ONCE:
            total += values
            return
        pieces = (tensor.view(-1).split(_AT_ONCE) for tensor in (total, values.contiguous()))
        for sums, summands in zip(*pieces, strict=True):
            sums += summands

    def _name(self, batch: int, keys: list[Key], flags: Tensor) -> None:
        if any(line.startswith(f"batch {batch}: ") for line in self.left_out):
            return  # it belongs to an earlier block
        module = next(key[0][0] for key, finite in zip(keys, flags.tolist(), strict=True) if not finite)
        self.left_out.append(f"batch {batch}: {self.name} of {module!r} is not finite; the batch was left out of it")


def _finite(tensors: list[Tensor]) -> Tensor:
    """(tensors,) bool, on the first one's device."""
    return torch.stack([tensor.isfinite().all().to(tensors[0].device) for tensor in tensors])


def reads_at_once(device: torch.device) -> bool:
    """Whether asking if a batch was finite costs nothing; on a GPU the host would wait."""
    return device.type == "cpu"
