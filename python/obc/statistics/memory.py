"""What a collection takes of memory, known before the first batch is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from obc.model.readable import readable
from obc.statistics.errors import StatisticsError
from obc.statistics.gram import GramReader
from obc.statistics.names import Chosen, chosen_statistics
from obc.statistics.part import Part
from obc.statistics.reader import Groups, Reader
from obc.statistics.rows import Rows

_MEMINFO = Path("/proc/meminfo")


def memory_estimate(
    model: nn.Module, statistics: str | Chosen | Sequence[str | Chosen], groups: Groups = None
) -> dict[str, int]:
    """Bytes that each statistic's sums and one batch's summands take, before :func:`obc.collect` is run.

    Kept rows, four bytes a row and channel, are not counted, nor what the model takes (:func:`obc.memory_estimate`).

    Args:
        model: whose statistics.
        statistics: as for ``obc.collect``.
        groups: as for ``obc.collect``.
    """
    chosen = [one for one in chosen_statistics(statistics) if not isinstance(one, Rows)]
    return {one.name: one.reader(model, groups, Part()).bytes() for one in chosen}


def refuse_too_large(readers: Iterable[Reader]) -> None:
    """Refuse Gram matrices that the free memory of a device can't hold.

    Raises:
        StatisticsError: with the bytes and what to do.
    """
    for reader in readers:
        if not isinstance(reader, GramReader):
            continue
        for device, needed in reader.bytes_by_device().items():
            free = free_bytes(device)
            if free is not None and needed > free:
                largest, width = reader.largest()
                raise StatisticsError(
                    f"the Gram matrices of {len(reader.layers)} layers take {readable(needed)} on {device}, where "
                    f"{readable(free)} are free (the largest, of {largest!r} with {width} channels: "
                    f"{readable(12 * width**2)}); pass groups= for fewer layers at a time, or Gram(to='host')"
                )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])  # the kernel counts in KiB
    return None


def stated(sizes: Mapping[str, int]) -> str:
    """The bytes of each statistic, as a line."""
    parts = ", ".join(f"{name} {readable(size)}" for name, size in sizes.items())
    return f"{readable(sum(sizes.values()))} of sums" + (f" ({parts})" if parts else "")
