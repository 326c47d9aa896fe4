"""Checkpoints of a scoring run: the scorer's state, saved to one file every few batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from obc.files import parse_json, refuse_non_paths, remove_left_over
from obc.model.processes import own_rank
from obc.scoring.errors import ScoringError
from obc.scoring.place import Place, fingerprint
from obc.scoring.results.row_file import RowFile
from obc.scoring.results.row_store import RowStore
from obc.scoring.scorer import JacobianScorer
from obc.tensor_file import load_format, numbered, save_tensors

_FORMAT = "obc.checkpoint/1"
_PARTS = ("identity", "state", "progress")


class CheckpointError(ScoringError):
    """A checkpoint is damaged, or belongs to another run."""


class SavedRun:
    """The state of a run in a safetensors file, replaced only when a new one is completely on disk.

    Args:
        model: the model, whose weights must match when the run resumes.
        options: name -> plain value of every option that must match.

    Attributes:
        place: gives the batches that are left.
    """

    def __init__(self, path: str | PathLike[str], form: str, model: nn.Module, options: Mapping[str, Any]) -> None:
        refuse_non_paths("checkpoint", path)
        self.path, self._form = Path(path), form
        options = {"model": type(model).__name__, "process": own_rank(), **options}
        self.identity = json.loads(json.dumps(options))
        self.identity["weights"] = weights_of(model)
        self.place = Place(CheckpointError)

    def resume(self) -> dict[str, Any] | None:
        """Load the checkpoint; returns what :meth:`save` was given, or None without a checkpoint.

        Raises:
            CheckpointError: it is damaged, or belongs to another model, other weights or other options.
        """
        remove_left_over(self.path)
        if not self.path.exists():
            return None
        tensors, header = load_format(self.path, "checkpoint", [self._form], CheckpointError, "; delete it", copy=True)
        damaged = f"the checkpoint {self.path} is damaged"
        try:
            there, state, progress = (parse_json(header[key], dict[str, Any]) for key in _PARTS)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{damaged}: {error!r}; delete it") from error
        refuse_other_run(self.path, there, self.identity)
        try:
            self._load(tensors, state)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint {self.path} belongs to another run: {error}") from error
        except (AttributeError, KeyError, TypeError) as error:  # a value of the wrong type
            raise CheckpointError(f"{damaged}: {error!r}; delete it") from error
        place = {"done": progress.get("batches", 0), "last_batch": None}  # of an older version
        self.place.load(tensors, progress.get("place", place))
        return progress

    def save(self, progress: Mapping[str, Any]) -> None:
        """Write the state, and ``progress`` for :meth:`resume` to return."""
        tensors, state = self._state()
        tensors |= self.place.tensors()
        parts = (self.identity, state, {**progress, "place": self.place.values()})
        texts = {key: json.dumps(part) for key, part in zip(_PARTS, parts, strict=True)}
        save_tensors(self.path, tensors, {"format": self._form, **texts})

    def remove(self) -> None:
        """Delete the checkpoint at the end of a run, so that a later run with other batches does not resume from it."""
        self.path.unlink(missing_ok=True)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name, and everything else as plain values."""
        raise NotImplementedError

    def _load(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Load what :meth:`_state` returned; any error means that the checkpoint does not fit."""
        raise NotImplementedError


class ScorerCheckpoint(SavedRun):
    """The state of a scoring run, with the kept rows in a file beside it.

    Kept rows are appended to their file, so each row is written once; the checkpoint says how many of them count.

    Args:
        path: the file. Kept rows go to ``path`` + ".rows", unless the scorer already keeps them in a file.
        options: name -> value of every other option that must match when a run resumes.
    """

    def __init__(self, path: str | PathLike[str], scorer: JacobianScorer, options: Mapping[str, Any]) -> None:
        super().__init__(path, _FORMAT, scorer.model, {**options, "keep_rows": scorer.row_store is not None})
        self.scorer = scorer
        self._rows_path = self.path.with_name(self.path.name + ".rows")
        self._rows: RowFile | None = None

    def resume(self) -> dict[str, Any] | None:
        """:meth:`SavedRun.resume`; without a checkpoint its file of rows is deleted."""
        remove_left_over(self._rows_path)
        if not self.path.exists():
            self._rows_path.unlink(missing_ok=True)
        return super().resume()

    def remove(self) -> None:
        """Delete the checkpoint and its file of rows."""
        super().remove()
        self._rows_path.unlink(missing_ok=True)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self.scorer.state_dict(kept_rows=False)
        tensors = {f"scores:{index}": flat for index, flat in enumerate(state.pop("scores"))}
        state["kept"] = self._save_rows()
        return tensors, state

    def _load(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        state["scores"] = numbered(tensors, "scores")
        if (store := self.scorer.row_store) is not None:
            state["kept_rows"] = self._load_rows(store, state["kept"])
        self.scorer.load_state_dict(state)

    def _save_rows(self) -> int:
        """Write every kept row to disk; returns their number."""
        store = self.scorer.row_store
        if store is None:
            return 0
        file = store.written_file()
        if file is None:
            if self._rows is None:
                self._rows = RowFile.create(self._rows_path, store.width)
            file = self._rows
            file.append(store.matrices(start=file.rows))
        file.sync()
        return file.rows

    def _load_rows(self, store: RowStore, kept: int) -> list[Tensor] | RowFile:
        if store.file_path is not None:
            return RowFile.open(store.file_path, store.width, kept)
        self._rows = RowFile.open(self._rows_path, store.width, kept)
        return list(self._rows.matrix().split([flat.size for flat in store.flats], dim=1))


def refuse_other_run(
    path: Path, there: Mapping[str, Any], here: Mapping[str, Any], error: type[Exception] = CheckpointError
) -> None:
    """Refuse to resume from a checkpoint of a run with other weights or options.

    Args:
        there: the checkpoint's identity: name -> plain value, fingerprints of weights under names with "weights".
        here: the identity of this run.
        error: the class of what is raised.

    Raises:
        CheckpointError: they differ; the message says where.
    """
    for name, value in here.items():
        if there.get(name) != value:
            what = (
                f"{name} than it began with"
                if "weights" in name
                else f"{name}={there.get(name)!r}, this run has {value!r}"
            )
            raise error(f"the checkpoint {path} belongs to another run: other {what}; delete it, or pass another path")


def weights_of(model: nn.Module) -> str:
    """The :func:`fingerprint` of all parameters and buffers."""
    return fingerprint(itertools.chain(model.named_parameters(), model.named_buffers()))
