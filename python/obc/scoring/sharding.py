"""Models that lie on several processes: parameters sharded by ``fully_shard`` or split by tensor parallelism.

Gates see the tensors that a process computes with. Under ``fully_shard`` those are whole, and every process has batches
of its own. Under tensor parallelism they are parts: some of the channels, some of the positions, or a summand of
each entry; a row is then the sum over the processes of what their gates read, except where all processes computed the
same, which counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from obc.model.sharding import is_dtensor, is_fully_sharded
from obc.scoring.reading.flat_row import FlatRow, Slot

# Results of processes on the same tensors differ by rounding at most; parts of a row differ by far more.
_SAME = 1e-3


def tensor_parallel_group(model: nn.Module) -> Any:
    """The processes that parts of the model's layers lie on; None where it is not tensor-parallel.

    Where it is fully sharded as well, the parameters of such layers lie on a mesh whose last dimension they are.

    Raises:
        ValueError: its parameters lie on meshes of which that can't be said.
    """
    places = {p.device_mesh: p.placements for p in model.parameters() if is_dtensor(p)}  # type: ignore[attr-defined]
    dimensions = 0
    if is_fully_sharded(model):  # fully_shard's come first: one of shards, or one of replicas before it
        dimensions = max((2 if placements[0].is_replicate() else 1 for placements in places.values()), default=1)
    alone = [mesh for mesh in places if mesh.ndim == dimensions]
    split = [mesh for mesh in places if mesh.ndim == dimensions + 1]
    fits = len(alone) + len(split) == len(places) and len(alone) <= 1 and len(split) <= 1
    if fits and alone and split:
        fits = bool((split[0].mesh[..., split[0].get_local_rank(-1)] == alone[0].mesh).all())
    if not fits:
        raise ValueError(
            f"the model's parameters lie on {', '.join(map(str, places))}, which are not one mesh of tensor "
            "parallelism, one of fully_shard, or both; split layers over mesh['tensor'] of one mesh, then pass the "
            "rest of its dimensions to fully_shard for the whole model"
        )
    return split[0].get_group(-1) if split else None


def refuse_common_processes(process_group: Any, tensor_group: Any) -> None:
    """Processes that have parts of one model read the same batches: adding them up again would count rows twice.

    Raises:
        ValueError: several of the tensor-parallel processes are in ``process_group``.
    """
    common = set(dist.get_process_group_ranks(process_group)) & set(dist.get_process_group_ranks(tensor_group))
    if len(common) > 1:
        raise ValueError(
            f"processes {sorted(common)} of process_group have parts of the same layers, which are added up anyway; "
            "pass the group of processes with other batches, such as mesh.get_group('data'), or none"
        )


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
        row = flat.values
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


class SharedRows:
    """Rows of which several processes have a part each: those of tensor parallelism, and those of ``process_group``.

    Args:
        model: the model, of which tensor parallelism is read.
        process_group: the processes that score together, or None.
        in_step: these processes sum their parts of each row; False: each has rows of its own.

    Attributes:
        process_group: as it was given.
        in_step: a process may have no part in a row: others of ``process_group`` have.
        groups: the process groups that read every row together.

    Raises:
        ValueError: several of the tensor-parallel processes are in ``process_group``.
    """

    def __init__(self, model: nn.Module, process_group: Any, in_step: bool) -> None:
        tensor_group = tensor_parallel_group(model)
        if tensor_group is not None and process_group is not None:
            refuse_common_processes(process_group, tensor_group)
        self._parts = None if tensor_group is None else RowParts(tensor_group)
        self.process_group, self.in_step = process_group, in_step and process_group is not None
        self.groups = [group for group in (process_group if in_step else None, tensor_group) if group is not None]

    def add_up(self, flats: Iterable[FlatRow]) -> None:
        """Replace the row in hand by the sum of its parts, the same on every process."""
        for flat in flats:
            if self._parts is not None:
                self._parts.add_up(flat)
            if self.in_step:
                dist.all_reduce(flat.values, group=self.process_group)


def tied(readers: Iterable[Any]) -> Iterator[Any]:
    """Readers that share a slot: which uses of a tied weight are parts can't be told from their sum."""
    users: dict[Slot, list[Any]] = {}
    for reader in readers:
        for slot in reader.slots:
            users.setdefault(slot, []).append(reader)
    shared = {id(reader) for several in users.values() if len(several) > 1 for reader in several}
    return (reader for reader in readers if id(reader) in shared)
