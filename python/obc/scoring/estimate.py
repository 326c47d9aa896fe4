"""Estimates the memory that scoring takes, by part, from one micro-batch of a checking row and of a later row."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from obc.model.arguments import positive, refuse_uncallable
from obc.model.batches import RowKind, parts_of, usable_in_autograd
from obc.model.evaluation import LossFn, evaluating
from obc.model.readable import readable
from obc.model.usable import refuse_non_modules
from obc.scoring.batch_rows import BatchRows
from obc.scoring.label_free import label_free_loss
from obc.scoring.scorer import JacobianScorer


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a scoring run takes at its peak, by part.

    Attributes:
        weights: parameters and buffers of the model.
        activations: the most that forward and backward of one micro-batch hold at once: what autograd saves, and the
            gradients in flight.
        rows: the current row, its gates and the sums.
        checking_row: how much more the first row takes than a later one: copies of activations, and one weight
            gradient at a time.
        kept_rows: the kept rows.
    """

    weights: int
    activations: int
    rows: int
    checking_row: int
    kept_rows: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.weights + self.activations + self.rows + self.checking_row + self.kept_rows

    def __str__(self) -> str:
        parts = [f"{name} {readable(value)}" for name, value in vars(self).items()]
        return f"{readable(self.total)}: {', '.join(parts)}"


def memory_estimate(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    rows: RowKind = "batch",
    micro_batch: int | None = None,
    keep_rows: int = 0,
    **options: Any,
) -> MemoryEstimate:
    """Estimate the peak memory of ``obc.score`` with these arguments, without starting it.

    Reads a checking row and a later row of the first ``micro_batch`` samples, and counts every tensor that torch
    allocates or frees meanwhile. Not counted: kernel workspaces, the allocator's rounding and free blocks, the batch.

    Args:
        model: the model; it is left as it was.
        batch: one batch, like those to score with.
        loss_fn: as for :func:`obc.score`; by default the label-free loss, which takes about the same memory.
        rows: "batch" or "sample".
        micro_batch: as for :func:`obc.score`.
        keep_rows: the number of rows that will be kept in memory.
        **options: options of :class:`obc.JacobianScorer`.

    Raises:
        TypeError: ``batch`` is None.
        ValueError: ``keep_rows`` is no integer, or negative.
    """
    if batch is None:
        raise TypeError("batch must be one batch, like those to score with, got None")
    refuse_non_modules(model)
    refuse_uncallable(loss_fn=loss_fn)
    if isinstance(keep_rows, bool) or not isinstance(keep_rows, Integral) or keep_rows < 0:
        raise ValueError(f"keep_rows must be a number of rows, an integer of at least 0, got {keep_rows!r}")
    if micro_batch is not None:
        positive("micro_batch", micro_batch)
    batch, _, _ = next(parts_of(usable_in_autograd(batch), micro_batch))
    weights = _storages(itertools.chain(model.parameters(), model.buffers()))
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    live = _LiveBytes(weights.keys() | _storages(tensors).keys())
    with live:
        scorer = JacobianScorer(model, rows=rows, **options)
        reader = BatchRows(scorer, loss_fn or label_free_loss(rows=rows))
        with evaluating(model), scorer:
            first, _ = live.peak_of(lambda: reader.batch(0, batch))
            later, row_bytes = live.peak_of(lambda: reader.batch(1, batch))
    return MemoryEstimate(
        weights=sum(weights.values()),
        activations=later - row_bytes,
        rows=row_bytes,
        checking_row=max(0, first - later),
        kept_rows=scorer.rows_bytes(keep_rows),
    )


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operator returns, until it is freed.

    Args:
        known: address -> bytes of the storages that existed before.
    """

    def __init__(self, known: Iterable[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = set(known)
        self._live: dict[int, weakref.ref[Any]] = {}

    def peak_of(self, call: Callable[[], object]) -> tuple[int, int]:
        """The most bytes live at once during ``call``, and the bytes live after it."""
        self.peak = self.now
        call()
        return self.peak, self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._known or address in self._live:
            return

        def freed(_: weakref.ref[Any]) -> None:
            del self._live[address]
            self.now -= size

        self._live[address] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
