"""keep_rows=True: rows are the oracle's, their squares add up to the scores, wherever they are kept."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import nasty
import oracle
import pytest
import torch
from parity import TOLERANCE, assert_equal, error
from torch import Tensor, nn

import obc
from obc.scoring import ScoringError
from obc.scoring.reading.flat_row import EndedRow
from obc.scoring.results.row_file import RowFile

FAMILIES = {
    "residual-cnn": models.residual_cnn,
    "norms": models.norms,
    "tied": models.tied,
    "linears": models.linears,
    "padded-embedding": models.padded_embedding,
    "functional-weight": nasty.NASTY["functional-weight"],
    "llama": models.llama,
}
PLACES = ["device", "host", "file"]


def place(where: str, tmp_path: Path) -> Any:
    return tmp_path / "kept.rows" if where == "file" else where


def assert_rows_equal(first: obc.Scores, second: obc.Scores) -> None:
    assert list(first.rows) == list(second.rows)
    for name in first.rows:
        for side in ("out_channels", "in_channels"):
            one, other = getattr(first.rows[name], side), getattr(second.rows[name], side)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), f"{name}.{side} differs"


def assert_consistent(scores: obc.Scores) -> None:
    """Squares of the rows add up to the scores. A float32 sum of N squares is off by at most N / 2 ulps."""
    assert set(scores.rows) == set(scores)
    ulps = scores.num_rows * torch.finfo(torch.float32).eps
    for name, channels in scores.items():
        for side in ("out_channels", "in_channels"):
            rows, values = getattr(scores.rows[name], side), getattr(channels, side)
            assert (rows is None) == (values is None)
            if rows is None:
                continue
            assert rows.dtype == torch.float32
            assert rows.shape == (scores.num_rows, values.numel())
            total = rows.double().square().sum(0)
            assert bool(((total - values.double()).abs() <= ulps * total).all()), f"{name}.{side}"


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", ["residual-cnn", "tied", "llama"])
def test_squares_of_rows_are_the_scores(family: str, rows: str, where: str, tmp_path: Path) -> None:
    case = FAMILIES[family]()
    scores = obc.score(
        case.model, case.batches, case.loss_fn(rows), rows=rows, keep_rows=True, rows_to=place(where, tmp_path)
    )
    assert scores.num_rows == (3 if rows == "batch" else 12)
    assert_consistent(scores)


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "tied"])
def test_rows_match_the_oracle(family: str, rows: str) -> None:
    """The checking row and modules read from their weight's gradient included."""
    case = FAMILIES[family]()
    kept = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, keep_rows=True).rows
    for name, (out, in_) in oracle.rows(case.oracle_model, case.batches, case.loss_fn(rows), rows=rows).items():
        assert error(kept[name].out_channels, out) <= TOLERANCE, name
        assert error(kept[name].in_channels, in_) <= TOLERANCE, name


def test_scores_are_the_same_with_and_without_rows() -> None:
    case = models.residual_cnn()
    assert_equal(
        obc.score(case.model, case.batches, case.loss), obc.score(case.model, case.batches, case.loss, keep_rows=True)
    )


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_batch_that_is_left_out_leaves_no_trace(bad: int, where: str, tmp_path: Path) -> None:
    case = models.residual_cnn()
    batches = list(case.batches)
    batches[bad] = (batches[bad][0] * float("nan"), batches[bad][1])
    with pytest.warns(UserWarning, match=f"row {bad} is not finite"):
        scores = obc.score(case.model, batches, case.loss, keep_rows=True, rows_to=place(where, tmp_path))
    kept = [batch for index, batch in enumerate(case.batches) if index != bad]
    assert scores.num_rows == 2
    assert_consistent(scores)
    assert_rows_equal(scores, obc.score(case.model, kept, case.loss, keep_rows=True))


@pytest.mark.parametrize("where", PLACES)
def test_samples_that_are_left_out_leave_no_trace(where: str, tmp_path: Path) -> None:
    case = models.residual_cnn()
    x, labels = (part.clone() for part in case.batches[1])
    x[0], x[2] = float("nan"), float("inf")
    batches = [case.batches[0], (x, labels), case.batches[2]]
    with pytest.warns(UserWarning, match="not finite"):
        scores = obc.score(
            case.model, batches, case.losses, rows="sample", keep_rows=True, rows_to=place(where, tmp_path)
        )
    assert_consistent(scores)
    finite = torch.tensor([0, 1, 2, 3, 5, 7, 8, 9, 10, 11])
    everything = obc.score(case.model, case.batches, case.losses, rows="sample", keep_rows=True)
    assert torch.equal(scores.rows["conv1"].out_channels, everything.rows["conv1"].out_channels[finite])


def test_a_row_that_is_repeated_is_kept_once() -> None:
    case = nasty.late_in_place("output", False, True, False)
    scores = obc.score(case.model, case.batches, case.loss, keep_rows=True)
    assert scores.num_rows == len(case.batches)
    assert_consistent(scores)


def test_rows_are_divided_by_the_loss_scale() -> None:
    case = models.residual_cnn()
    plain = obc.score(case.model, case.batches, case.loss, keep_rows=True)
    scaled = obc.score(case.model, case.batches, case.loss, keep_rows=True, loss_scale=2.0**10)
    assert_rows_equal(plain, scaled)  # a power of two changes no bit
    assert_equal(plain, scaled)


class TwoPrecisions(nn.Module):
    """Rows lie in two vectors, one of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).double())


@pytest.mark.parametrize("where", PLACES)
def test_rows_of_two_dtypes(where: str, tmp_path: Path) -> None:
    model = models.seeded(TwoPrecisions)
    batches = [x for x, _ in models.floats(6)]
    scores = obc.score(model, batches, lambda m, x: m(x).sin().mean(), keep_rows=True, rows_to=place(where, tmp_path))
    assert_consistent(scores)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_many_rows_from_a_generator(where: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says how many rows come: the store grows, and spills several times."""
    monkeypatch.setattr("obc.scoring.results.row_store._SPILLED_BYTES", 4000)
    case = models.residual_cnn()
    batches = case.batches * 15

    def generated() -> Iterator[Any]:
        yield from batches

    scores = obc.score(
        case.model, generated(), case.loss_fn(rows), rows=rows, keep_rows=True, rows_to=place(where, tmp_path)
    )
    assert scores.num_rows == (45 if rows == "batch" else 180)
    assert_consistent(scores)
    assert_rows_equal(scores, obc.score(case.model, batches, case.loss_fn(rows), rows=rows, keep_rows=True))


def test_bytes_are_stated_beforehand(caplog: pytest.LogCaptureFixture) -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    sides = [side for rows in oracle.rows(case.model, case.batches[:1], case.loss).values() for side in rows]
    channels = sum(side.shape[1] for side in sides if side is not None)
    assert scorer.rows_bytes(50) == 50 * 4 * channels
    with caplog.at_level("INFO", logger="obc"):
        obc.score(case.model, case.batches, case.loss, keep_rows=True)
    assert f"keeping 3 rows: {3 * 4 * channels} bytes on cpu" in caplog.text


def test_memory_is_reserved_exactly_where_the_number_of_batches_is_known() -> None:
    case = models.residual_cnn()
    scores = obc.score(case.model, case.batches * 7, case.loss, keep_rows=True)
    (matrix,) = scores.rows.matrices
    assert matrix.untyped_storage().nbytes() == 22 * 4 * matrix.shape[1]  # and one row for what is left out


def test_rows_replayed_without_room_are_counted_and_refused() -> None:
    """A captured CUDA graph replays what a row does on the device; the host's part, which makes room, is not run."""
    scorer = obc.JacobianScorer(nn.Linear(3, 2), keep_rows=True)
    store = scorer.row_store
    assert store is not None
    store.reserve(2)
    (flat,) = store.flats
    rows = [EndedRow([torch.full((flat.size, 1), value)], torch.tensor([True])) for value in (1.0, 2.0)]
    for row in rows:
        store.append(row)
    assert store.matrices()[0][:, 0].tolist() == [1.0, 2.0]
    store.append(rows[0])
    with pytest.raises(ScoringError, match=r"3 rows were replayed, but 2 fit.*reserve_rows\(3\)"):
        store.matrices()


def test_reserving_without_keeping_rows_is_refused() -> None:
    with pytest.raises(ScoringError, match="keep_rows=True"):
        obc.JacobianScorer(nn.Linear(3, 2)).reserve_rows(5)


# --- what becomes of them ------------------------------------------------------------------------------------------


def test_rows_do_not_change_with_later_rows() -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model, keep_rows=True)
    with scorer:
        for index, batch in enumerate(case.batches * 10):
            with scorer.row():
                case.loss(case.model, batch).backward()
            if index == 1:
                first = scorer.scores()
                copied = first.rows["conv1"].out_channels.clone()
    assert first.num_rows == 2
    assert torch.equal(first.rows["conv1"].out_channels, copied)
    assert torch.equal(scorer.scores().rows["conv1"].out_channels[:2], copied)


@pytest.mark.parametrize("where", PLACES)
def test_a_later_run_to_the_same_place_leaves_rows_alone(where: str, tmp_path: Path) -> None:
    case = models.residual_cnn()
    first = obc.score(case.model, case.batches, case.loss, keep_rows=True, rows_to=place(where, tmp_path))
    expected = copy.deepcopy(first.rows["conv1"].out_channels)
    obc.score(case.model, case.batches[1:], case.loss, keep_rows=True, rows_to=place(where, tmp_path))
    assert torch.equal(first.rows["conv1"].out_channels, expected)


def test_saved_rows_are_loaded(tmp_path: Path) -> None:
    case = models.tied()
    scores = obc.score(case.model, case.batches, case.loss, keep_rows=True)
    scores.save(tmp_path / "scores.safetensors")
    loaded = obc.Scores.load(tmp_path / "scores.safetensors", case.model)
    assert_equal(scores, loaded)
    assert_rows_equal(scores, loaded)
    assert loaded.report == scores.report


def test_pickled_rows() -> None:
    case = models.residual_cnn()
    scores = obc.score(case.model, case.batches, case.loss, keep_rows=True)
    assert_rows_equal(scores, pickle.loads(pickle.dumps(scores)))


def test_scores_without_rows_say_how_to_keep_them() -> None:
    case = models.residual_cnn()
    scores = obc.score(case.model, case.batches, case.loss)
    assert len(scores.rows) == 0
    assert "conv1" not in scores.rows
    with pytest.raises(KeyError, match="keep_rows=True"):
        scores.rows["conv1"]
    with pytest.raises(KeyError, match="not among the scored"):
        obc.score(case.model, case.batches, case.loss, keep_rows=True).rows["nonsense"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_state_carries_the_rows(rows: str, where: str, tmp_path: Path) -> None:
    case = models.residual_cnn()

    def scored(scorer: obc.JacobianScorer, batches: list[Any]) -> obc.JacobianScorer:
        with scorer:
            for batch in batches:
                with scorer.row():
                    losses = case.losses(case.model, batch)
                    (losses.sum() if rows == "sample" else losses.mean()).backward()
        return scorer

    def new(name: str) -> obc.JacobianScorer:
        to = tmp_path / name if where == "file" else where
        return obc.JacobianScorer(case.model, rows=rows, keep_rows=True, rows_to=to)

    unbroken = scored(new("a"), case.batches * 3)
    state = scored(new("b"), case.batches).state_dict()
    torch.save(state, tmp_path / "state")
    resumed = new("c")
    resumed.load_state_dict(torch.load(tmp_path / "state"))
    del state
    gc.collect()
    assert_rows_equal(scored(resumed, case.batches * 2).scores(), unbroken.scores())


@pytest.mark.parametrize("kept", [True, False])
def test_a_state_with_rows_is_for_a_scorer_with_rows(kept: bool) -> None:
    case = models.residual_cnn()
    state = obc.JacobianScorer(case.model, keep_rows=kept).state_dict()
    with pytest.raises(ValueError, match=f"keep_rows={not kept}"):
        obc.JacobianScorer(case.model, keep_rows=not kept).load_state_dict(state)


# --- files of rows -------------------------------------------------------------------------------------------------


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("chapter one")
    with pytest.raises(FileExistsError, match=r"thesis.tex is not a file of rows"):
        obc.JacobianScorer(nn.Linear(3, 2), keep_rows=True, rows_to=tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "chapter one"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        obc.JacobianScorer(nn.Linear(3, 2), keep_rows=True, rows_to=tmp_path / "none" / "kept.rows")


def test_bytes_behind_the_last_row_are_of_no_account(tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(4, 3)
    RowFile.create(tmp_path / "rows", 3).append([rows])
    file = RowFile.open(tmp_path / "rows", 3, 2)
    assert torch.equal(file.matrix(), rows[:2])
    file.append([rows[3:, :1], rows[3:, 1:]])
    assert torch.equal(file.matrix(), rows[[0, 1, 3]])


@pytest.mark.parametrize(
    ("width", "rows", "message"), [(4, 2, "of 4 channels"), (3, 9, "holds 4 rows, but 9"), (3, 1, "missing")]
)
def test_a_file_of_other_rows(width: int, rows: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    if message != "missing":
        RowFile.create(path, 3).append([torch.zeros(4, 3)])
    with pytest.raises(ValueError, match=message):
        RowFile.open(path, width, rows)
