"""Where a run is in a pass over its batches: a run that resumes goes on there, and refuses other batches."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from obc.model.batches import usable_in_autograd
from obc.model.evaluation import tensors_in
from obc.model.sharding import is_dtensor
from obc.tensor_file import numbered

logger = logging.getLogger("obc")


class Place:
    """The number of batches that were taken, the last of them, and the random numbers that the pass began with.

    A loader that shuffles, or that draws otherwise from torch's generators, so gives the same batches again.

    Args:
        error: the class of what is raised.
        marked: whether checkpoints are written, so that every batch is marked, which reads it from its device.
    """

    def __init__(self, error: type[Exception], marked: bool = True) -> None:
        self.done, self._error, self._marked = 0, error, marked
        self._beginning: list[Tensor] = []
        self._random: list[Tensor] = []  # of the run before, until this one goes on
        self._last: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name: the states of the generators at the pass's beginning, and now."""
        states = {"beginning": self._beginning, "random": random_state()}
        return {f"{name}:{index}": state for name, parts in states.items() for index, state in enumerate(parts)}

    def values(self) -> dict[str, Any]:
        """The plain values of a checkpoint."""
        return {"done": self.done, "last_batch": self._last}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take the place that a checkpoint has."""
        self._beginning, self._random = numbered(tensors, "beginning"), numbered(tensors, "random")
        self.done, self._last = values["done"], values["last_batch"]

    def left(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of this pass that are left; the generators go on from where the run before was.

        Only the last batch before is loaded if ``batches`` can be indexed.

        Raises:
            Exception: ``error``; there are fewer batches than were taken, or the last that was taken is another one.
        """
        set_random_state(self._beginning)
        self._beginning = self._beginning or random_state()
        if self.done and isinstance(batches, Sized) and hasattr(batches, "__getitem__"):
            left: Iterator[Any] = (batches[index] for index in range(self.done - 1, len(batches)))
            passed, last = self.done, next(left)
        else:
            left, passed, last = iter(batches), 0, None
            for passed, last in enumerate(itertools.islice(left, self.done), 1):  # noqa: B007
                pass
        if passed < self.done:
            raise self._error(f"the checkpoint says that {self.done} batches are done, but there are only {passed}")
        if self.done:
            self._compare(batches, self._last, _mark(last))
            self._go_on()
        return self._noted(left)

    def again(self, batches: Iterable[Any]) -> Iterator[Any]:
        """All batches of this pass once more.

        Raises:
            Exception: ``error``; the last one is another than before.
        """
        before, self.done = self._last, 0
        yield from self.left(batches)
        self._compare(batches, before, self._last)
        self._go_on()

    def ended(self) -> None:
        """The next pass begins."""
        self.done, self._beginning, self._last = 0, [], None

    def _go_on(self) -> None:
        set_random_state(self._random)
        self._random = []

    def _noted(self, left: Iterator[Any]) -> Iterator[Any]:
        for batch in left:
            self.done, self._last = self.done + 1, _mark(batch) if self._marked else None
            yield usable_in_autograd(batch)

    def _compare(self, batches: Iterable[Any], before: str | None, now: str | None) -> None:
        if before in (None, now):
            return
        said = (
            f"batch {self.done - 1} is another than the checkpoint's, so results of two sets of batches would be mixed"
        )
        if isinstance(batches, (list, tuple)):
            raise self._error(f"{said}; pass the same batches in the same order, or delete the checkpoint")
        logger.warning(
            "%s, unless the loader changes each batch at random; seed its order, or delete the checkpoint", said
        )


def random_state() -> list[Tensor]:
    """The states of torch's generators: the CPU's, and CUDA's if it is in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(states: Sequence[Tensor]) -> None:
    """Restore what :func:`random_state` returned; an empty list changes nothing."""
    if states:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state_all(list(states[1:]))


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes and bit sums of named tensors; integer sums, so exact everywhere.

    Tensors on the meta device, and sparse and nested ones, have no bits. Of a DTensor this process's part counts.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if tensor.is_nested:
            continue
        tensor = tensor.detach()
        if is_dtensor(tensor):
            tensor = tensor.to_local()  # type: ignore[attr-defined]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta or tensor.layout is not torch.strided:
            continue
        integers = torch.int16 if tensor.element_size() % 2 == 0 else torch.uint8
        bits = torch.atleast_1d(tensor).resolve_conj().resolve_neg().contiguous().view(integers)
        digest.update(bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _mark(batch: Any) -> str:
    # The sums are of rows: labels, a row in all, each count alone.
    return fingerprint(("", one.unsqueeze(-1) if one.dim() == 1 else one) for one in tensors_in(batch))
