"""Allocations of the papers on depth pruning: remove the last blocks, or the cheapest window of consecutive blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from obc.model.arguments import one_of
from obc.model.groups import ChannelGroup
from obc.selection.choice import BudgetError
from obc.selection.task import Task


class Tail:
    """Removes the last blocks, as many as free the budget (Gromov et al., arXiv 2403.17887, "simple heuristic").

    Args:
        keep_last: the number of blocks at the very end that stay; the paper's heuristic keeps one.
    """

    def __init__(self, keep_last: int = 0) -> None:
        if keep_last < 0:
            raise ValueError(f"keep_last must not be negative, got {keep_last}")
        self.keep_last = keep_last

    def select(self, task: Task) -> dict[str, Tensor]:
        """The last blocks that free the budget together."""
        blocks = _blocks(task)
        blocks = blocks[: len(blocks) - self.keep_last]
        for count in range(1, len(blocks) + 1):
            if task.suffices(_sizes(blocks[-count:])):
                return _removed(task, blocks[-count:])
        raise _unreachable(task, blocks)


class Window:
    """Removes consecutive blocks: of all windows just long enough to free the budget, the one with the lowest score.

    A window's score is sum_n (sum_b r_b[n])^2 with rows r_b[n] of its blocks, or the sum of their scores. For criteria
    that score windows themselves (``AngularDistance(span=n)``, Gromov et al., arXiv 2403.17887), ``score="first"`` uses
    the score of the window's first block.

    Args:
        score: "sum" or "first".
    """

    def __init__(self, score: Literal["sum", "first"] = "sum") -> None:
        one_of("score", score, ("sum", "first"))
        self.score = score

    def select(self, task: Task) -> dict[str, Tensor]:
        """The window of blocks with the lowest sum of scores."""
        blocks = _blocks(task)
        found = []
        for start in range(len(blocks)):
            for stop in range(start + 1, len(blocks) + 1):
                window = blocks[start:stop]
                if _place(window[-1])[1] - _place(window[0])[1] >= len(window):  # they are not consecutive
                    break
                if task.suffices(_sizes(window)):
                    found.append((self._score(task, window), start, window))
                    break
        if not found:
            raise _unreachable(task, blocks)
        return _removed(task, min(found, key=lambda one: one[:2])[2])

    def _score(self, task: Task, window: Sequence[ChannelGroup]) -> float:
        values = [task.scores[group.name].double() for group in window]
        if self.score == "first":
            values = values[:1]
        if values[0].dim() == 2:
            return float(torch.cat(values, 1).sum(1).square().sum())
        return float(torch.cat(values).sum())


def _blocks(task: Task) -> list[ChannelGroup]:
    blocks = [group for group in task.groups if group.kind == "layers" and group.name in task.scores]
    if not blocks:
        raise ValueError(
            "allocations of consecutive blocks need whole blocks: TransformersStructure(model, kinds=['layers']), or "
            "--kinds layers of obc prune"
        )
    if len({_place(group)[0] for group in blocks}) > 1:
        lists = sorted({_place(group)[0] for group in blocks})
        raise ValueError(f"the blocks are in several lists, {', '.join(lists)}; pass all but one in ignored_layers")
    return blocks


def _place(group: ChannelGroup) -> tuple[str, int]:
    name, _, place = group.name.rpartition(".")
    return name, int(place)


def _sizes(blocks: Sequence[ChannelGroup]) -> dict[str, int]:
    return {group.name: group.size for group in blocks}


def _removed(task: Task, blocks: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    gone = _sizes(blocks)
    return {name: torch.arange(gone.get(name, 0), device="cpu") for name in task.scores}


def _unreachable(task: Task, blocks: Sequence[ChannelGroup]) -> BudgetError:
    most = task.costs.freed(_sizes(blocks))
    return BudgetError(f"whole blocks free at most {most:g} of the {task.budget:g} {task.costs.unit} to be freed", most)
