"""Checkpoints of a collection: sums, rows and random generators, saved in one file every few batches."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from obc.scoring.checkpoint import SavedRun
from obc.scoring.coverage import Coverage
from obc.scoring.scorer import JacobianScorer
from obc.statistics.reader import Reader
from obc.tensor_file import numbered

_FORMAT = "obc.statistics.checkpoint/2"
_BETWEEN = "\n"  # between the names of modules that share a sum
_LISTS = ("scores", "kept_rows")  # lists of tensors in the scorer's state


class StatisticsCheckpoint(SavedRun):
    """The state of one run of :func:`obc.collect`.

    Args:
        options: name -> plain value of every option that must match when a run resumes.
        scorer: the scorer of rows, or None.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        model: nn.Module,
        options: Mapping[str, Any],
        readers: Mapping[str, Reader],
        scorer: JacobianScorer | None,
    ) -> None:
        super().__init__(path, _FORMAT, model, options)
        self.readers, self.scorer = readers, scorer

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {"readers": {}, "scorer": None}
        for name, reader in self.readers.items():
            left_out = list(reader.sums.settle())
            facts = {"coverage": reader.coverage, "called": sorted(reader.called), "left_out": left_out}
            state["readers"][name] = facts
            for (modules, field), total in reader.sums.totals.items():
                tensors[f"{name}:{field}:{_BETWEEN.join(modules)}"] = total
        if self.scorer is not None:
            state["scorer"] = self.scorer.state_dict()
            for key in _LISTS:
                tensors |= {f"{key}:{index}": tensor for index, tensor in enumerate(state["scorer"].pop(key))}
        return tensors, state

    def _load(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        for name, reader in self.readers.items():
            facts = state["readers"][name]
            reader.coverage.update({module: Coverage.parse(how) for module, how in facts["coverage"].items()})
            reader.called.update(facts["called"])
            reader.sums.left_out[:] = facts["left_out"]
            prefix = f"{name}:"
            for key in tensors:
                if key.startswith(prefix):
                    field, _, modules = key.removeprefix(prefix).partition(":")
                    reader.sums.totals[tuple(modules.split(_BETWEEN)), field] = tensors[key]
        if self.scorer is not None:
            lists = {key: numbered(tensors, key) for key in _LISTS}
            self.scorer.load_state_dict({**state["scorer"], **lists})
