"""Reads rows of residuals at consumers' inputs, by hooks, during the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from obc.criteria.joined_rows import by_group, refuse_unlike, samples_of
from obc.criteria.output_metrics import OutputMetrics
from obc.criteria.residuals import Cut, Residuals
from obc.criteria.subject import Subject
from obc.model.evaluation import evaluating, first_floating
from obc.model.hooks import hooked
from obc.model.usable_batches import UsableBatches, all_finite
from obc.statistics.loss import WatchedLoss, frozen, run_backward
from obc.statistics.part import Part
from obc.statistics.reader import Readers
from obc.statistics.routed import RoutedCalls
from obc.statistics.taps import tapped


class ResidualReader:
    """Hooks on the consumers, and the rows that they read from the current batch.

    Attributes:
        part: the part of the batch that runs.
    """

    def __init__(self, taps: list[Residuals], cut: Cut) -> None:
        self.part = Part()
        self._cut, self._calls = cut, RoutedCalls()
        self._read: dict[Residuals, list[Tensor]] = {}
        self._taps: dict[nn.Module, list[Residuals]] = {}
        for tap in taps:
            self._taps.setdefault(tap.consumer.module, []).append(tap)

    def attach(self) -> list[Any]:
        """Hooks, to be removed at the end."""
        return [
            module.register_forward_hook(self._at_experts, with_kwargs=True)
            if taps[0].consumer.routed
            else module.register_forward_pre_hook(self._at_layer, with_kwargs=True)
            for module, taps in self._taps.items()
        ]

    def begin(self) -> None:
        """A batch begins."""
        self._read.clear()

    def of_batch(self) -> dict[Residuals, Tensor]:
        """The batch's rows, (units,) or (rows, units) per tap.

        Raises:
            CriterionError: layers have different numbers of rows of tokens.
        """
        several = self._cut.several  # then the parts of a batch are other rows, otherwise one row's sum
        rows = {tap: torch.cat(parts) if several else torch.stack(parts).sum(0) for tap, parts in self._read.items()}
        if self._cut.tokens is not None:
            refuse_unlike(rows)
        return rows

    def _at_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs = self._calls.inputs(module, [*args, *kwargs.values()], output) if self.part.reading else ""
        if isinstance(inputs, str):  # the loss needs a graph even if nothing is read
            return tapped(output, lambda _: None, copy=True) if isinstance(output, Tensor) else None
        samples = samples_of(self.part.batch, inputs[0].total) if self._cut.several else 1

        def read(grad: Tensor) -> None:
            for tap in self._taps[module]:
                assert tap.consumer.expert is not None
                row = tap.read_expert(inputs[tap.consumer.expert], grad, self._cut, samples)
                self._read.setdefault(tap, []).append(row)

        return tapped(output, read, copy=True)

    def _at_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_floating(args, kwargs)
        assert x is not None
        # Blocks with experts flatten samples and tokens, also for the layers that every token passes.
        flattened = self._cut.several and self.part.reading and x.dim() == 2
        samples = samples_of(self.part.batch, len(x)) if flattened else len(x)

        def read(activation: Tensor, grad: Tensor) -> None:
            for tap in self._taps[module]:
                self._read.setdefault(tap, []).append(tap.read(activation, grad, self._cut, samples))

        output = tapped(x, read, copy=True, saved=[x])
        swapped = {key: output if value is x else value for key, value in kwargs.items()}
        return tuple(output if value is x else value for value in args), swapped


def read_residuals(
    subject: Subject, taps: list[Residuals], tokens: int | None = None, also: OutputMetrics | None = None
) -> dict[str, Tensor]:
    """Forward and backward over the batches: the finite rows of every group.

    Groups whose experts compute something other than a gated product and a down projection have no rows.

    Args:
        tokens: tokens per row; None: rows are those of ``subject.rows``.
        also: what else to read from the same backward passes.

    Raises:
        CriterionError: with ``tokens``: layers saw different numbers of positions, so their rows don't belong together.
            With rows of tokens or samples: a layer's positions are no multiple of the batch's samples.
    """
    if not taps:
        return {}
    cut = Cut(subject.rows == "sample", tokens)
    reader = ResidualReader(taps, cut)
    handles = [*reader.attach(), *([] if also is None else also.attach())]
    loss, batches = WatchedLoss(subject.loss_fn, Readers(reader.part)), UsableBatches.of(subject.batches)
    with hooked(handles), evaluating(subject.model), frozen(subject.model):
        for index, batch in enumerate(batches):
            reader.begin()
            if also is not None:
                also.begin()
            run_backward(subject.model, loss, index, batch, subject.rows, subject.micro_batch)
            rows = reader.of_batch()
            if not all_finite((list(rows.values()), None if also is None else also.now)):
                batches.leave_out("its rows are not finite")
                continue
            for tap, values in rows.items():
                tap.rows.append(values)
            if also is not None:
                also.take(max(map(len, rows.values()), default=0) if cut.several else 1)
    return by_group(taps, cut.several)
