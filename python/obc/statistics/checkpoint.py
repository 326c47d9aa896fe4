"""Checkpoints of a collection: sums, rows and random generators, saved in one file every few batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from obc.files import parse_json, remove_left_over
from obc.model.fingerprint import fingerprint, random_state, set_random_state
from obc.scoring.checkpoint import CheckpointError, numbered, read_checkpoint, refuse_other_run
from obc.scoring.coverage import Coverage
from obc.scoring.scorer import JacobianScorer
from obc.statistics.reader import Reader
from obc.tensor_file import save_tensors

_FORMAT = "obc.statistics.checkpoint/2"
_BETWEEN = "\n"  # between the names of modules that share a sum
_LISTS = ("scores", "kept_rows")  # lists of tensors in the scorer's state


class Checkpoint:
    """The state of one run of :func:`obc.collect` in a safetensors file, replaced atomically each time.

    Args:
        path: the file.
        model: the model.
        options: name -> plain value of every option that must match when a run resumes.
        readers: readers by statistic.
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
        self.path, self.readers, self.scorer = Path(path), readers, scorer
        self.identity = json.loads(json.dumps({"model": type(model).__name__, **options}))
        self.identity["weights"] = fingerprint(model)
        self._random: list[Tensor] = []

    def resume(self) -> dict[str, Any] | None:
        """Load the state; returns what :meth:`save` was given, or None without a checkpoint.

        Raises:
            CheckpointError: it is damaged, or belongs to another model, other weights or other options.
        """
        remove_left_over(self.path)
        if not self.path.exists():
            return None
        tensors, header = read_checkpoint(self.path, _FORMAT)
        try:
            identity, state, progress = (
                parse_json(header[key], dict[str, Any]) for key in ("identity", "state", "progress")
            )
            refuse_other_run(self.path, identity, self.identity)
            self._load(tensors, state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint {self.path} is damaged: {error!r}; delete it") from error
        self._random = numbered(tensors, "random")
        return progress

    def restore_random(self) -> None:
        """Restore torch's random generators; call it after the finished batches have been skipped."""
        set_random_state(self._random)

    def save(self, progress: Mapping[str, Any]) -> None:
        """Write the state, and ``progress`` for :meth:`resume` to return."""
        tensors = {f"random:{index}": generator for index, generator in enumerate(random_state())}
        state: dict[str, Any] = {"readers": {}, "scorer": None}
        for name, reader in self.readers.items():
            left_out = list(reader.sums.settle())
            facts = {"coverage": reader.coverage, "called": sorted(reader.called), "left_out": left_out}
            state["readers"][name] = facts
            for (modules, field), total in reader.sums.totals.items():
                tensors[f"{name}:{field}:{_BETWEEN.join(modules)}"] = total
        if self.scorer is not None:
            scorer_state = self.scorer.state_dict()
            for key in _LISTS:
                for index, tensor in enumerate(scorer_state.pop(key)):
                    tensors[f"{key}:{index}"] = tensor
            state["scorer"] = scorer_state
        header = {"identity": self.identity, "state": state, "progress": dict(progress)}
        texts = {key: json.dumps(value) for key, value in header.items()}
        save_tensors(self.path, tensors, {"format": _FORMAT, **texts})

    def remove(self) -> None:
        """Delete the checkpoint at the end of a run, so that a later run with other batches does not resume from it."""
        self.path.unlink(missing_ok=True)

    def _load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
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
