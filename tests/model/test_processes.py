"""If one of several processes fails, all of them end with its error, and the next call gives what one process gives."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import started
import torch
from models import class_loss
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import obc
from obc.model import processes
from obc.scoring.checkpoint import CheckpointError

Batch = tuple[Tensor, Tensor]


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()


def _data() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(12, 4, 3, 8, 8, generator=generator), torch.arange(48).reshape(12, 4) % 5
    return list(zip(images, labels, strict=True))


def _compensated(batches: Iterable[Batch], group: Any, folder: Path) -> Tensor:
    original = _model()
    plan = obc.PruningPlan({"3": obc.Kept(in_channels=torch.arange(4)), "0": obc.Kept(out_channels=torch.arange(4))})
    plan = obc.PruningPlan({**plan, "1": obc.Kept(out_channels=torch.arange(4))})
    pruned = plan.apply(copy.deepcopy(original))
    obc.compensate(pruned, original, plan, batches, mode="ls", process_group=group, progress=False)
    return pruned[3].weight.detach()


def _recalibrated(batches: Iterable[Batch], group: Any, folder: Path) -> Tensor:
    model = _model()
    obc.recalibrate_norms(model, batches, process_group=group)
    return model[1].running_mean


def _scored(batches: Iterable[Batch], group: Any, folder: Path) -> Tensor:
    options = {} if group is None else {"process_group": group, "combine": "scores"}
    scores = obc.score(_model(), batches, class_loss, checkpoint=folder / "scores", every=1, progress=False, **options)
    return scores["3"].out_channels


def _scored_in_step(batches: Iterable[Batch], group: Any, folder: Path) -> Tensor:
    """Each row is the sum over the processes, so one process alone gives another result."""
    scores = obc.score(_model(), batches, class_loss, process_group=group, progress=False)
    return torch.zeros_like(scores["3"].out_channels)


def _collected(batches: Iterable[Batch], group: Any, folder: Path) -> Tensor:
    got = obc.collect(
        _model(), batches, statistics="gram", checkpoint=folder / "gram", every=1, process_group=group, progress=False
    )
    return got.gram["3"].total


CALLS: dict[str, Callable[[Iterable[Batch], Any, Path], Tensor]] = {
    "score": _scored,
    "score in step": _scored_in_step,
    "collect": _collected,
    "recalibrate_norms": _recalibrated,
    "compensate": _compensated,
}


def _broken(batches: list[Batch]) -> Iterator[Batch]:
    yield from batches[:2]
    raise OSError("the disk is gone")


def _slow(batches: list[Batch]) -> Iterator[Batch]:
    """Never ends: only a process that looks between batches hears of the other's failure."""
    return itertools.cycle(batches)


def _start(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)


def _fails(rank: int, folder: str) -> None:
    _start(rank, folder)
    processes._SECONDS_BETWEEN_LOOKS = 0.0
    own = Path(folder) / str(rank)
    own.mkdir()
    mine, results = _data()[rank::2], {}
    for name, call in CALLS.items():
        endless = name in ("score", "collect")
        try:
            call(_broken(mine) if rank else _slow(mine) if endless else mine, dist.group.WORLD, own)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        for left in own.iterdir():
            left.unlink()
        torch.save(call(mine, dist.group.WORLD, own), Path(folder) / f"{name}-{rank}.pt")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_one_process_raises(tmp_path: Path) -> None:
    started.processes(_fails, (str(tmp_path),), 2)
    told, raised = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    first, second = _data()[::2], _data()[1::2]
    in_order = first[:5] + second[:5] + first[5:] + second[5:]  # compensate holds out every fifth batch
    for name, call in CALLS.items():
        assert raised[name] == "OSError: the disk is gone"
        assert told[name].startswith("ProcessError: process 1 failed: OSError: the disk is gone; "), told[name]
        alone = call(in_order, None, tmp_path)
        for rank in range(2):
            again = torch.load(tmp_path / f"{name}-{rank}.pt")
            torch.testing.assert_close(again, alone, rtol=1e-3, atol=1e-5)


def _resumes(rank: int, folder: str) -> None:
    _start(rank, folder)
    own = Path(folder) / str(rank)
    own.mkdir()
    mine = _data()[rank::2]
    for name in ("score", "collect"):
        with pytest.raises(OSError if rank else processes.ProcessError, match="the disk is gone"):
            CALLS[name](_broken(mine) if rank else iter(mine), dist.group.WORLD, own)
        assert list(own.iterdir())
        torch.save(CALLS[name](iter(mine), dist.group.WORLD, own), Path(folder) / f"{name}-{rank}.pt")
        torch.save(CALLS[name](iter(mine), dist.group.WORLD, own), Path(folder) / f"{name}-{rank}-unbroken.pt")
    dist.destroy_process_group()


def test_calls_that_failed_resume_to_the_same_bits(tmp_path: Path) -> None:
    started.processes(_resumes, (str(tmp_path),), 2)
    for name, rank in itertools.product(("score", "collect"), range(2)):
        resumed, unbroken = (torch.load(tmp_path / f"{name}-{rank}{how}.pt") for how in ("", "-unbroken"))
        assert torch.equal(resumed, unbroken)


def _unequal(rank: int, folder: str) -> None:
    _start(rank, folder)
    said = []
    for short in range(2):  # whichever process ends first
        mine = _data()[rank::2][: 3 if rank == short else 6]
        with pytest.raises(processes.ProcessError, match="give every process equally many batches") as raised:
            _scored_in_step(mine, dist.group.WORLD, Path(folder))
        said.append(str(raised.value))
        for name, call in CALLS.items():  # those that add up sums need not have equally many
            if name != "score in step":
                own = Path(folder) / str(rank)
                own.mkdir(exist_ok=True)
                assert call(mine, dist.group.WORLD, own).isfinite().all()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def test_parts_of_rows_need_equally_many_batches_in_every_process(tmp_path: Path) -> None:
    started.processes(_unequal, (str(tmp_path),), 2)
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said[rank].startswith(f"process {rank} has ended its batches, and another has some left")
        assert said[1 - rank].startswith(f"process {rank} has batches left, and another has none")


def _unnamed_group(rank: int, folder: str) -> None:
    _start(rank, folder)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    said: list[str] = []
    logging.getLogger("obc").addHandler(handler := logging.Handler(logging.WARNING))
    handler.emit = lambda record: said.append(record.getMessage())
    wrapped = nn.parallel.DistributedDataParallel(_model())
    sharded = fully_shard(_model(), mesh=mesh)
    for model, how in ((wrapped, "in DistributedDataParallel"), (sharded, "sharded by fully_shard")):
        for process_group, expected in ((dist.group.WORLD, 0), (None, 1), (None, 1)):  # said once
            obc.score(model, _data()[:2], class_loss, process_group=process_group, progress=False)
            obc.collect(model, _data()[:2], statistics="moments", process_group=process_group, progress=False)
            assert len(said) == expected
        assert f"{how}, and no process_group is passed, so process {rank} reads its own batches alone" in said.pop()
    obc.score(_model(), _data()[:2], class_loss, progress=False)
    assert not said
    scorer_of = nn.parallel.DistributedDataParallel(_model())
    obc.JacobianScorer(scorer_of)
    assert len(said) == 1
    del wrapped, scorer_of
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_model_that_processes_train_together_is_not_read_alone_in_silence(tmp_path: Path) -> None:
    started.processes(_unnamed_group, (str(tmp_path),), 2)


@pytest.mark.parametrize("call", [_scored, _collected])
def test_no_process_resumes_from_the_checkpoint_of_another(
    call: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        call(_broken(_data()), None, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(dist, "is_initialized", lambda: True)
        patched.setattr(dist, "get_rank", lambda group=None: 1)
        with pytest.raises(CheckpointError, match="other process=0, this run has 1; delete it, or pass another path"):
            call(iter(_data()), None, tmp_path)
    call(iter(_data()), None, tmp_path)


def _is_killed(rank: int, folder: str) -> None:
    _start(rank, folder)

    def killed() -> Iterator[Batch]:
        yield _data()[0]
        os.kill(os.getpid(), signal.SIGKILL)

    own = Path(folder) / str(rank)
    own.mkdir()
    try:
        _collected(killed() if rank else _data(), dist.group.WORLD, own)
    except processes.ProcessError as error:
        (Path(folder) / "told").write_text(str(error))


def test_one_process_is_killed(tmp_path: Path) -> None:
    context = started.context()
    both = [context.Process(target=_is_killed, args=(rank, str(tmp_path))) for rank in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
        assert not one.is_alive()
    assert both[1].exitcode == -signal.SIGKILL
    assert "if one of them has ended, its output says why" in (tmp_path / "told").read_text()
