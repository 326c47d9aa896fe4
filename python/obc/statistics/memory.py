"""Estimates the memory of a collection before the first batch is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from obc.model.readable import readable
from obc.scoring.results.report import kernel_bytes
from obc.statistics.block_weights import WeightsOnDevice
from obc.statistics.blocks import residual_blocks
from obc.statistics.by_block import ByBlock, options_of
from obc.statistics.errors import TooLargeError
from obc.statistics.gram import GramReader
from obc.statistics.names import Chosen, chosen_statistics
from obc.statistics.part import Part
from obc.statistics.reader import Groups, Reader
from obc.statistics.rows import Rows

_MEMINFO = Path("/proc/meminfo")


def memory_estimate(
    model: nn.Module,
    statistics: str | Chosen | Sequence[str | Chosen],
    groups: Groups = None,
    by_block: bool | ByBlock = False,
) -> dict[str, int]:
    """Estimate the bytes of each statistic's sums and of one batch's summands, before :func:`obc.collect` is run.

    Kept rows, four bytes per row and channel, are not included, nor the model (:func:`obc.memory_estimate`). With
    ``by_block`` there also is "weights": the most that are on the device at once, those outside the blocks and the
    largest block's. Hidden states, stored on the host or on disk, take tokens * width numbers in the model's dtype.

    Args:
        model: the model.
        statistics: as for ``obc.collect``.
        groups: as for ``obc.collect``.
        by_block: as for ``obc.collect``.
    """
    chosen = [one for one in chosen_statistics(statistics) if not isinstance(one, Rows)]
    found = {one.name: one.reader(model, groups, Part()).bytes() for one in chosen}
    options = options_of(by_block)
    if options is not None:
        names = options.names(model)
        weights = WeightsOnDevice(model, names, options.runs_on(model), options.weights)
        found["weights"] = weights.bytes() + max(weights.bytes(name) for name in names)
    return found


def refuse_too_large(readers: Iterable[Reader], by_block: ByBlock | None, model: nn.Module) -> None:
    """Refuse Gram matrices that a device's free memory can't hold.

    Args:
        readers: only those of Gram matrices are checked.
        by_block: options of a run block by block, which has one block's products on the device at a time.

    Raises:
        TooLargeError: with the bytes and what to do.
    """
    for reader in readers:
        if not isinstance(reader, GramReader):
            continue
        needs = reader.bytes_by_device() if by_block is None else _by_block(reader, by_block, model)
        for device, needed in needs.items():
            free = free_bytes(device)
            if free is not None and needed > free:
                largest = reader.largest()
                raise TooLargeError(
                    f"the Gram matrices of {len(reader.widths)} layers take {readable(needed)} on {device}, where "
                    f"{readable(free)} are free (the largest, of {largest!r} with {reader.widths[largest]} channels: "
                    f"{readable(reader.bytes_of(largest))}); {', or '.join(_remedies(reader, device, free, model))}"
                )


def _remedies(reader: GramReader, device: torch.device, free: int, model: nn.Module) -> list[str]:
    """Ways to fit Gram matrices that a device can't hold; one known not to suffice is left out."""
    fewer = "pass groups= for fewer layers at a time: obc.criteria.scores_from gives each part the same scores"
    found = [fewer if reader.bytes_of(reader.largest()) <= free else "leave the widest layers out with groups="]
    if device.type != "cpu":
        return [*found, "Gram(to='host') or by_block=True, which hold the sums in the host's memory"]
    blocks = [model.get_submodule(name) for name in residual_blocks(model)]
    held = [sum(one.nbytes for one in block.parameters() if one.device == device) for block in blocks]
    freed = sum(held) - max(held, default=0)
    if blocks and _by_block(reader, ByBlock(device), model)[device] <= free + freed:
        found.append(
            "put the model on the meta device and pass by_block=ByBlock(weights=..., states=...): one block's weights "
            f"at a time are read from files, and the sums get the memory of the others, {readable(freed)}"
        )
    return found


def _by_block(reader: GramReader, options: ByBlock, model: nn.Module) -> dict[torch.device, int]:
    """Bytes of a run block by block: all sums on the host, and one block's products where it runs."""
    products = {name: reader.product_bytes(name) for name in reader.widths}
    device, names = options.runs_on(model), options.names(model)
    inside = [sum(size for layer, size in products.items() if f"{layer}.".startswith(f"{name}.")) for name in names]
    outside = sum(products.values()) - sum(inside)
    needs = {torch.device("cpu"): 8 * sum(width**2 for width in reader.widths.values())}
    needs[device] = needs.get(device, 0) + max(*inside, outside)
    return needs


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return kernel_bytes(_MEMINFO, "MemAvailable") if device.type == "cpu" and _MEMINFO.exists() else None


def stated(sizes: Mapping[str, int]) -> str:
    """One line with the bytes of each statistic."""
    parts = ", ".join(f"{name} {readable(size)}" for name, size in sizes.items())
    return f"{readable(sum(sizes.values()))} of sums" + (f" ({parts})" if parts else "")
