"""Batches without the non-finite ones: a batch that one pass leaves out is skipped in every later pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from obc.model.arguments import iterable_batches
from obc.model.batches import has_no_samples, usable_in_autograd
from obc.model.evaluation import tensors_in
from obc.model.processes import notice

# If more than this share of the batches is left out, the rest is no longer a fair sample.
_MOST_LEFT_OUT = 0.1


class UsableBatches:
    """Batches for repeated passes. A pass that finds a non-finite or empty batch names it, and later passes skip it.

    >>> for batch in usable:
    ...     if not all_finite(model(batch)):
    ...         usable.leave_out("its outputs are not finite")

    Attributes:
        left_out: number of a batch, counted from 0 over all batches -> why it is left out.
        on_batch: called before each batch with its place among these batches and their total (None if unknown).
        on_left_out: called with the message when a batch is left out; the default warns.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        iterable_batches(batches)
        self._batches, self._whole = batches, self
        self._numbers: Sequence[int] | None = None
        self._seen, self._current = 0, -1
        self.left_out: dict[int, str] = {}
        self.on_batch: Callable[[int, int | None], None] = lambda number, count: None
        self.on_left_out: Callable[[str], None] = lambda message: warnings.warn(message, stacklevel=4)

    @classmethod
    def of(cls, batches: Iterable[Any]) -> UsableBatches:
        """Wrap batches; usable batches are returned as they are, so that those left out stay left out."""
        return batches if isinstance(batches, cls) else cls(batches)

    def part(self, numbered: Sequence[tuple[int, Any]]) -> UsableBatches:
        """Some of the batches from :meth:`numbered`, under the same numbers. They share what is left out."""
        some = UsableBatches([batch for _, batch in numbered])
        some._numbers, some._whole = [number for number, _ in numbered], self._whole
        some.left_out, some.on_batch, some.on_left_out = self.left_out, self.on_batch, self.on_left_out
        return some

    def numbered(self) -> list[tuple[int, Any]]:
        """The usable batches with their numbers."""
        return [(self._current, batch) for batch in self]

    def over(self, batches: Iterable[Any], first: int = 0) -> Iterator[Any]:
        """The usable ones among ``batches``, whose numbers begin at ``first``."""
        for index, batch in enumerate(batches, first):
            number = index if self._numbers is None else self._numbers[index]
            self._seen = max(self._seen, index + 1)
            if number in self.left_out:
                continue
            self._current = number
            if has_no_samples(batch):
                self.leave_out("it has no samples")
                continue
            notice()
            self.on_batch(index, self.count)
            yield usable_in_autograd(batch)

    def __iter__(self) -> Iterator[Any]:
        return self.over(self._batches)

    @property
    def all(self) -> Iterable[Any]:
        """All batches as given, including those left out."""
        return self._batches

    @property
    def count(self) -> int | None:
        """The number of batches, including those left out; None before the first pass if it can't be known."""
        return len(self._batches) if isinstance(self._batches, Sized) else self._seen or None

    @property
    def current(self) -> int:
        """The number of the current batch."""
        return self._current

    def leave_out(self, why: str) -> None:
        """Leave out the current batch from now on."""
        self.left_out[self._current] = why
        self.on_left_out(f"batch {self._current} is left out: {why}")

    def refuse_many(self, total: Callable[..., Sequence[float]] | None = None) -> None:
        """Raise if too many batches are left out; call it after a pass.

        Args:
            total: sums numbers over processes with batches of their own.

        Raises:
            ValueError: more than a tenth of all batches are left out.
        """
        numbers: Sequence[float] = (len(self.left_out), self._whole.count or 0)
        bad, count = map(int, numbers if total is None else total(*numbers))
        if bad <= _MOST_LEFT_OUT * count:
            return
        shown = "; ".join(f"batch {number}: {why}" for number, why in list(self.left_out.items())[:3])
        raise ValueError(
            f"{bad} of {count} batches are not usable, more than a tenth{shown and f' ({shown})'}: leave empty batches "
            "out, and look for values that are not finite in the others, then in the weights and the loss"
        )


def all_finite(value: Any) -> bool:
    """Whether every floating tensor in ``value``, at any nesting, is finite."""
    tensors = [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
    if not tensors:
        return True
    # If the sum is finite, every entry is, and a sum makes no mask of the tensor's size. Finite entries may have an
    # infinite sum, so then each is looked at.
    return _all(tensor.sum().isfinite() for tensor in tensors) or _all(tensor.isfinite().all() for tensor in tensors)


def _all(flags: Iterable[Tensor]) -> bool:
    found = list(flags)
    return bool(torch.stack([flag.to(found[0].device) for flag in found]).all())
