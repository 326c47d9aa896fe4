"""Checkpoints that were damaged or crafted: CheckpointError, whatever they hold, and nothing of them is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from test_files import DEEP, little_memory
from torch import Tensor

import obc
from obc.scoring import CheckpointError


def score(path: Path, batches: int | None = None) -> obc.Scores:
    """Score with a checkpoint after every batch; stopped before the batch number ``batches``."""
    case = models.residual_cnn()
    left = [len(case.batches) if batches is None else batches]

    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return case.loss(model, batch)

    return obc.score(case.model, case.batches, loss, checkpoint=path, every=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        score(path, batches=2)
    return path


def test_every_truncation_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(0, len(whole), 173):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            score(file)


def altered(part: str, change: Callable[[Any], Any]) -> Callable[[dict[str, str], dict[str, Tensor]], None]:
    """A change of one JSON part of the header: of the value, in place, or to the text that ``change`` returns."""

    def apply(header: dict[str, str], tensors: dict[str, Tensor]) -> None:
        value = json.loads(header[part])
        text = change(value)
        header[part] = text if isinstance(text, str) else json.dumps(value)

    return apply


def rename_reader(state: dict[str, Any]) -> None:
    state["readers"]["other"] = state["readers"].pop("stem")


def shorter(header: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["scores:0"] = tensors["scores:0"][:1].clone()


DAMAGES = {
    "without-state": lambda header, tensors: header.pop("state"),
    "without-progress": lambda header, tensors: header.pop("progress"),
    "nested-deeply": altered("state", lambda state: DEEP),
    "no-json": altered("progress", lambda progress: "{"),
    "state-that-is-a-list": altered("state", lambda state: "[]"),
    "identity-that-is-a-number": altered("identity", lambda identity: "3"),
    "readers-that-are-a-list": altered("state", lambda state: state.update(readers=[])),
    "reader-of-another-name": altered("state", rename_reader),
    "reader-without-its-state": altered("state", lambda state: state["readers"].update(stem={})),
    "layout-that-is-a-number": altered("state", lambda state: state.update(layout=3)),
    "layout-of-others": altered("state", lambda state: state.update(layout=[])),
    "state-without-sums": lambda header, tensors: tensors.pop("scores:0"),
    "sums-of-another-length": shorter,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_crafted_checkpoint_is_refused(damage: str, file: Path) -> None:
    with safe_open(str(file), framework="pt") as opened:
        header = dict(opened.metadata())
    tensors = load_file(file)
    DAMAGES[damage](header, tensors)
    save_file(tensors, str(file), metadata=header)
    with little_memory(), pytest.raises(CheckpointError, match=r"checkpoint .* (is damaged|belongs to another run)"):
        score(file)


def test_a_checkpoint_sets_nothing_but_state(file: Path) -> None:
    """A name in the file is no attribute of a reader."""
    with safe_open(str(file), framework="pt") as opened:
        header = dict(opened.metadata())
    altered("state", lambda state: state["readers"]["stem"].update(attach="overwritten"))(header, {})
    save_file(load_file(file), str(file), metadata=header)
    assert score(file).num_rows == len(models.residual_cnn().batches)
