"""Several processes that each have some of the batches and decide as one, and that fail together.

If one process raises while the others wait for its numbers, they would wait until the backend's timeout. Therefore,
inside :func:`failing_together`, every exchange begins with one number per process that says whether it failed, and a
process that fails takes part in one last exchange. What it raised is in the group's store, where :func:`notice` finds
it between two batches.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from obc.model.arguments import instance
from obc.model.sharding import data_parallel_modules, is_fully_sharded, is_sharded

logger = logging.getLogger("obc")

_GOES_ON, _ENDED, _FAILED = range(3)  # what a process tells the others

_SECONDS_BETWEEN_LOOKS = 1.0  # a look into the store is a message to another process


class ProcessError(RuntimeError):
    """Another process of the group failed, or can't be reached any more."""


@dataclass
class _Region:
    """One call that the processes of a group make together."""

    group: Any
    key: str
    looked: float = field(default_factory=time.monotonic)

    @property
    def store(self) -> Any:
        return self.group.get_group_store()


_open: list[_Region] = []
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Regions opened so far under a group's name; a group made again under the name goes on counting.
_calls: dict[str, int] = {}


@contextlib.contextmanager
def failing_together(group: Any, *models: nn.Module) -> Iterator[None]:
    """If one process raises inside the block, all of them do, within a batch; all end the block together.

    Args:
        group: a ``torch.distributed`` process group; with None nothing is exchanged.
        models: if one of them exchanges tensors itself, because it is sharded or in ``DistributedDataParallel``,
            nothing is added: the other processes may be inside its exchanges.

    Raises:
        ProcessError: another process failed inside the block (the message has its error), or ends it while this one
            still exchanges numbers.
    """
    if group is None:
        warn_of_own_batches(*models)
    if group is None or _region(group) is not None or any(_exchanges(model) for model in models):
        yield
        return
    instance("process_group", group, dist.ProcessGroup, "a torch.distributed process group")
    _calls[group.group_name] = _calls.get(group.group_name, 0) + 1
    region = _Region(group, f"obc/failed/{_calls[group.group_name]}")
    _open.append(region)
    try:
        yield
        _agree(region, _ENDED)
    except ProcessError:
        raise
    except Exception as error:
        _tell(region, error)
        raise
    finally:
        _open.remove(region)


def warn_of_own_batches(*models: nn.Module) -> None:
    """Warn, once a model, that one which several processes train together is read on this one's batches alone."""
    for model in models:
        if not isinstance(model, nn.Module) or model in _warned:
            continue
        wrapped = bool(data_parallel_modules(model))
        if (wrapped or is_fully_sharded(model)) and dist.is_initialized() and dist.get_world_size() > 1:
            _warned.add(model)
            how = "in DistributedDataParallel" if wrapped else "sharded by fully_shard"
            logger.warning(
                "%s is %s, and no process_group is passed, so process %d reads its own batches alone; unless all "
                "processes have the same batches, pass process_group=torch.distributed.group.WORLD",
                *(type(model).__name__, how, dist.get_rank()),
            )


def notice() -> None:
    """Raise if another process has failed; call it between batches. It asks at most once a second.

    Raises:
        ProcessError: another process failed.
    """
    for region in _open:
        if time.monotonic() - region.looked >= _SECONDS_BETWEEN_LOOKS:
            region.looked = time.monotonic()
            if region.store.check([region.key]):
                _agree(region)


def own_rank() -> int:
    """The number of this process among all that were started together; 0 if it runs alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gathered(value: Any, group: Any) -> list[Any]:
    """Every process's value, in the order of the processes."""
    values: list[Any] = [None] * dist.get_world_size(group)
    with _exchange(group):
        dist.all_gather_object(values, value, group=group)
    return values


def gather_tensors(tensor: Tensor, group: Any) -> list[Tensor]:
    """Every process's tensor, all of one shape, in the order of the processes."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    with _exchange(group):
        dist.all_gather(parts, tensor, group=group)
    return parts


def reduce_tensor(tensor: Tensor, group: Any, how: str = "SUM") -> None:
    """Replace the tensor, in place, by its sum over the processes, or by "MIN" or "MAX"."""
    with _exchange(group):
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=group)


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
        summed = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self.add([summed])
        return summed.tolist()

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The elementwise minimum of the processes' numbers."""
        least = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        self._reduce([least], "MIN")
        return least.tolist()

    def in_all(self, names: Collection[str], here: Collection[str]) -> list[str]:
        """Those of the names that are ``here`` in every process."""
        return list(compress(names, self.least([name in here for name in names])))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor, in place, by the first process's."""
        if self.group is None:
            return
        source = dist.get_global_rank(self.group, 0)
        for tensor in tensors:
            there = tensor.to(self.device)
            with _exchange(self.group):
                dist.broadcast(there, source, group=self.group)
            tensor.copy_(there)

    def _reduce(self, tensors: Iterable[Tensor], how: str) -> None:
        if self.group is None:
            return
        for tensor in tensors:
            there = tensor.to(self.device)
            reduce_tensor(there, self.group, how)
            tensor.copy_(there)


ALONE = Processes()


def _exchanges(model: nn.Module) -> bool:
    return isinstance(model, nn.Module) and (is_sharded(model) or bool(data_parallel_modules(model)))


def _region(group: Any) -> _Region | None:
    return next((region for region in _open if region.group is group), None)


@contextlib.contextmanager
def _exchange(group: Any) -> Iterator[None]:
    """One exchange of the package. Raises :class:`ProcessError` if another process failed or ended."""
    if (region := _region(group)) is not None:
        _agree(region)
    with _naming_lost_processes():
        yield


@contextlib.contextmanager
def _naming_lost_processes() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what every backend raises
        raise ProcessError(
            f"exchanging numbers with the other processes failed: {error}; if one of them has ended, its output says "
            "why; start all of them again, with checkpoint= where the call has it, to resume"
        ) from error


def _agree(region: _Region, own: int = _GOES_ON) -> None:
    """Tell the other processes how this one does, and hear how they do."""
    on_cpu = "cpu" in dist.get_backend_config(region.group)
    flags = torch.tensor([own, -own], device="cpu" if on_cpu else torch.accelerator.current_accelerator())
    with torch.inference_mode(False), _naming_lost_processes():
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=region.group)
    most, least = int(flags[0]), -int(flags[1])
    if most == _FAILED:
        raise ProcessError(
            f"{region.store.get(region.key).decode()}; this process stops with it; start all of them again, with "
            "checkpoint= where the call has it, to resume"
        )
    if most != least:
        raise ProcessError(
            f"process {dist.get_rank(region.group)} {'has ended its batches' if own else 'has batches left'}, and "
            f"another {'has some left' if own else 'has none'}: give every process equally many batches"
        )


def _tell(region: _Region, error: Exception) -> None:
    rank = dist.get_rank(region.group)
    said = f"process {rank} failed: {type(error).__name__}: {error}"
    logger.error("%s; the other processes are told", said)
    with contextlib.suppress(RuntimeError):  # they ended: there is nobody to tell
        region.store.set(region.key, said)
        _agree(region, _FAILED)
