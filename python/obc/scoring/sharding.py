"""Models spread over several processes: parameters sharded by ``fully_shard`` or split by tensor parallelism.

Gates see the tensors that a process computes with. Under ``fully_shard`` these are whole, and every process has batches
of its own. Under tensor parallelism they are parts: some channels, some positions, or a summand of each entry. A row is
then the sum over the processes of what their gates read; where all processes computed the same, it counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from obc.model.processes import gather_tensors, reduce_tensor
from obc.model.sharding import is_dtensor, is_fully_sharded
from obc.scoring.reading.flat_row import FlatRow, Slot

# Results of several processes on the same tensors differ only by rounding; parts of a row differ by far more.
_SAME = 1e-3


def tensor_parallel_group(model: nn.Module) -> Any:
    """The processes over which the model's layers are split; None if it is not tensor-parallel.

    If the model is also fully sharded, these layers' parameters lie on a mesh whose last dimension is that group.

    Raises:
        ValueError: its parameters lie on meshes that don't show which processes these are.
    """
    places = {p.device_mesh: p.placements for p in model.parameters() if is_dtensor(p)}  # type: ignore[attr-defined]
    dimensions = 0
    if is_fully_sharded(model):  # fully_shard's dimensions come first: one of shards, or one of replicas before it
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
    """Raise if processes with parts of one model would count rows twice, because they read the same batches.

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
    """This process's part of a distributed activation, and the way back to the whole.

    Attributes:
        tensor: the local tensor, with its graph.
        first: the index in the whole of its channel 0.
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
        """The distributed activation made of ``local``, an identity of :attr:`tensor`."""
        from torch.distributed.tensor import DTensor

        whole = self._whole
        return DTensor.from_local(
            local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


class RowParts:
    """Adds up the parts of rows over a tensor-parallel group.

    The first row in which a slot is not zero shows whether all processes hold it whole.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self._shares: dict[Slot, float] = {}

    def add_up(self, flat: FlatRow) -> None:
        """Replace the row in ``flat`` by the whole row, the same on every process."""
        row = flat.values
        undecided = [slot for slot in flat.slots if slot not in self._shares]
        if undecided:
            parts = gather_tensors(row, self.group)
            for slot in undecided:
                self._decide(slot, torch.stack([slot.of(part) for part in parts]))
        reduce_tensor(row, self.group)
        for slot in flat.slots:
            if (share := self._shares.get(slot, 1.0)) != 1.0:
                slot.of(row).mul_(share)

    def _decide(self, slot: Slot, parts: Tensor) -> None:
        largest, difference = parts.abs().amax(), (parts - parts[:1]).abs().amax()
        if bool(largest.isfinite()) and bool(largest > 0):
            self._shares[slot] = 1 / self.group.size() if bool(difference <= _SAME * largest) else 1.0


class SharedRows:
    """Adds up rows that are spread over processes, by tensor parallelism or over ``process_group``.

    Args:
        model: the model, whose tensor parallelism is detected.
        process_group: the processes that score together, or None.
        in_step: whether these processes sum their parts of each row; otherwise each has rows of its own.

    Attributes:
        process_group: the argument of that name.
        in_step: a process may have no part in a row that others of ``process_group`` read.
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
        """Replace the current row by the sum of its parts, the same on every process."""
        for flat in flats:
            if self._parts is not None:
                self._parts.add_up(flat)
            if self.in_step:
                reduce_tensor(flat.values, self.process_group)


def tied(readers: Iterable[Any]) -> Iterator[Any]:
    """Readers that share a slot: their sum does not tell which uses of a tied weight are parts."""
    users: dict[Slot, list[Any]] = {}
    for reader in readers:
        for slot in reader.slots:
            users.setdefault(slot, []).append(reader)
    shared = {id(reader) for several in users.values() if len(several) > 1 for reader in several}
    return (reader for reader in readers if id(reader) in shared)
