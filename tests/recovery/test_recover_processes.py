"""obc.recover in several processes: with parts of each batch it trains what one process does with the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import started
import torch
from models import class_loss
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import obc

BATCHES = [torch.randn(8, 6, generator=torch.Generator().manual_seed(number)) for number in range(6)]


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def _recovered(model: nn.Module, teacher: nn.Module, batches: Any, **options: Any) -> list[torch.Tensor]:
    obc.recover(model, teacher, batches, steps=5, lr=0.01, progress=False, **options)
    values = model.state_dict().values()
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]


def _trains(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    expected = _recovered(_network(1), _network(0), BATCHES)
    parts = [batch[rank * 4 : rank * 4 + 4] for batch in BATCHES]
    wrapped = nn.parallel.DistributedDataParallel(_network(1))
    sharded, both = (fully_shard(_network(1), mesh=mesh) for _ in range(2))
    with pytest.warns(UserWarning, match="same weights as the model"):
        _recovered(fully_shard(_network(1), mesh=mesh), fully_shard(_network(1), mesh=mesh), parts)
    for model, teacher in (
        (wrapped, _network(0)),
        (sharded, _network(0)),
        (both, fully_shard(_network(0), mesh=mesh)),
    ):
        torch.testing.assert_close(_recovered(model, teacher, parts), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="checkpoint= needs whole parameters"):
        _recovered(sharded, _network(0), parts, checkpoint=Path(folder) / f"training-{rank}")
    data = [(batch, torch.arange(4) % 4) for batch in parts]
    options: dict[str, Any] = {"process_group": dist.group.WORLD, "progress": False}
    fresh = fully_shard(_network(1), mesh=mesh)
    whole = obc.score(fresh, data, class_loss, **options)
    saved = obc.score(fresh, data, class_loss, checkpoint=Path(folder) / f"scores-{rank}", every=1, **options)
    assert torch.equal(saved["0"].out_channels, whole["0"].out_channels)
    del wrapped
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_train_together_as_one_does_alone(tmp_path: Path) -> None:
    started.processes(_trains, (str(tmp_path),), 2)
