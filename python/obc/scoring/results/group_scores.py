"""Scores of groups of coupled channels: the sum over all slices of a unit, with every part listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from obc.model.arguments import one_of
from obc.model.by_name import ByName
from obc.model.groups import ChannelGroup, Side, Sided, Slice, Slices, by_name
from obc.scoring.coverage import Coverage

Part = tuple[str, Side]


class GroupScores(ByName[Tensor]):
    """Scores per unit of every group that has a scored part, by the group's name.

    Attributes:
        parts: group -> (module, side) -> (units,), what this slice adds with slices="all"; in the order of execution.
        unscored: group -> (module, side) -> why this slice adds nothing.
        exact: whether the scores come from kept rows. A slice of a unit with several channels c then scores sum_n
            (sum_c r_c[n])^2; without rows sum_c sum_n r_c[n]^2, which ignores how its channels' rows agree or cancel.
            For units of one channel both are equal, except with slices="gate" and several consumers.
    """

    def __init__(
        self,
        totals: Mapping[str, Tensor],
        parts: Mapping[str, Mapping[Part, Tensor]],
        unscored: Mapping[str, Mapping[Part, str]],
        exact: bool,
    ) -> None:
        super().__init__(totals)
        self.exact = exact
        self.parts = {name: dict(values) for name, values in parts.items()}
        self.unscored = {name: dict(reasons) for name, reasons in unscored.items()}

    def _why_missing(self, name: str) -> str:
        unscored = self.unscored.get(name, {})
        why = "; ".join(f"{module} ({side}): {reason}" for (module, side), reason in unscored.items())
        return f"no scores for group {name!r}: {why or 'no such group'}"

    def __repr__(self) -> str:
        how = "kept rows" if self.exact else "scores per channel"
        lines = [f"GroupScores of {len(self.parts)} groups from {how}"]
        for name, parts in self.parts.items():
            lines.append(f"{name or '(model)'}: {'unscored' if name not in self else f'{len(self[name])} units'}")
            lines += [
                f"    {module} ({side})  sum {float(values.sum()):.3e}" for (module, side), values in parts.items()
            ]
            lines += [f"    {module} ({side})  unscored: {why}" for (module, side), why in self.unscored[name].items()]
        return "\n".join(lines)


def group_scores(
    scores: Mapping[str, Sided],
    rows: Mapping[str, Sided],
    coverage: Mapping[str, Coverage],
    groups: Sequence[ChannelGroup],
    slices: Slices,
) -> GroupScores:
    """:meth:`obc.Scores.group`."""
    one_of("slices", slices, get_args(Slices))
    exact = len(rows) > 0
    totals: dict[str, Tensor] = {}
    parts: dict[str, dict[Part, Tensor]] = {}
    unscored: dict[str, dict[Part, str]] = {}
    for name, group in by_name(groups).items():
        _check_fit(scores, group)
        part_rows = group.parts(rows if exact else {})
        parts[name] = (
            {part: values.square().sum(0) for part, values in part_rows.items()} if exact else group.parts(scores)
        )
        unscored[name] = {
            (part.module, part.side): _reason(coverage, part)
            for part in group.slices
            if (part.module, part.side) not in parts[name]
        }
        total = group.scores(rows, slices) if exact else _summed(group, parts[name], slices)
        if total is not None:
            totals[name] = total
    return GroupScores(totals, parts, unscored, exact)


def _summed(group: ChannelGroup, parts: Mapping[Part, Tensor], slices: Slices) -> Tensor | None:
    gates = {(part.module, part.side) for part in group.gates}
    chosen = [values for part, values in parts.items() if slices == "all" or part in gates]
    return torch.stack(chosen).sum(0) if chosen else None


def _check_fit(scores: Mapping[str, Sided], group: ChannelGroup) -> None:
    for part in group.slices:
        if part.module not in scores:
            continue
        sides = scores[part.module]
        values = sides.out_channels if part.side == "out" else sides.in_channels
        if values is not None and part.channels.numel() and int(part.channels.max()) >= len(values):
            raise ValueError(
                f"group {group.name!r} has channel {int(part.channels.max())} of {part.module!r} ({part.side}), "
                f"which has scores of {len(values)}; score the model of these groups in its present state"
            )


def _reason(coverage: Mapping[str, Coverage], part: Slice) -> str:
    how = coverage.get(part.module)
    if how is None:
        return "the scorer has no rule for it"
    return f"it has no {part.side} channels" if how.scored else str(how.reason)
