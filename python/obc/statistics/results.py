"""The result of a collection: statistics by module, how each module was read, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from os import PathLike
from typing import Any, TypeVar

from torch import Tensor

from obc.files import parse_json
from obc.model.by_name import ByName
from obc.scoring.coverage import Coverage
from obc.scoring.results.kept_rows import KeptRows
from obc.scoring.results.report import Report
from obc.statistics.blocks import BlockSums
from obc.statistics.errors import StatisticsError
from obc.statistics.experts import ExpertSums
from obc.statistics.gradient_moments import ChannelGradients
from obc.statistics.gram import GramSum
from obc.statistics.moments import ChannelMoments
from obc.statistics.names import Chosen, chosen_statistics, unlike, written
from obc.statistics.weight_gradients import WeightGradientSums
from obc.tensor_file import load_format, save_tensors

_FORMAT = "obc.Statistics/1"

# Statistic -> its result for one module. A new statistic needs a line here.
RESULTS: dict[str, type[Any]] = {
    "moments": ChannelMoments,
    "gram": GramSum,
    "gradient_moments": ChannelGradients,
    "experts": ExpertSums,
    "blocks": BlockSums,
    "weight_gradients": WeightGradientSums,
}

OPTIONAL = (("weight_gradients", "square"),)  # fields that a statistic may lack

Value = TypeVar("Value")


class ByModule(ByName[Value]):
    """One statistic's results by module name; looking up a module that was not read raises with the reason."""

    def __init__(self, name: str, values: Mapping[str, Value], coverage: Mapping[str, Coverage]) -> None:
        super().__init__(values)
        self._name, self._coverage = name, dict(coverage)

    def _why_missing(self, name: str) -> str:
        why = self._coverage.get(name, "it is not among the modules that were read; check groups=")
        return f"no {self._name} of module {name!r}: {why}"


class Statistics:
    """The result of :func:`obc.collect`: sums over all positions, samples or rows, not means.

    ``rows[module]`` is as in ``Scores.rows``; ``moments[module]``, ``gram[module]``, ``gradient_moments[module]``,
    ``experts[module]`` and ``blocks[module]`` are :class:`obc.statistics.ChannelMoments`, ``GramSum``,
    ``ChannelGradients``, ``ExpertSums`` and ``BlockSums``.

    Attributes:
        collected: names of the statistics that were collected.
        num_batches: number of batches that were run, on all processes.
        coverage: statistic -> module -> how it was read, or why not (:class:`obc.Coverage`).
        left_out: the batches left out of a statistic because they were not finite.
        options: statistic -> the options it was collected with; none for statistics from a file that has none.
        metadata: model class, kind of rows, obc's version.
        report: time and memory; None for loaded statistics without a report.
    """

    def __init__(
        self,
        values: Mapping[str, Mapping[str, Any]],
        *,
        rows: KeptRows | None,
        num_batches: int,
        coverage: Mapping[str, Mapping[str, Coverage]],
        left_out: Sequence[str] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
        metadata: Mapping[str, str] | None = None,
        report: Report | None = None,
    ) -> None:
        self.coverage = {name: dict(modules) for name, modules in coverage.items()}
        self._values = {name: ByModule(name, found, self.coverage.get(name, {})) for name, found in values.items()}
        self._rows = rows
        self.num_batches, self.left_out, self.report = num_batches, list(left_out), report
        self.options = {name: dict(values) for name, values in (options or {}).items()}
        self.metadata = dict(metadata or {})

    @property
    def collected(self) -> tuple[str, ...]:
        """The names of the statistics that were collected."""
        return (*(("rows",) if self._rows is not None else ()), *self._values)

    @property
    def rows(self) -> KeptRows:
        """(N, C) rows by module and side. Raises StatisticsError if they were not collected, as all of these do."""
        if self._rows is None:
            raise self._missing("rows")
        return self._rows

    @property
    def moments(self) -> ByModule[ChannelMoments]:
        """Input moments by module."""
        return self._of("moments")

    @property
    def gram(self) -> ByModule[GramSum]:
        """Gram matrices by module."""
        return self._of("gram")

    @property
    def gradient_moments(self) -> ByModule[ChannelGradients]:
        """Gradient moments by module."""
        return self._of("gradient_moments")

    @property
    def experts(self) -> ByModule[ExpertSums]:
        """Use of experts by mixture."""
        return self._of("experts")

    @property
    def blocks(self) -> ByModule[BlockSums]:
        """Similarities by residual block."""
        return self._of("blocks")

    @property
    def weight_gradients(self) -> ByModule[WeightGradientSums]:
        """Sums of weight gradients by weight."""
        return self._of("weight_gradients")

    def require(self, needs: Sequence[str | Chosen], what: str) -> None:
        """Check that these statistics were collected, with the options that they are needed with.

        Raises:
            StatisticsError: one was not; the message says what was collected and what ``what`` needs.
        """
        wanted = chosen_statistics(list(needs)) if needs else []
        remedy = f"pass statistics=[{', '.join(map(written, wanted))}] to obc.collect"
        for one in wanted:
            if one.name not in self.collected:
                raise StatisticsError(
                    f"{what} needs the statistic {one.name!r}, which was not collected (there are "
                    f"{', '.join(self.collected) or 'none'}); {remedy}"
                )
            for option, (value, got) in unlike(one, self.options.get(one.name, {})).items():
                raise StatisticsError(
                    f"{what} needs the statistic {one.name!r} with {option}={value!r}, which was collected with "
                    f"{option}={got!r}; {remedy}"
                )

    def _of(self, name: str) -> ByModule[Any]:
        if name not in self._values:
            raise self._missing(name)
        return self._values[name]

    def _missing(self, name: str) -> StatisticsError:
        there = ", ".join(self.collected) or "none"
        return StatisticsError(f"{name!r} was not collected (there are {there}); add it to statistics= of obc.collect")

    def __repr__(self) -> str:
        model = self.metadata.get("model", "a model")
        parts = [f"{name} of {len(found)} modules" for name, found in self._values.items()]
        if self._rows is not None:
            parts.insert(0, f"rows of {len(self._rows)} modules")
        return f"Statistics of {model} over {self.num_batches} batches: {', '.join(parts)}"

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: one tensor per statistic, module and sum, everything else as metadata.

        Raises:
            OSError: the file can't be written; an existing file is left unchanged.
        """
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, dict[str, dict[str, float]]] = {}
        for name, found in self._values.items():
            numbers[name] = {}
            for module, value in found.items():
                plain = numbers[name].setdefault(module, {})
                for field in fields(value):
                    field_value = getattr(value, field.name)
                    if isinstance(field_value, Tensor):
                        tensors[f"{name}:{field.name}:{module}"] = field_value
                    elif field_value is not None:
                        plain[field.name] = field_value
        header: dict[str, Any] = {
            "numbers": numbers,
            "num_batches": self.num_batches,
            "coverage": self.coverage,
            "left_out": self.left_out,
            "options": self.options,
            "metadata": self.metadata,
            "report": None if self.report is None else asdict(self.report),
            "rows": None if self._rows is None else self._rows.columns,
        }
        if self._rows is not None:
            tensors |= self._rows.tensors()
        texts = {key: json.dumps(value) for key, value in header.items()}
        save_tensors(path, tensors, {"format": _FORMAT, **texts})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Statistics:
        """Read a file written by :meth:`save`.

        Raises:
            StatisticsError: the file is not one of statistics, or is damaged.
            FileNotFoundError: the file does not exist.
        """
        tensors, header = load_format(path, "file of statistics", [_FORMAT], StatisticsError)
        try:
            return cls._parsed(header, tensors)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise StatisticsError(f"{path} is a damaged file of statistics: {error!r}") from error

    @classmethod
    def _parsed(cls, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Statistics:
        numbers = parse_json(header["numbers"], dict[str, dict[str, dict[str, float]]])
        values: dict[str, dict[str, Any]] = {}
        for name, modules in numbers.items():
            kind = RESULTS[name]
            values[name] = {}
            for module, plain in modules.items():
                parts: dict[str, Any] = dict(plain)
                for field in fields(kind):
                    if field.name not in parts:
                        key = f"{name}:{field.name}:{module}"
                        parts[field.name] = tensors.get(key) if (name, field.name) in OPTIONAL else tensors[key]
                values[name][module] = kind(**parts)
        columns = parse_json(header["rows"], dict[str, dict[str, list[int]]] | None)
        report = parse_json(header["report"], dict[str, float | None] | None)
        return cls(
            values,
            rows=None if columns is None else KeptRows.from_tensors(tensors, columns),
            num_batches=parse_json(header["num_batches"], int),
            coverage={
                name: {module: Coverage.parse(how) for module, how in modules.items()}
                for name, modules in parse_json(header["coverage"], dict[str, dict[str, str]]).items()
            },
            left_out=parse_json(header["left_out"], list[str]),
            options=parse_json(header.get("options", "{}"), dict[str, dict[str, Any]]),
            metadata=parse_json(header["metadata"], dict[str, str]),
            report=None if report is None else Report(**report),
        )
