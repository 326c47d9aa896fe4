"""The report and the result of pruning."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Literal

import torch
from torch import Tensor, nn

from obc.distribution import obc_version
from obc.files import atomic_write, built, read_fields
from obc.model.arguments import listed
from obc.model.latency_table import LatencyTable
from obc.model.plan import PruningPlan
from obc.model.readable import count, readable
from obc.page.charts import quantiles
from obc.page.document import Section
from obc.pruning.report_page import pruning_fragment, pruning_page
from obc.recovery.compensation_report import CompensationReport
from obc.recovery.fusion import FusionReport
from obc.recovery.mean_bias import MeansReport
from obc.structures.proof import Proof

logger = logging.getLogger("obc")

_FORMAT = "obc.PruningReport/1"
# The units that budgets count.
Counted = Literal["macs", "parameters", "active_parameters", "bytes", "seconds"]
# The number of groups whose widths a printed report shows.
_GROUPS = 20
# The largest number of points of a score curve.
_POINTS = 121


class ReportError(ValueError):
    """A file is not a report of a pruning, or is damaged."""


@dataclass(frozen=True)
class StepReport:
    """One scoring and removal.

    Attributes:
        target: the share of the budgeted quantity that was to be reached.
        macs: the share of MACs that remained.
        parameters: the share of parameters that remained.
        removed: the number of units removed from each group that lost any.
        remaining: the share of the budgeted quantity that remained, below the target by less than the last unit
            removed.
    """

    target: float
    macs: float
    parameters: float
    removed: Mapping[str, int]
    remaining: float


@dataclass
class Change:
    """How much of something there was before and after pruning.

    Attributes:
        before: amount in the unpruned model.
        after: amount in the pruned model.
        counted: what is counted, in words that begin with the unit.
    """

    before: float
    after: float
    counted: str

    def __str__(self) -> str:
        unit, rest = ("bytes", self.counted[5:]) if self.counted.startswith("bytes") else ("", f" {self.counted}")
        said = readable if unit else count
        share = f" ({self.after / self.before:.1%} remain)" if self.before else ""
        return f"{said(self.before)} -> {said(self.after)}{rest.rstrip()}{share}"


@dataclass
class PruningReport:
    """The report of :func:`obc.prune`.

    MACs are predicted: those of one call with the example inputs, as :class:`obc.structures.measure.TracedCosts`
    counts; for transformers models those of the first batch, or for one token if that makes no difference
    (:class:`obc.structures.transformers.costs.TransformerCosts`).

    Attributes:
        budget: the unit of the targets in ``steps``: "macs", "parameters", "active_parameters", "bytes" or "seconds".
        macs_before: MACs of the unpruned model.
        macs_after: MACs of the pruned model.
        macs_measured: the share of MACs that the pruned model executes on the first batch, counting all matrix
            products; None if they could not be counted.
        parameters_before: parameters of the unpruned model.
        parameters_after: parameters of the pruned model.
        known: further known quantities: "blocks", "active_params", "memory", "latency" (:class:`Change`).
        speed: seconds of a forward pass on the first batch, with ``measure=True``.
        widths: group -> (units before, units after).
        steps: one entry per step that removed something.
        seconds: wall time of each part: "structure", "latency" (measuring a table), "try" (criteria), "count",
            "score", "select", "remove", "recalibrate", "compensate", "verify", "measure".
        unscored: layers whose rows were needed but could not be read -> why.
        left_out: groups that were not pruned -> why.
        warnings: what deserves a second look.
        proof: which groups were tried, with the result (:mod:`obc.structures.proof`); None if they can't be tried.
        error: the largest relative difference between the pruned model and the unpruned one with the same units masked,
            over what layers read and the outputs on the first batch, before compensation and with equal BatchNorm
            statistics; None if they were not compared.
        tolerance: the difference that rounding explains (:class:`obc.structures.comparison.Observation`).
        unproved: groups, or "the whole model", about which nothing could be proved -> why.
        compensation: the report of :func:`obc.compensate`, if it was requested.
        means: what biases took over, with ``compensate="mean"``.
        fusion: what was fused into remaining units, with ``compensate="fusion"``.
        scores: group -> its units' finite scores before any removal, smallest first; for more than 121 units as many
            quantiles.
        provenance: what was requested, for which model, with which software, and when.
    """

    budget: Counted = "macs"
    macs_before: int = 0
    macs_after: int = 0
    macs_measured: float | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    known: dict[str, Change] = field(default_factory=dict)
    speed: Change | None = None
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    steps: list[StepReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    proof: Proof | None = None
    error: float | None = None
    tolerance: float | None = None
    unproved: dict[str, str] = field(default_factory=dict)
    compensation: CompensationReport | None = None
    means: MeansReport | None = None
    fusion: FusionReport | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    def note_known(self, found: Mapping[str, tuple[float, str]], before: bool) -> None:
        """Record what was ``found``, name -> (value, unit), of the unpruned model (``before``) or the pruned one."""
        for name, (value, counted) in found.items():
            if before:
                self.known[name] = Change(value, value, counted)
            elif name in self.known:
                self.known[name].after = value

    def __post_init__(self) -> None:
        self._logged: set[str] = set()  # what a terminal shows already; not saved with the report

    def warn(self, warning: str) -> None:
        """Note a warning, once, and log it."""
        if warning not in self.warnings:
            self.warnings.append(warning)
            if logger.isEnabledFor(logging.WARNING):
                self._logged.add(warning)
            logger.warning("obc.prune: %s", warning)

    def note_scores(self, name: str, scores: Tensor) -> None:
        """Record the (units,) scores of the group ``name``, unless an earlier step did."""
        if name not in self.scores:
            self.scores[name] = quantiles(scores, _POINTS)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain Python values for JSON, except the matrices of compensation."""
        compensation = self.compensation and replace(self.compensation, decompressors={})
        fields = asdict(replace(self, compensation=compensation))
        if compensation is not None:
            del fields["compensation"]["decompressors"]
        return fields

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, for :meth:`load` and ``obc report``.

        Raises:
            OSError: the file can't be written; an existing file is left unchanged.
        """
        content = json.dumps({"format": _FORMAT, **self.as_dict()}, indent=2)
        with atomic_write(path) as file:
            file.write((content + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningReport:
        """Read a report written by :meth:`save`.

        Raises:
            ReportError: the file is not a report, or is damaged.
            OSError: the file can't be read.
        """
        try:
            fields = read_fields(path, _FORMAT)
        except ValueError as error:
            raise ReportError(f"{path} is not a report of a pruning: {error}") from error
        try:
            report: PruningReport = built(fields, cls)
        except ValueError as error:
            raise ReportError(f"{path} is a damaged report of a pruning: {error}") from error
        return report

    def html(self, further: Sequence[Section] = ()) -> str:
        """One self-contained page without scripts, as ``obc report`` writes it, and ``further`` sections at its end."""
        return pruning_page(self.as_dict(), further)

    def _repr_html_(self) -> str:
        return pruning_fragment(self.as_dict())

    def __str__(self) -> str:
        macs = f"MACs {self.provenance.get('MACs', '')}".strip()
        lines = [
            f"{macs}: {Change(self.macs_before, self.macs_after, '')}{self._measured()}",
            f"parameters: {Change(self.parameters_before, self.parameters_after, '')}",
        ]
        lines += [f"{name}: {one}" for name, one in self.known.items()]
        if self.speed is not None:
            lines.append(self.speed_said())
        if tried := self.provenance.get("criteria tried"):
            lines.append(f"criterion: {self.provenance['criterion']}; held-out error after compensation: {tried}")
        lines += self._widths_said()
        lines += _by_reason("not pruned", self.left_out)
        lines += _by_reason("not scored", self.unscored)
        lines += _by_reason("not proved", self.unproved)
        lines.append(self._proved())
        lines += [f"warning: {warning}" for warning in self.warnings if warning not in self._logged]
        if logged := sum(warning in self._logged for warning in self.warnings):
            lines.append(f"warnings logged while pruning ran: {logged}")
        if self.seconds:
            lines.append("seconds: " + ", ".join(f"{part} {spent:.2f}" for part, spent in self.seconds.items()))
        return "\n".join(lines)

    def _widths_said(self) -> list[str]:
        """The groups that lost units, the narrowest first, and how many are not shown."""
        lost = {name: both for name, both in self.widths.items() if both[1] < both[0]}
        shown = sorted(lost, key=lambda name: lost[name][1] / lost[name][0])[:_GROUPS]
        width = max(map(len, shown), default=0)
        lines = [f"  {name:{width}}  {lost[name][0]:6d} -> {lost[name][1]:6d}" for name in shown]
        if more := len(lost) - len(shown):
            lines.append(f"  and {more} more groups that lost less; the report's widths hold all")
        if kept := len(self.widths) - len(lost):
            lines.append(f"  groups that kept all units: {kept}")
        return lines

    def speed_said(self) -> str:
        """The measured speed-up, in one line."""
        assert self.speed is not None
        before, after, counted = self.speed.before, self.speed.after, self.speed.counted
        return f"measured speed-up: {before / after:.2f} ({before:.4g} -> {after:.4g} {counted})"

    def _measured(self) -> str:
        if self.macs_measured is None or not self.macs_before:
            return ""
        predicted = self.macs_after / self.macs_before
        return f", predicted {predicted:.3f}; measured {self.macs_measured:.3f} on the first batch"

    def _proved(self) -> str:
        tried = 0 if self.proof is None else len(self.proof.proved)
        tried_groups = f"{tried} groups tried and right"
        if self.proof is not None and self.proof.probed:
            tried_groups += f", order found by running the model: {listed(self.proof.probed)}"
        if self.error is None or self.tolerance is None:
            return f"not proved: the pruned model was not compared with the masked one; {tried_groups}"
        return (
            f"proved: the pruned model equals the masked one up to {self.error:.1e} (rounding explains "
            f"{self.tolerance:.1e}); {tried_groups}"
        )


def _by_reason(what: str, found: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the first names that it is given for."""
    names: dict[str, list[str]] = {}
    for name, why in found.items():
        names.setdefault(why, []).append(name)
    return [f"  {listed(those)}: {what}: {why}" for why, those in names.items()]


@dataclass(frozen=True)
class PruningResult:
    """The result of :func:`obc.prune`.

    Attributes:
        model: the model that was passed, pruned in place.
        plan: what every layer kept of the unpruned model, verified value by value.
        report: what was done.
        latency_table: the table given or measured, for pruning the unpruned model again; None if there was none.
    """

    model: nn.Module
    plan: PruningPlan
    report: PruningReport
    latency_table: LatencyTable | None = None

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


@contextlib.contextmanager
def timed(report: PruningReport, part: str) -> Iterator[None]:
    """Add the wall time of the block to ``report.seconds[part]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        report.seconds[part] = report.seconds.get(part, 0.0) + time.perf_counter() - start


def provenance(model: nn.Module, choices: Mapping[str, object]) -> dict[str, str]:
    """The model's class, device and dtype, the choices that are not None, versions, and the time in UTC."""
    first = next(model.parameters(), None)
    found: dict[str, object] = {"model": type(model).__name__}
    found |= {name: value for name, value in choices.items() if value is not None}
    if first is not None:
        found |= {"device": str(first.device), "dtype": str(first.dtype).removeprefix("torch.")}
    found |= {
        "obc": obc_version() or "source tree",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return {name: str(value) for name, value in found.items()}
