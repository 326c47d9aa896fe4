"""Models that lie on several processes: parameters sharded by ``fully_shard`` or split by tensor parallelism.

Gates see the tensors that a process computes with. Under ``fully_shard`` those are whole, and every process has batches
of its own. Under tensor parallelism they are parts: some of the channels, some of the positions, or a summand of
each entry; a row is then the sum over the processes of what their gates read, except where all processes computed the
same, which counts once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from obc.scoring.rows import FlatRow, Slot

# What processes compute from the same tensors differs by rounding at most; parts of a row don't come so close.
_SAME = 1e-3


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether a part of the model went through ``fully_shard``."""
    # Importing it takes half a second, and a model that went through it has imported it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a tensor of several processes."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters lie on several processes."""
    return is_fully_sharded(model) or any(is_dtensor(parameter) for parameter in model.parameters())


def tensor_parallel_group(model: nn.Module) -> Any:
    """The processes that parts of the model's layers lie on; None where it is not tensor-parallel.

    Raises:
        ValueError: its parameters lie on several meshes, on one of several dimensions, or are also fully sharded.
    """
    meshes = list(dict.fromkeys(p.device_mesh for p in model.parameters() if is_dtensor(p)))  # type: ignore[attr-defined]
    if not meshes or (is_fully_sharded(model) and len(meshes) == 1 and meshes[0].ndim == 1):
        return None
    if len(meshes) > 1 or meshes[0].ndim > 1 or is_fully_sharded(model):
        raise ValueError(
            "the model's parameters lie on several process meshes, or on one of several dimensions "
            f"({', '.join(map(str, meshes))}); score it with tensor parallelism or fully_shard alone"
        )
    return meshes[0].get_group()


def data_parallel_modules(model: nn.Module) -> list[Any]:
    """The ``DistributedDataParallel`` wrappers in the model."""
    if not dist.is_available():
        return []
    return [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]


class LocalPart:
    """The part of a distributed activation that this process has, and the way back to the whole.

    Attributes:
        tensor: the local tensor, with its graph.
        first: the channel of the whole that its channel 0 is.
    """

    def __init__(self, activation: Any, channel_dim: int) -> None:
        from torch.distributed.tensor import Shard

        self._whole, self.tensor, self.first = activation, activation.to_local(), 0
        dim = channel_dim % activation.dim()
        mesh, placements = activation.device_mesh, activation.placements
        if any(isinstance(placement, Shard) and placement.dim == dim for placement in placements):
            rank, size = mesh.get_local_rank(), mesh.size()
            share = -(-activation.shape[dim] // size)  # torch.chunk's
            self.first = min(rank * share, activation.shape[dim])

    def back(self, local: Tensor) -> Tensor:
        """``local``, an identity of :attr:`tensor`, as the distributed activation that it is a part of."""
        from torch.distributed.tensor import DTensor

        whole = self._whole
        return DTensor.from_local(
            local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


class RowParts:
    """Adds up the parts of rows over a tensor-parallel group.

    Which slots all processes hold whole is seen in the first row in which they are not zero.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self._shares: dict[Slot, float] = {}

    def add_up(self, flat: FlatRow) -> None:
        """Replace the row in ``flat`` by the whole one, the same on every process."""
        row = flat.row if flat.samples is None else flat.samples
        undecided = [slot for slot in flat.slots if slot not in self._shares]
        if undecided:
            parts = [torch.empty_like(row) for _ in range(self.group.size())]
            dist.all_gather(parts, row, group=self.group)
            for slot in undecided:
                self._decide(slot, torch.stack([slot.of(part) for part in parts]))
        dist.all_reduce(row, group=self.group)
        for slot in flat.slots:
            if (share := self._shares.get(slot, 1.0)) != 1.0:
                slot.of(row).mul_(share)

    def _decide(self, slot: Slot, parts: Tensor) -> None:
        largest, difference = parts.abs().amax(), (parts - parts[:1]).abs().amax()
        if bool(largest.isfinite()) and bool(largest > 0):
            self._shares[slot] = 1 / self.group.size() if bool(difference <= _SAME * largest) else 1.0


def tied(readers: Iterable[Any]) -> Iterator[Any]:
    """Readers that share a slot: which uses of a tied weight are parts can't be told from their sum."""
    users: dict[Slot, list[Any]] = {}
    for reader in readers:
        for slot in reader.slots:
            users.setdefault(slot, []).append(reader)
    shared = {id(reader) for several in users.values() if len(several) > 1 for reader in several}
    return (reader for reader in readers if id(reader) in shared)
