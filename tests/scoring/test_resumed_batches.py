"""A run that resumes goes on with the batches that it began with: shuffled ones come again, others are refused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import class_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import obc
from obc.scoring import CheckpointError

IMAGES = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(IMAGES, torch.arange(24) % 5)


class BrokenOffError(Exception):
    pass


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x).relu()

    return nn.Sequential(nn.Sequential(*(Block() for _ in range(3))), nn.Dropout(0.2), nn.Linear(6, 5))


def _scored(batches: Iterable[Any], path: Path) -> list[Tensor]:
    scores = obc.score(_model(), batches, class_loss, checkpoint=path, every=1, keep_rows=True, progress=False)
    return [part.out_channels for part in scores.rows.values()]


def _collected(batches: Iterable[Any], path: Path) -> list[Tensor]:
    found = obc.collect(
        _model(), batches, class_loss, statistics=["gram", "rows"], checkpoint=path, every=1, progress=False
    )
    return [gram.total for gram in found.gram.values()] + [rows.out_channels for rows in found.rows.values()]


def _by_block(batches: Iterable[Any], path: Path) -> list[Tensor]:
    found = obc.collect(_model(), batches, statistics="gram", by_block=True, checkpoint=path, progress=False)
    return [gram.total for gram in found.gram.values()]


def _recovered(batches: Iterable[Any], path: Path) -> list[Tensor]:
    """Two and a half passes of training with dropout."""
    model = _model(1)
    distillation = obc.Distillation(forward_fn=lambda network, batch: network(batch[0]))
    obc.recover(
        model,
        _model(),
        batches,
        steps=15,
        lr=0.01,
        every=1,
        distillation=distillation,
        checkpoint=path,
        progress=False,
    )
    return list(model.state_dict().values())


class _Breaking(DataLoader[Any]):
    """A loader that fails after some batches, however many passes they take; then it is another process's."""

    def __init__(self, calls: int | None, **options: Any) -> None:
        super().__init__(DATA, batch_size=4, **options)
        object.__setattr__(self, "calls", calls)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if self.calls == 0:
                raise BrokenOffError
            if self.calls is not None:
                object.__setattr__(self, "calls", self.calls - 1)
            yield batch


RUNS: dict[str, tuple[Callable[[Iterable[Any], Path], list[Tensor]], int]] = {
    "score": (_scored, 4),
    "collect": (_collected, 4),
    "recover in the first pass": (_recovered, 4),
    "recover in the second pass": (_recovered, 8),
    "recover between two passes": (_recovered, 6),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_shuffling_loader_gives_the_order_of_the_run_before(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call, calls = RUNS[name]
    torch.manual_seed(7)
    whole = call(_Breaking(None, shuffle=True), tmp_path / "whole")
    torch.manual_seed(7)
    with pytest.raises(BrokenOffError):
        call(_Breaking(calls, shuffle=True), tmp_path / "cut")
    torch.manual_seed(99)  # another process, which nobody seeded
    with caplog.at_level(logging.WARNING, "obc"):
        resumed = call(_Breaking(None, shuffle=True), tmp_path / "cut")
    assert all(map(torch.equal, resumed, whole))
    assert "another than the checkpoint's" not in caplog.text


def _batches() -> list[Any]:
    return list(DataLoader(DATA, batch_size=4))


def _broken_off(batches: list[Any], calls: int) -> Iterator[Any]:
    yield from batches[:calls]
    raise BrokenOffError


class _List(list[Any]):
    """Fails at one index, once a pass got there."""

    def __init__(self, batches: list[Any], bad: int) -> None:
        super().__init__(batches)
        self.bad = bad

    def __getitem__(self, index: Any) -> Any:
        if index == self.bad:
            raise BrokenOffError
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


OTHERS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "another order": lambda batches: batches[::-1],
    "other inputs": lambda batches: [(inputs + 1, labels) for inputs, labels in batches],
    "other labels": lambda batches: [(inputs, labels.flip(0)) for inputs, labels in batches],
    "another size": lambda batches: [(inputs[:3], labels[:3]) for inputs, labels in batches],
}


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ["score", "collect", "recover in the first pass"])
def test_other_batches_are_refused(name: str, other: str, tmp_path: Path) -> None:
    call, _ = RUNS[name]
    with pytest.raises(BrokenOffError):
        call(_List(_batches(), 3), tmp_path / "cut")
    kept = (tmp_path / "cut").read_bytes()
    changed = OTHERS[other](_batches())
    with pytest.raises((CheckpointError, ValueError), match=r"batch 2 is another.*; pass the same batches"):
        call(changed, tmp_path / "cut")
    assert (tmp_path / "cut").read_bytes() == kept
    resumed, whole = call(copy.deepcopy(_batches()), tmp_path / "cut"), call(_batches(), tmp_path / "whole")
    if "recover" not in name:  # whose dropout draws other numbers
        assert all(map(torch.equal, resumed, whole))


class _Loader:
    """Batches that can't be indexed, as of a loader that changes them at random."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize("name", ["score", "collect", "recover in the first pass"])
def test_other_batches_of_a_loader_are_warned_of(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    call, _ = RUNS[name]
    with pytest.raises(BrokenOffError):
        call(_Loader(_List(_batches(), 3)), tmp_path / "cut")
    with caplog.at_level(logging.WARNING, "obc"):
        call(_Loader(_batches()[::-1]), tmp_path / "cut")
    assert "batch 2 is another than the checkpoint's" in caplog.text


def test_other_batches_by_block_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obc.statistics.checkpoint import StatisticsCheckpoint

    save, saved = StatisticsCheckpoint.save, []

    def saves_once(self: StatisticsCheckpoint, progress: Any) -> None:
        if saved:
            raise BrokenOffError
        saved.append(save(self, progress))

    with monkeypatch.context() as patched:
        patched.setattr(StatisticsCheckpoint, "save", saves_once)
        with pytest.raises(BrokenOffError):
            _by_block(_batches(), tmp_path / "cut")
    with pytest.raises(CheckpointError, match="batch 5 is another than the checkpoint's"):
        _by_block(OTHERS["other inputs"](_batches()), tmp_path / "cut")
    resumed, whole = _by_block(_batches(), tmp_path / "cut"), _by_block(_batches(), tmp_path / "whole")
    assert all(map(torch.equal, resumed, whole))
