"""Hooks that read rows of residuals at consumers' inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from obc.criteria.joined_rows import refuse_unlike, row_of_parts, samples_of
from obc.criteria.residuals import Cut, Residuals
from obc.model.evaluation import first_floating
from obc.statistics.part import Part
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
        rows = {tap: row_of_parts(parts, self._cut.several) for tap, parts in self._read.items()}
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
