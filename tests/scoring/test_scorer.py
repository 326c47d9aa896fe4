"""The scorer on plain models: parity with the oracle, kinds of rows, loops, resuming, restoring, progress."""

from __future__ import annotations

import copy
import functools
import gc
import io
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
from models import OWN, TRANSFORMERS, Case
from nasty import NASTY
from parity import TOLERANCE, assert_equal, assert_parity, errors, expected_scores, score_in_a_loop
from snapshot import Snapshot, unusual
from torch import Tensor, nn

import obc

FAMILIES: dict[str, Callable[[], Case]] = {**OWN, **TRANSFORMERS, **NASTY}
# Their layers have one parameter with two uses: test_tied_weights_add_up holds what they must give.
TIED = {"tied"}


@functools.cache
def measured(family: str, rows: str) -> tuple[obc.Scores, oracle.Rows]:
    """The float32 scores of a family and the oracle's."""
    case = FAMILIES[family]()
    return obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows), expected_scores(case, rows)


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", [name for name in OWN if name not in TIED])
def test_scores_match_the_oracle(family: str, rows: str) -> None:
    scores, expected = measured(family, rows)
    assert_parity(scores, expected)
    assert scores.num_rows == models.BATCHES * (models.BATCH if rows == "sample" else 1)


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_largest_error_over_all_models(rows: str) -> None:
    """Prints the issue's figure: the largest relative error over every model of the tests (``pytest -s``)."""
    worst = {}
    for family in FAMILIES:
        if family not in TIED:
            found = errors(*measured(family, rows))
            name = max(found, key=found.__getitem__)
            worst[family] = (found[name], name)
    family = max(worst, key=lambda key: worst[key][0])
    figure, name = worst[family]
    print(f"\nrows={rows}: largest relative error of {len(worst)} models {figure:.1e} ({family}, {name})")
    assert figure <= TOLERANCE


def test_conv_and_linear_layers_are_read_by_gates_and_norms_by_their_gradients() -> None:
    scores, _ = measured("residual-cnn", "batch")
    how = {name: str(value) for name, value in scores.coverage.items()}
    for name in ("stem", "conv1", "conv2", "shortcut", "head"):
        assert how[name].startswith("gate"), (name, how[name])
    for name in ("norm", "norm1", "norm2"):
        assert how[name].startswith("norm gradient"), (name, how[name])


def test_sample_rows_read_norms_by_gates() -> None:
    scores, _ = measured("norms", "sample")
    assert all(str(how).startswith("gate") for how in scores.coverage.values()), dict(scores.coverage)


def test_sample_rows_are_the_scores_of_batches_of_one() -> None:
    case = models.residual_cnn()
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in case.batches for i in range(models.BATCH)]
    one_by_one = obc.score(case.model, singles, case.loss)
    assert_parity(one_by_one, expected_scores(case, "sample"))


def test_sample_rows_with_a_last_batch_of_another_size() -> None:
    case = models.residual_cnn()
    x, y = case.batches[-1]
    case.batches = [*case.batches, (x[:1], y[:1]), (x[:3], y[:3])]
    scores = obc.score(case.model, case.batches, case.losses, rows="sample")
    assert_parity(scores, expected_scores(case, "sample"))
    assert scores.num_rows == models.BATCHES * models.BATCH + 4


def test_own_loop_gives_what_score_gives() -> None:
    case = models.residual_cnn()
    assert_equal(score_in_a_loop(obc.JacobianScorer(case.model), case), measured("residual-cnn", "batch")[0])


def test_without_the_checking_row() -> None:
    case = models.residual_cnn()
    scores = obc.score(case.model, case.batches, case.loss, check=False)
    assert_parity(scores, expected_scores(case))


def test_sample_rows_in_an_own_loop() -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model, rows="sample")
    with scorer:
        for batch in case.batches:
            with scorer.row():
                case.losses(case.model, batch).sum().backward()
    assert_parity(scorer.scores(), expected_scores(case, "sample"))


@pytest.mark.parametrize("family", ["residual-cnn", "norms", "padded-embedding", "functional-weight"])
def test_micro_batches_inside_a_row_add_up(family: str) -> None:
    """Three backwards in one row are one row of the sum of their losses."""
    case = FAMILIES[family]()
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for turn in range(2):
            with scorer.row():
                for batch in case.batches:
                    (case.loss(case.model, batch) * (turn + 1) / len(case.batches)).backward()

    def whole(model: nn.Module, turn: int) -> Tensor:
        return torch.stack([case.loss(model, batch) for batch in case.batches]).mean() * (turn + 1)

    assert_parity(scorer.scores(), oracle.scores(case.oracle_model, [0, 1], whole))
    assert scorer.scores().num_rows == 2


def test_loss_scale_is_divided_out() -> None:
    case = models.residual_cnn()
    scores = score_in_a_loop(obc.JacobianScorer(case.model), case, loss_scale=2.0**14)
    assert_parity(scores, expected_scores(case))


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_subset_of_modules(rows: str) -> None:
    case = models.residual_cnn()
    by_name = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, modules=["conv2", "norm1"])
    by_rule = obc.score(
        case.model,
        case.batches,
        case.loss_fn(rows),
        rows=rows,
        modules=lambda name, module: name in ("conv2", "norm1"),
    )
    assert sorted(by_name) == sorted(by_rule) == ["conv2", "norm1"]
    assert_parity(by_name, expected_scores(case, rows), ["conv2", "norm1"])
    assert_equal(by_name, by_rule)


def test_rows_of_a_generator_are_taken_one_at_a_time() -> None:
    """batches may be any iterable, read once and never ahead."""
    case = models.residual_cnn()
    taken: list[int] = []

    def stream() -> Any:
        for index, batch in enumerate(case.batches):
            taken.append(index)
            yield batch

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert taken == list(range(taken[-1] + 1))
        return case.loss(model, batch)

    assert_equal(obc.score(case.model, stream(), loss), measured("residual-cnn", "batch")[0])
    assert taken == [0, 1, 2]


def test_float64_models_are_scored_in_float64() -> None:
    case = models.residual_cnn()
    scores = obc.score(copy.deepcopy(case.model).double(), case.batches, case.loss)
    assert scores["conv1"].out_channels.dtype == torch.float32
    assert_parity(scores, expected_scores(case), tolerance=1e-6)  # float32 keeps seven digits of the result


# --- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["residual-cnn", "functional-weight", "padded-embedding"])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_resumed_scores_have_the_same_bits(family: str, cut: int) -> None:
    whole = FAMILIES[family]()
    expected = score_in_a_loop(obc.JacobianScorer(whole.model), whole)

    first, second = FAMILIES[family](), FAMILIES[family]()
    scorer = obc.JacobianScorer(first.model)
    with scorer:
        for batch in first.batches[:cut]:
            with scorer.row():
                first.loss(first.model, batch).backward()
    file = io.BytesIO()
    torch.save(scorer.state_dict(), file)
    file.seek(0)

    resumed = obc.JacobianScorer(second.model)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    scores = score_in_a_loop(resumed, second, second.batches[cut:])
    assert scores.num_rows == expected.num_rows
    assert_equal(scores, expected)
    assert dict(scores.coverage) == dict(expected.coverage)


def test_resuming_sample_rows() -> None:
    case = models.norms()
    expected = obc.score(case.model, case.batches, case.losses, rows="sample")
    scorer = obc.JacobianScorer(case.model, rows="sample")
    for batch in case.batches:  # left and entered again, through a state, for every row
        state = scorer.state_dict()
        scorer = obc.JacobianScorer(case.model, rows="sample")
        scorer.load_state_dict(state)
        with scorer, scorer.row():
            case.losses(case.model, batch).sum().backward()
    assert_equal(scorer.scores(), expected)


def test_a_state_does_not_change_with_later_rows() -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    score_in_a_loop(scorer, case)
    state = scorer.state_dict()
    kept = copy.deepcopy(state)
    score_in_a_loop(scorer, case)
    other = obc.JacobianScorer(case.model)
    other.load_state_dict(state)
    again = obc.JacobianScorer(case.model)
    again.load_state_dict(kept)
    assert_equal(other.scores(), again.scores())
    assert other.scores().num_rows == len(case.batches)


def test_a_context_can_be_entered_again() -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    for batch in case.batches:
        score_in_a_loop(scorer, case, [batch])
    assert_equal(scorer.scores(), measured("residual-cnn", "batch")[0])


# --- the model afterwards ----------------------------------------------------------------------------------------


@pytest.mark.sampled(members=9)
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", sorted({*OWN, *NASTY}))
def test_score_leaves_the_model_as_it_was(family: str, rows: str) -> None:
    case = FAMILIES[family]()
    snapshot = Snapshot(unusual(case.model))
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    snapshot.assert_restored()
    # Frozen parameters, gradients and training flags do not change the scores either.
    if family not in TIED:
        assert_parity(scores, measured(family, rows)[1])


@pytest.mark.parametrize("failing_row", [0, 1])
def test_the_model_is_restored_after_an_exception_in_the_loss(failing_row: int) -> None:
    case = models.residual_cnn()
    snapshot = Snapshot(unusual(case.model))
    seen = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal seen
        value = case.loss(model, batch)
        seen += 1
        if seen > failing_row:
            raise KeyError("the user's own")
        return value

    with pytest.raises(KeyError, match="the user's own"):
        obc.score(case.model, case.batches, loss)
    snapshot.assert_restored()


@pytest.mark.parametrize("failing_row", [0, 1, 2])
def test_a_row_with_an_exception_is_dropped_and_the_scorer_goes_on(failing_row: int) -> None:
    """The exception comes after a backward, when half of the row is already there."""
    case = models.residual_cnn()
    snapshot = Snapshot(unusual(case.model).eval())
    scorer = obc.JacobianScorer(case.model)

    def break_off(batch: Any) -> None:
        with scorer.row():
            case.loss(case.model, batch).backward()
            raise KeyError("the user's own")

    with scorer:
        for index, batch in enumerate(case.batches):
            if index == failing_row:
                with pytest.raises(KeyError):
                    break_off(batch)
            with scorer.row():
                case.loss(case.model, batch).backward()
    snapshot.assert_restored()
    assert_equal(scorer.scores(), measured("residual-cnn", "batch")[0])


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_copies_of_a_scored_model_are_clean(rows: str) -> None:
    case = models.residual_cnn()
    before = pickle.dumps(case.model)
    obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    assert len(pickle.dumps(case.model)) == len(before)
    clone = copy.deepcopy(case.model)
    for module in clone.modules():
        assert not any(getattr(module, kind) for kind in Snapshot.HOOKS)
        assert "forward" not in vars(module)
    clone.train()
    case.loss(clone, case.batches[0]).backward()
    assert all(p.grad is not None for p in clone.parameters())
    assert all(p.grad is None for p in case.model.parameters())


def test_an_optimizer_goes_on_undisturbed() -> None:
    """Training with a scoring in the middle has the same bits as without it."""

    def train(with_scoring: bool) -> nn.Module:
        case = models.residual_cnn()
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.05, momentum=0.9)
        for step, batch in enumerate(case.batches * 2):
            if with_scoring and step == 3:
                obc.score(case.model, case.batches, case.loss)
            case.model.train()
            optimizer.zero_grad()
            case.loss(case.model, batch).backward()
            optimizer.step()
        return case.model

    one, other = train(False).state_dict(), train(True).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_zero_grad_between_rows_and_before_backward() -> None:
    case = models.residual_cnn()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for batch in case.batches:
            case.model.zero_grad()
            with scorer.row():
                optimizer.zero_grad(set_to_none=False)
                case.loss(case.model, batch).backward()
            optimizer.zero_grad(set_to_none=True)
    assert_equal(scorer.scores(), measured("residual-cnn", "batch")[0])


def test_nothing_of_parameter_size_is_kept() -> None:
    """No tensor as large as a weight, and none that did not exist before, is alive after a row."""
    case = models.llama()
    smallest = min(p.numel() for p in case.model.parameters() if p.dim() > 1)
    vectors = sum(p.shape[0] + p.shape[-1] for p in case.model.parameters())  # the flat row and its scores
    assert smallest >= 512

    def living() -> int:
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if issubclass(type(t), Tensor))

    before = living()
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for _ in range(2):
            for batch in case.batches:
                with scorer.row():
                    case.loss(case.model, batch).backward()
            after = living()
            # Two flat vectors, the norms' gradients, and gates of the size of the row.
            assert after - before <= 5 * vectors, f"{after - before} numbers are kept, {vectors} channels"
            assert all(p.grad is None or p.dim() == 1 for p in case.model.parameters())
    assert sum(p.numel() for p in case.model.parameters()) > 10 * vectors


# --- progress ----------------------------------------------------------------------------------------------------

SCORING = """
import torch, obc
model = torch.nn.Linear(3, 2)
batches = [torch.ones(2, 3)] * 5
obc.score(model, batches, lambda model, batch: model(batch).square().mean(){options})
"""


def run_in_a_pipe(options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCORING.format(options=options)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def run_in_a_terminal(options: str) -> str:
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", SCORING.format(options=options)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how a pseudo-terminal says that its other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(timeout=900) == 0, shown.decode()
    return shown.decode()


@pytest.mark.slow
def test_a_pipe_gets_no_progress() -> None:
    assert run_in_a_pipe("") == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_shows_rows_done_and_the_time_left() -> None:
    shown = run_in_a_terminal("")
    assert "5/5" in shown
    assert "<" in shown  # tqdm's elapsed<remaining


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_progress_can_be_switched_off_in_a_terminal() -> None:
    assert run_in_a_terminal(", progress=False") == ""


@pytest.mark.slow
def test_progress_can_be_switched_on_in_a_pipe() -> None:
    assert "5/5" in run_in_a_pipe(", progress=True")
