"""Checkpoints of training without pickle: parameters, optimizer state and random numbers in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from obc.files import atomic_write, refuse_non_paths
from obc.scoring.checkpoint import refuse_other_run
from obc.scoring.place import Place
from obc.tensor_file import load_format

_FORMAT = "obc.training/3"


def save_training(
    path: str | PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    report: Any,
    identity: Mapping[str, Any],
    place: Place,
) -> None:
    """Write everything that a run of this ``identity`` needs to resume after ``step``; replaces the file atomically."""
    tensors = {f"model.{name}": tensor for name, tensor in _own_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    tensors |= place.tensors()
    contents = {key: value for key, value in asdict(report).items() if key in ("losses", "evaluations")}
    metadata = {
        "format": _FORMAT,
        "step": str(step),
        "report": json.dumps(contents),
        "identity": json.dumps(identity),
        "place": json.dumps(place.values()),
    }
    with atomic_write(path) as file:
        file.write(save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata))


def load_training(
    path: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    report: Any,
    identity: Mapping[str, Any],
    place: Place,
) -> int:
    """Restore a run from :func:`save_training` and return its step; 0 if there is no file.

    Raises:
        ValueError: the file is damaged, or is of a run of another identity: other weights or options.
    """
    refuse_non_paths("checkpoint", path)
    if not Path(path).exists():
        return 0
    tensors, metadata = load_format(path, "training checkpoint", [_FORMAT], ValueError)
    refuse_other_run(Path(path), json.loads(metadata["identity"]), identity, ValueError)
    own = _own_tensors(model)
    for name, tensor in own.items():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != tensor.shape:
            found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
            raise ValueError(f"{path} is of another model: it has {found} for {name}, which has {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[f"model.{name}"])
    _load_optimizer(optimizer, tensors)
    step, contents = int(metadata["step"]), json.loads(metadata["report"])
    report.losses[:] = contents["losses"]
    report.evaluations[:] = [tuple(entry) for entry in contents["evaluations"]]
    place.load(tensors, json.loads(metadata["place"]))
    return step


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
