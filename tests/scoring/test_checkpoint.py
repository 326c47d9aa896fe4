"""obc.score(..., checkpoint=...): killed at any moment and started again, it gives the bits of an unbroken run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import nasty
import pytest
import started
import torch
from models import Case
from parity import assert_equal
from test_kept_rows import assert_rows_equal
from torch import Tensor, nn

import obc
from obc.scoring import CheckpointError, label_free_loss
from obc.tensor_file import save_tensors

HERE = Path(__file__).parents[1]
VARIANTS = [("batch", "device", "dropped"), ("sample", "file", "dropped"), ("batch", "host", "label-free")]


# --- killed --------------------------------------------------------------------------------------------------------


def assert_survives(kills: int, variant: tuple[str, ...], folder: Path) -> None:
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "killed.py"), str(folder), str(kills), *variant],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said.count("killed: killed") == kills, done.stdout + done.stderr
    assert said.count("unbroken: exit 0") == said.count("killed: exit 0") == 1, done.stdout + done.stderr
    assert any("resuming from" in line for line in said), done.stdout
    unbroken, killed = (obc.Scores.load(folder / name / "scores.safetensors") for name in ("unbroken", "killed"))
    assert_equal(unbroken, killed)
    assert_rows_equal(unbroken, killed)
    left = {path.name for path in (folder / "killed").iterdir()}
    assert left <= {"scores.safetensors", "looked_up.json", "kept.rows"}
    looked_up = json.loads((folder / "killed" / "looked_up.json").read_text())
    whole = json.loads((folder / "unbroken" / "looked_up.json").read_text())
    if variant[1] == "host":  # a generator: those that are done are passed over
        assert looked_up == whole
    else:
        assert looked_up == whole[len(whole) - len(looked_up) :]
        assert len(looked_up) < len(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_three_kills(variant: tuple[str, ...], tmp_path: Path) -> None:
    assert_survives(3, variant, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_many_kills(variant: tuple[str, ...], tmp_path: Path) -> None:
    assert_survives(25, variant, tmp_path)


# --- broken off by an exception ------------------------------------------------------------------------------------


class BrokenOffError(Exception):
    pass


def breaking(loss: Callable[[nn.Module, Any], Tensor], calls: int) -> Callable[[nn.Module, Any], Tensor]:
    left = iter(range(calls))

    def called(model: nn.Module, batch: Any) -> Tensor:
        if next(left, None) is None:
            raise BrokenOffError
        return loss(model, batch)

    return called


def broken_off(case: Case, path: Path, calls: int = 5, **options: Any) -> None:
    loss = breaking(case.loss_fn(options.get("rows", "batch")), calls)
    with pytest.raises(BrokenOffError):
        obc.score(case.model, case.batches * 3, loss, **{"checkpoint": path, "every": 2} | options)


@pytest.mark.parametrize(
    "options",
    [{}, {"rows": "sample"}, {"micro_batch": 3}, {"keep_rows": True}, {"check": False}, {"loss_scale": 8.0}],
    ids=str,
)
@pytest.mark.parametrize("family", ["residual-cnn", "functional-weight"])
def test_the_rest_gives_the_same_bits(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Sample rows of functional-weight must come one at a time: that is known after the checkpoint, too."""
    case = models.residual_cnn() if family == "residual-cnn" else nasty.NASTY[family]()
    loss = case.loss_fn(options.get("rows", "batch"))
    # Batches are not always one call: parts of 3 of 4 samples are two, samples one at a time five.
    calls = 8 if "micro_batch" in options else 20 if family == "functional-weight" and "rows" in options else 5
    broken_off(case, tmp_path / "checkpoint", calls=calls, **options)
    assert (tmp_path / "checkpoint").exists()
    resumed = obc.score(case.model, case.batches * 3, loss, checkpoint=tmp_path / "checkpoint", **options)
    unbroken = obc.score(case.model, case.batches * 3, loss, **options)
    assert_equal(resumed, unbroken)
    assert_rows_equal(resumed, unbroken)
    assert resumed.coverage == unbroken.coverage
    assert resumed.num_rows == unbroken.num_rows
    assert list(tmp_path.iterdir()) == []


def test_where_it_goes_on_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = models.residual_cnn()
    broken_off(case, tmp_path / "checkpoint")
    obc.score(case.model, case.batches * 3, case.loss, checkpoint=tmp_path / "checkpoint")
    assert f"resuming from {tmp_path / 'checkpoint'}: 4 batches of 9 are done" in caplog.text


def test_a_row_left_out_before_is_still_named(tmp_path: Path) -> None:
    case = models.residual_cnn()
    case.batches[1] = (case.batches[1][0] * float("nan"), case.batches[1][1])
    with pytest.warns(UserWarning, match="not finite"):
        broken_off(case, tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match="row [47] is not finite"):
        scores = obc.score(case.model, case.batches * 3, case.loss, checkpoint=tmp_path / "checkpoint")
    assert scores.num_rows == 6
    assert "row 1 is not finite" in scores.metadata["left_out"]
    assert "row 7 is not finite" in scores.metadata["left_out"]


def test_seconds_of_the_run_before_count(tmp_path: Path) -> None:
    case = models.residual_cnn()
    broken_off(case, tmp_path / "checkpoint", calls=8)
    scores = obc.score(case.model, case.batches * 3, case.loss, checkpoint=tmp_path / "checkpoint")
    assert scores.report is not None
    assert scores.report.rows == 9


def test_no_pickle_is_written(tmp_path: Path) -> None:
    from safetensors import safe_open

    case = models.residual_cnn()
    broken_off(case, tmp_path / "checkpoint", keep_rows=True)
    with safe_open(str(tmp_path / "checkpoint"), framework="pt") as file:
        assert file.metadata()["format"] == "obc.checkpoint/1"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "checkpoint.rows"}


# --- refused -------------------------------------------------------------------------------------------------------


def other_weights(case: Case) -> Case:
    with torch.no_grad():
        case.model.conv1.weight[3, 2, 1, 1] += 1e-3
    return case


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"rows": "sample"}, "rows='batch', this run has 'sample'"),
        ({"rows": "sample"}, {"rows": "batch"}, "rows='sample', this run has 'batch'"),
        ({}, {"keep_rows": True}, "keep_rows=False, this run has True"),
        ({"keep_rows": True}, {}, "keep_rows=True, this run has False"),
        ({}, {"micro_batch": 2}, "micro_batch=None, this run has 2"),
        ({}, {"fold_groups": True}, "fold_groups=False, this run has True"),
        ({}, {"fallback": "skip"}, "fallback='weight_grad', this run has 'skip'"),
        ({"modules": ["conv1"]}, {}, "it has .'conv1', 16, 8."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_checkpoint_of_other_options(
    before: dict[str, Any], after: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = models.residual_cnn()
    broken_off(case, tmp_path / "checkpoint", **before)
    with pytest.raises(CheckpointError, match=message):
        obc.score(
            case.model,
            case.batches * 3,
            case.loss_fn(after.get("rows", "batch")),
            checkpoint=tmp_path / "checkpoint",
            **after,
        )
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (models.norms, "model='ResidualCNN', this run has 'Norms'"),
        (lambda: other_weights(models.residual_cnn()), "other weights"),
    ],
    ids=["model", "weights"],
)
def test_a_checkpoint_of_another_model(other: Callable[[], Case], message: str, tmp_path: Path) -> None:
    broken_off(models.residual_cnn(), tmp_path / "checkpoint")
    case = other()
    with pytest.raises(CheckpointError, match=message):
        obc.score(case.model, case.batches * 3, case.loss, checkpoint=tmp_path / "checkpoint")


def test_a_checkpoint_of_another_number_of_batches(tmp_path: Path) -> None:
    case = models.residual_cnn()
    broken_off(case, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="batches=9, this run has 3"):
        obc.score(case.model, case.batches, case.loss, checkpoint=tmp_path / "checkpoint")


def test_a_generator_with_fewer_batches_than_are_done(tmp_path: Path) -> None:
    case = models.residual_cnn()

    def generated(count: int) -> Iterator[Any]:
        yield from (case.batches * 3)[:count]

    with pytest.raises(BrokenOffError):
        obc.score(case.model, generated(9), breaking(case.loss, 7), checkpoint=tmp_path / "checkpoint", every=2)
    with pytest.raises(CheckpointError, match="6 batches are done, but there are only 5"):
        obc.score(case.model, generated(5), case.loss, checkpoint=tmp_path / "checkpoint")


def test_a_checkpoint_of_another_seed(tmp_path: Path) -> None:
    case = models.residual_cnn()
    loss = label_free_loss(seed=1)
    broken = breaking(loss, 5)
    broken.identity = loss.identity  # type: ignore[attr-defined]
    with pytest.raises(BrokenOffError):
        obc.score(case.model, case.batches * 3, broken, checkpoint=tmp_path / "checkpoint", every=2)
    with pytest.raises(CheckpointError, match="label_free_seed=1, this run has 2"):
        obc.score(case.model, case.batches * 3, label_free_loss(seed=2), checkpoint=tmp_path / "checkpoint")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", bytes(200)], ids=["empty", "text", "zeros"])
def test_a_damaged_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(content)
    case = models.residual_cnn()
    with pytest.raises(CheckpointError, match="not a checkpoint, or is damaged"):
        obc.score(case.model, case.batches, case.loss, checkpoint=tmp_path / "checkpoint")


def test_scores_are_no_checkpoint(tmp_path: Path) -> None:
    case = models.residual_cnn()
    obc.score(case.model, case.batches, case.loss).save(tmp_path / "scores")
    with pytest.raises(CheckpointError, match=r"format .obc\.Scores/3"):
        obc.score(case.model, case.batches, case.loss, checkpoint=tmp_path / "scores")
    assert (tmp_path / "scores").exists()


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_checkpoint_whose_rows_are_gone(damage: str, tmp_path: Path) -> None:
    case = models.residual_cnn()
    broken_off(case, tmp_path / "checkpoint", keep_rows=True)
    rows = tmp_path / "checkpoint.rows"
    if damage == "gone":
        rows.unlink()
    else:
        os.truncate(rows, rows.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="missing" if damage == "gone" else "3 rows, but 4"):
        obc.score(case.model, case.batches * 3, case.loss, keep_rows=True, checkpoint=tmp_path / "checkpoint")


def _go_on_together(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    case, path = models.residual_cnn(), Path(folder) / f"checkpoint{rank}"
    group = torch.distributed.group.WORLD
    broken_off(case, path, calls=5 if rank == 0 else 7)
    with pytest.raises(CheckpointError, match=r"are at different rows, \[4, 6\] batches are done"):
        obc.score(case.model, case.batches * 3, case.loss, checkpoint=path, process_group=group)
    path.unlink()
    broken_off(case, path, calls=5, process_group=group)
    resumed = obc.score(case.model, case.batches * 3, case.loss, checkpoint=path, process_group=group)
    assert_equal(resumed, obc.score(case.model, case.batches * 3, case.loss, process_group=group))
    (Path(folder) / f"done{rank}").touch()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_that_read_rows_together_go_on_together(tmp_path: Path) -> None:
    started.processes(_go_on_together, (str(tmp_path / "store"), str(tmp_path)), 2)
    assert {path.name for path in tmp_path.iterdir()} >= {"done0", "done1"}


@pytest.mark.parametrize("every", [0, -3])
def test_checkpoints_every_so_many_batches(every: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"every must be a positive integer, got {every}"):
        obc.score(nn.Linear(3, 2), [], lambda model, batch: batch, checkpoint=tmp_path / "checkpoint", every=every)


def _resumed(path: Path) -> None:
    obc.score(nn.Linear(3, 2), [torch.zeros(2, 3)], lambda model, batch: model(batch).sum(), checkpoint=path)


@pytest.mark.parametrize(
    ("kind", "read", "message"),
    [
        ("checkpoint", _resumed, "expected 'obc.checkpoint/1'; delete it"),
        ("Scores", obc.Scores.load, "expected 'obc.Scores/1' or"),
        ("Statistics", obc.Statistics.load, "expected 'obc.Statistics/1'"),
    ],
)
def test_files_of_another_version_say_so(
    kind: str, read: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    form = f"obc.{kind}/{99}"
    save_tensors(tmp_path / "file", {}, {"format": form})
    match = re.escape(f"of another version of obc: format {form!r}")
    with pytest.raises((ValueError, CheckpointError), match=match) as caught:
        read(tmp_path / "file")
    assert message in str(caught.value)
