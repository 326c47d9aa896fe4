"""The result of scoring: the scores of every channel, how each module was read, and the score file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from obc.files import parse_json, refuse_non_paths, save_figure
from obc.model.arguments import meant
from obc.model.by_name import ByName
from obc.model.groups import ChannelGroup, Slices
from obc.model.readable import aligned
from obc.model.usable import refuse_non_modules
from obc.page.document import fragment
from obc.page.markup import element
from obc.page.scores import score_table
from obc.scoring.coverage import Coverage
from obc.scoring.results.group_scores import GroupScores, group_scores
from obc.scoring.results.kept_rows import KeptRows
from obc.scoring.results.report import Report
from obc.tensor_file import load_format, save_tensors

_FORMAT = "obc.Scores/3"
# Earlier formats: coverage is text alone, and the second also holds rows.
_READABLE = ("obc.Scores/1", "obc.Scores/2", _FORMAT)


class ScoresError(ValueError):
    """A file is not a valid score file, or scores belong to another model."""


@dataclass(frozen=True)
class ChannelScores:
    """Scores of one module's channels: the sum over the rows of (weight . gradient)^2.

    Attributes:
        out_channels: (C_out,) float32, or None.
        in_channels: (C_in,) float32, or None for modules without in channels (norms, embeddings).
    """

    out_channels: Tensor | None
    in_channels: Tensor | None = None


class Scores(ByName[ChannelScores]):
    """Scores of a model, keyed by module name.

    S[c] = sum over rows n of (w_c . dL_n/dw_c)^2 for the slice w_c of one channel in one module. The score of a group's
    unit is the sum over its slices.

    Attributes:
        num_rows: rows that were added.
        coverage: module name -> how its rows were read, or why not, as :class:`obc.Coverage`, a string with attributes.
        metadata: model class, kind of rows, obc's version, rows left out.
        rows: with ``keep_rows=True`` every row by module name, as :class:`obc.ChannelRows`; otherwise empty.
        report: time and memory of :func:`obc.score`; None for scores made otherwise.
    """

    def __init__(
        self,
        channels: Mapping[str, ChannelScores],
        *,
        num_rows: int,
        coverage: Mapping[str, str],
        metadata: Mapping[str, str],
        rows: KeptRows | None = None,
        report: Report | None = None,
    ) -> None:
        super().__init__(channels)
        self.num_rows = num_rows
        self.coverage = {name: Coverage.parse(how) for name, how in coverage.items()}
        self.metadata = dict(metadata)
        self.rows = KeptRows([], {}) if rows is None else rows
        self.report = report

    def _why_missing(self, name: str) -> str:
        why = self.coverage.get(name, f"the model had no such module when it was scored{meant(name, self.coverage)}")
        return f"no scores for module {name!r}: {why}"

    def __repr__(self) -> str:
        return "\n".join([self._headline(), *aligned(self.table())])

    def table(self) -> list[tuple[str, ...]]:
        """A header, then one line per module: its channels, the range of its out-channel scores, how it was read."""
        lines: list[tuple[str, ...]] = [("module", "out", "in", "min", "median", "max", "read by")]
        for name, how in self.coverage.items():
            scores = self._values.get(name, ChannelScores(None))
            values = scores.out_channels
            spread = ("", "", "")
            if values is not None and values.numel():
                spread = (f"{values.min():.2e}", f"{values.median():.2e}", f"{values.max():.2e}")
            sizes = ("" if side is None else str(side.numel()) for side in (values, scores.in_channels))
            lines.append((name or "(model)", *sizes, *spread, how))
        return lines

    def _headline(self) -> str:
        unscored = sum(not how.scored for how in self.coverage.values())
        model = self.metadata.get("model", "a model")
        rows = f"{self.num_rows} rows ({self.metadata.get('rows')})"
        return f"Scores of {model}: {len(self)} modules, {rows}, {unscored} unscored"

    def _repr_html_(self) -> str:
        """The table for a notebook: every module, the range of its scores, and how it was read."""
        return fragment(element("p", self._headline()), score_table(self.table(), self.unscored_lines()))

    def unscored_lines(self) -> list[int]:
        """The line numbers in :meth:`table` of the modules without scores."""
        return [number for number, how in enumerate(self.coverage.values()) if not how.scored]

    def group(self, groups: Sequence[ChannelGroup], slices: Slices = "all") -> GroupScores:
        """Scores of coupled channels: S_g = sum over the slices m of group g of S_m, per unit, with the parts listed.

        With kept rows (``keep_rows=True``) a slice of several channels, such as a head's, scores as a whole:
        S_m = sum_n (sum over its channels c of r_c[n])^2. Without rows S_m is the sum of its channels' scores, which
        ignores how their rows agree or cancel.

        Args:
            groups: groups of the model as it was scored, for example from :func:`obc.transformer_groups`.
            slices: "all" is the paper's sum over every slice. "gate", which ``obc.prune`` takes unless told otherwise,
                places one gate on each unit: its consumers' rows are added before squaring (without rows, their scores
                are added).

        Raises:
            ValueError: an unknown ``slices``, two groups with one name, or groups of a model with other widths.
        """
        return group_scores(self, self.rows, self.coverage, groups, slices)

    def verify(self, model: nn.Module) -> None:
        """Check that these scores belong to ``model``: it has every module, with as many channels.

        Raises:
            ScoresError: they don't; the message names the first module that differs.
        """
        from obc.model.rules import Rule, channel_count, scored_rule

        refuse_non_modules(model)
        modules = dict(model.named_modules())
        for name, channels in self._values.items():
            if name not in modules:
                raise ScoresError(f"these scores are of another model: this one has no module {name!r}; score it")
            rule = scored_rule(modules[name])
            for side, values in (("out", channels.out_channels), ("in", channels.in_channels)):
                expected: set[int] = set()
                if isinstance(rule, Rule) and (axis := rule.out_axis if side == "out" else rule.in_axis) is not None:
                    expected.add(channel_count(modules[name], rule, axis))
                    if side == "in":  # fold_groups adds the groups up
                        expected.add(channel_count(modules[name], rule, axis) // rule.groups)
                if values is not None and values.numel() not in expected:
                    raise ScoresError(
                        f"these scores are of another model: {name!r} has {max(expected, default=None)} {side} "
                        f"channels, the scores {values.numel()}; score the model again after every change of its widths"
                    )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: one tensor per module and side, the kept rows, and the rest as metadata.

        Raises:
            OSError: the file can't be written; an existing file is left unchanged.
        """
        tensors = {}
        for name, channels in self._values.items():
            for side, values in (("out_channels", channels.out_channels), ("in_channels", channels.in_channels)):
                if values is not None:
                    tensors[f"{name}:{side}"] = values.detach().cpu().contiguous()
        tensors |= self.rows.tensors()
        metadata = {
            "format": _FORMAT,
            "num_rows": str(self.num_rows),
            "coverage": json.dumps({name: how.fields() for name, how in self.coverage.items()}),
            "metadata": json.dumps(self.metadata),
            "modules": json.dumps(list(self._values)),
        }
        if self.report is not None:
            metadata["report"] = json.dumps(asdict(self.report))
        if self.rows.matrices:
            metadata["row_columns"] = json.dumps(self.rows.columns)
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None) -> Scores:
        """Read a file written by :meth:`save`.

        Args:
            path: the file.
            model: if given, the scores must belong to this model.

        Raises:
            ScoresError: the file is not a score file, is damaged, or belongs to another model.
            FileNotFoundError: the file does not exist.
        """
        tensors, header = load_format(path, "score file", _READABLE, ScoresError)
        try:
            modules = parse_json(header["modules"], list[str])
            coverage = _parsed_coverage(header["coverage"])
            metadata = parse_json(header["metadata"], dict[str, str])
            num_rows = parse_json(header["num_rows"], int)
            row_columns = parse_json(header.get("row_columns", "{}"), dict[str, dict[str, list[int]]])
            rows = KeptRows.from_tensors(tensors, row_columns, num_rows)
            report = Report(**parse_json(header["report"], dict[str, float | None])) if "report" in header else None
        except (KeyError, TypeError, ValueError) as error:
            raise ScoresError(f"{path} is a damaged score file: {error!r}") from error
        if lacking := [name for name in modules if f"{name}:out_channels" not in tensors]:
            raise ScoresError(f"{path} is a damaged score file: it has no scores of {lacking[0]!r}")
        channels = {
            name: ChannelScores(tensors.get(f"{name}:out_channels"), tensors.get(f"{name}:in_channels"))
            for name in modules
        }
        for name, found in channels.items():
            for side in (found.out_channels, found.in_channels):
                if side is not None and (side.dim() != 1 or side.dtype != torch.float32):
                    what = f"{side.dtype} of shape {tuple(side.shape)}, expected a float32 vector"
                    raise ScoresError(f"{path} is a damaged score file: the scores of {name!r} are {what}")
        scores = cls(channels, num_rows=num_rows, coverage=coverage, metadata=metadata, rows=rows, report=report)
        if model is not None:
            scores.verify(model)
        return scores

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the sorted out-channel scores of every module as one curve each, on a logarithmic axis.

        Raises:
            ImportError: matplotlib is missing; the message says how to install it.
        """
        refuse_non_paths("path", path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Scores.plot needs matplotlib: pip install matplotlib") from error
        _draw(Figure, self._values, self._headline(), path)


def _parsed_coverage(text: str) -> dict[str, Coverage]:
    parsed = parse_json(text, dict[str, str | dict[str, Any]])
    return {name: Coverage.parse(how) if isinstance(how, str) else Coverage(**how) for name, how in parsed.items()}


def _draw(figure_class: Any, channels: Mapping[str, ChannelScores], title: str, path: str | PathLike[str]) -> None:
    drawn = {name: c.out_channels for name, c in channels.items() if c.out_channels is not None}
    columns = 3
    lines = max(1, -(-len(drawn) // columns))
    figure = figure_class(figsize=(4.2 * columns, 1.9 * lines + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axis in grid.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(grid.flat, drawn.items(), strict=False):
        ordered = values.detach().float().cpu().sort(descending=True).values
        axis.plot(ordered.clamp_min(torch.finfo(torch.float32).tiny).numpy(), linewidth=1.2)
        axis.set_yscale("log")
        axis.set_title(f"{name} ({values.numel()})", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.supxlabel("out channels, sorted", fontsize=9)
    figure.supylabel("score", fontsize=9)
    save_figure(figure, path, 110)
