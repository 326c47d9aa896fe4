"""Rows of residuals e_u, or of x_u itself, at consumers' inputs, read while the loss goes backward.

A row is that of a batch, of a sample, or of so many consecutive tokens of a sample: of the sum over positions of
e . dL/dx, the part at these positions. The rows of a sample's tokens add up to the sample's row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.criteria.protocol import Subject
from obc.criteria.surgeon import inverse, second_moment
from obc.criteria.units import Consumer
from obc.model.evaluation import evaluating
from obc.model.usable_batches import UsableBatches
from obc.statistics.loss import WatchedLoss, frozen, run_backward
from obc.statistics.part import Part
from obc.statistics.reader import first_tensor, flat_rows, input_dim
from obc.statistics.results import Statistics


def has_bias(consumer: Consumer) -> bool:
    """Whether the mean of what goes can be given to a bias."""
    return isinstance(getattr(consumer.module, "bias", None), Tensor)


@dataclass(eq=False)
class Residuals:
    """One consumer of one group: what makes e of its input, and the rows read at it.

    Attributes:
        group: its name.
        consumer: the layer.
        matrix: (units * k, in): e = matrix (x - mean); None where e is x_u itself.
        mean: (in,).
        rows: what every batch gave so far; (units,), of samples and of tokens (rows, units).
    """

    group: str
    consumer: Consumer
    matrix: Tensor | None = None
    mean: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, group: str, consumer: Consumer, statistics: Statistics, ridge: float) -> Residuals:
        """For a consumer whose Gram matrix was collected; ``ridge`` is relative to the mean diagonal."""
        centred = has_bias(consumer)
        inverted = inverse(second_moment(consumer, statistics, centred), ridge)
        channels = consumer.channels
        blocks = inverted[channels[:, :, None], channels[:, None, :]]
        matrix = torch.linalg.solve(blocks, inverted[channels]).flatten(0, 1)
        found = statistics.gram[consumer.name]
        mean = found.sum.cpu() / found.count if centred else torch.zeros(len(inverted), dtype=torch.float64)
        return cls(group, consumer, matrix, mean)

    def read(self, x: Tensor, grad: Tensor, cut: Cut) -> Tensor:
        """(units,), or (rows, units): the sum over positions and the unit's channels of e . dL/dx."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        dim = input_dim(self.consumer.module, x)
        rows, gradients = flat_rows(x, dim).to(dtype), flat_rows(grad, dim).to(dtype)
        channels = self.consumer.channels.to(rows.device)
        if self.matrix is None or self.mean is None:
            residuals = rows[:, channels.flatten()]
        else:
            residuals = (rows - self.mean.to(rows)) @ self.matrix.to(rows).mT
        product = cut.summed(residuals * gradients[:, channels.flatten()], len(x))
        return product.unflatten(-1, tuple(channels.shape)).sum(-1)


@dataclass(frozen=True)
class Cut:
    """What one row is: a batch, a sample, or so many consecutive tokens of a sample.

    Attributes:
        per_sample: every sample has rows of its own.
        tokens: of a row; None: all of the sample.
    """

    per_sample: bool
    tokens: int | None = None

    @property
    def several(self) -> bool:
        """Whether a batch gives several rows."""
        return self.per_sample or self.tokens is not None

    def summed(self, product: Tensor, samples: int) -> Tensor:
        """(positions of all samples, columns) to (rows, columns), or (columns,) of a batch; the last may be shorter."""
        if not self.several:
            return product.sum(0)
        by_sample = product.unflatten(0, (samples, -1))
        if self.tokens is None:
            return by_sample.sum(1)
        padded = F.pad(by_sample, (0, 0, 0, -by_sample.shape[1] % self.tokens))
        return padded.unflatten(1, (-1, self.tokens)).sum(2).flatten(0, 1)


class _Tap(torch.autograd.Function):
    """Identity whose backward reads the residuals' row. The leaf brings the backward here past frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, read: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.read = read
        return x.clone()  # what comes after may change it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            ctx.read(ctx.saved_tensors[0], grads[0])
        return grads[0], None, None


def read_residuals(subject: Subject, taps: list[Residuals], tokens: int | None = None) -> dict[str, Tensor]:
    """Forward and backward over the batches: rows of every group, without those that are not finite.

    Args:
        subject: the model, its batches and loss.
        taps: what is read.
        tokens: of a row; None: rows are those of ``subject.rows``.

    Raises:
        ValueError: with ``tokens``: layers saw different numbers of positions, so that rows don't belong together.
    """
    leaf, cut = torch.zeros((), requires_grad=True), Cut(subject.rows == "sample", tokens)
    at: dict[nn.Module, list[Residuals]] = {}
    for tap in taps:
        at.setdefault(tap.consumer.module, []).append(tap)
    now: dict[Residuals, list[Tensor]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)

        def read(activation: Tensor, grad: Tensor) -> None:
            for tap in at[module]:
                now.setdefault(tap, []).append(tap.read(activation, grad, cut))

        tapped = _Tap.apply(x, leaf, read)
        swapped = {key: tapped if value is x else value for key, value in kwargs.items()}
        return tuple(tapped if value is x else value for value in args), swapped

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in at]
    loss, batches = WatchedLoss(subject.loss_fn, Part(), []), UsableBatches.of(subject.batches)
    try:
        with evaluating(subject.model), frozen(subject.model):
            for index, batch in enumerate(batches):
                now.clear()
                run_backward(subject.model, loss, index, batch, subject.rows, subject.micro_batch)
                rows = {tap: _joined(parts, cut.several) for tap, parts in now.items()}
                if tokens is not None:
                    _refuse_unlike(rows)
                if not all(bool(values.isfinite().all()) for values in rows.values()):
                    batches.leave_out("its rows are not finite")
                    continue
                for tap, values in rows.items():
                    tap.rows.append(values)
    finally:
        for handle in handles:
            handle.remove()
    return _by_group(taps, cut.several)


def _joined(parts: list[Tensor], several: bool) -> Tensor:
    """One batch's row of one tap: parts of the batch add up, or are samples below each other."""
    return torch.cat(parts) if several else torch.stack(parts).sum(0)


def _refuse_unlike(rows: dict[Residuals, Tensor]) -> None:
    counts: dict[int, str] = {}
    for tap, values in rows.items():
        counts.setdefault(len(values), tap.consumer.name)
    if len(counts) > 1:
        said = " and ".join(f"{name} has {count}" for count, name in counts.items())
        raise ValueError(f"rows of tokens need layers that see the same positions: of one batch {said} rows")


def _by_group(taps: list[Residuals], several: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for tap in taps:
        if tap.rows:
            rows = torch.cat(tap.rows) if several else torch.stack(tap.rows)
            found[tap.group] = found[tap.group] + rows if tap.group in found else rows
    return found
