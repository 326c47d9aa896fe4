"""Exceptions, interrupts and memory that runs out while a model is scored: it is as it was, and scores again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import models
import pytest
import started
import torch
from models import Case
from parity import assert_equal
from snapshot import Snapshot, unusual
from test_files import little_memory
from torch import Tensor, nn

import obc
from obc.integrations.torch_pruning import JacobianImportance

SCORING = str(Path(obc.__file__).parent / "scoring")
ERRORS = [RuntimeError, KeyboardInterrupt, MemoryError]


class Fault:
    """Raises ``error`` at the ``at``-th call of :meth:`strike`, counted from 0, and a lasting one until mended."""

    def __init__(self, error: type[BaseException], calls: int, lasting: bool = False) -> None:
        self.error, self.left, self.lasting, self.mended = error, calls, lasting, False

    def strike(self) -> None:
        self.left -= 1
        if self.left == -1 or (self.left < 0 and self.lasting and not self.mended):
            raise self.error("injected")


def in_forward(case: Case, fault: Fault) -> list[Any]:
    """A layer's forward fails."""
    return [case.model.conv2.register_forward_pre_hook(lambda module, args: fault.strike())]


def in_backward(case: Case, fault: Fault) -> list[Any]:
    """Backward fails half-way, between the gates."""

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: fault.strike())

    return [case.model.conv1.register_forward_hook(after)]


def in_the_loss(case: Case, fault: Fault) -> list[Any]:
    losses = case.losses

    def failing(model: nn.Module, batch: Any) -> Tensor:
        fault.strike()
        return losses(model, batch)

    case.losses = failing
    return []


def in_the_batches(case: Case, fault: Fault) -> list[Any]:
    batches = case.batches

    class Failing:
        def __iter__(self) -> Iterator[Any]:
            for batch in batches:
                fault.strike()
                yield batch

    case.batches = Failing()
    return []


PLACES = [in_forward, in_backward, in_the_loss, in_the_batches]


@pytest.mark.sampled(members=12)
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_leaves_the_model_as_it_was_and_scorable(
    place: Callable[[Case, Fault], list[Any]], error: type[BaseException], calls: int, rows: str
) -> None:
    case = models.residual_cnn()
    expected = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    fault = Fault(
        error, calls, lasting=True
    )  # a failure on one sample is followed by a second try on the whole first batch
    handles = place(case, fault)
    snapshot = Snapshot(unusual(case.model))
    with pytest.raises(error, match="injected"):
        obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    snapshot.assert_restored()
    fault.mended = True
    for handle in handles:
        handle.remove()
    assert_equal(obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows), expected)


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", [in_forward, in_backward])
def test_a_fault_in_an_own_loop_drops_its_row_alone(
    place: Callable[[Case, Fault], list[Any]], error: type[BaseException], calls: int
) -> None:
    case = models.residual_cnn()
    expected = obc.score(case.model, case.batches, case.loss)
    place(case, Fault(error, calls))
    scorer = obc.JacobianScorer(case.model.eval())
    faults = 0
    with scorer:
        for batch in case.batches:
            for _ in range(2):
                try:
                    with scorer.row():
                        case.loss(case.model, batch).backward()
                    break
                except error:
                    faults += 1
    assert faults == 1
    assert_equal(scorer.scores(), expected)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_while_an_importance_is_filled(
    place: Callable[[Case, Fault], list[Any]], error: type[BaseException]
) -> None:
    """The importance keeps its scores, the model is unchanged, and both can continue."""
    case = models.residual_cnn()
    importance = JacobianImportance()
    importance.score(case.model, case.batches, case.loss)
    before = importance.scores
    handles = place(case, Fault(error, 1))
    snapshot = Snapshot(case.model)
    with pytest.raises(error, match="injected"):
        importance.score(case.model, case.batches, case.loss)
    snapshot.assert_restored()
    assert importance.scores is before
    for handle in handles:
        handle.remove()
    importance.score(case.model, case.batches, case.loss)
    assert_equal(importance.scores, before)


# --- an interrupt anywhere -----------------------------------------------------------------------------------------

# While the model is being given back, an interrupt can't be answered by giving it back.
GIVING_BACK = {"__exit__", "undo", "detach", "release", "_evaluating"}


class Interrupt:
    """Raises KeyboardInterrupt at the ``at``-th line that obc's scoring runs, as the signal's handler would."""

    def __init__(self, calls: int) -> None:
        self.left, self.where = calls, ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SCORING):
            return None
        if event == "line" and not self._gives_back(frame):
            self.left -= 1
            if self.left == -1:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    @staticmethod
    def _gives_back(frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code.co_filename.startswith(SCORING):
            if frame.f_code.co_name in GIVING_BACK:
                return True
            frame = frame.f_back
        return False


def interrupted(case: Case, rows: str, calls: int) -> Interrupt:
    interrupt = Interrupt(calls)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, progress=False)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupt


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(rows: str) -> None:
    case = models.residual_cnn()
    expected = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    snapshot = Snapshot(unusual(case.model))
    struck: set[str] = set()
    calls = 0
    while (interrupt := interrupted(case, rows, calls)).where:
        struck.add(interrupt.where)
        try:
            snapshot.assert_restored()
        except AssertionError as error:
            raise AssertionError(f"after an interrupt at {interrupt.where}: {error}") from error
        calls += 1 + calls // 4
    assert len(struck) > 12
    assert_equal(obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows), expected)


# --- memory that runs out ------------------------------------------------------------------------------------------

# A batch whose activations take some 8 MB each, so that where memory ends depends on how much there is.
LARGE = 1024
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


def large_case() -> Case:
    case = models.residual_cnn()
    x, labels = case.batches[0]
    case.batches = [(x.repeat(LARGE // len(x), 1, 1, 1), labels.repeat(LARGE // len(x)))] * 2
    return case


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_memory_that_runs_out_anywhere(rows: str) -> None:
    """A run with more address space fails later, by torch's error or Python's, and leaves no trace.

    In a fresh process: the memory that earlier tests gave back would do for the whole run.
    """
    started.processes(_run_out_of_memory, (rows,))


def _run_out_of_memory(process: int, rows: str) -> None:
    # Otherwise malloc sometimes keeps enough freed memory for the later runs to succeed.
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**20)
    case = large_case()
    expected = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    snapshot = Snapshot(unusual(case.model))
    failures = []
    for megabytes in (1, 2, 5, 10, 15, 20, 30, 40, 60, 120, 480):
        try:
            with little_memory(megabytes):
                scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
        except (RuntimeError, MemoryError) as error:
            failures.append(repr(error))
        else:
            assert_equal(scores, expected)
        snapshot.assert_restored()
    assert len(failures) > 2
    assert all(any(word in text for word in ("MemoryError", "allocate memory", "bad_alloc")) for text in failures)
    assert_equal(obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows), expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_an_allocation_that_is_refused(direction: str, rows: str) -> None:
    case = models.residual_cnn()
    expected = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)

    def refused(*args: object) -> None:
        torch.empty(2**55, dtype=torch.uint8)

    def after(module: nn.Module, args: object, output: Tensor) -> None:
        if direction == "forward":
            refused()
        elif output.requires_grad:
            output.register_hook(refused)

    handle = case.model.conv1.register_forward_hook(after)
    snapshot = Snapshot(unusual(case.model))
    with pytest.raises(RuntimeError, match="allocate memory"):
        obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    snapshot.assert_restored()
    handle.remove()
    assert_equal(obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows), expected)


@pytest.mark.slow
def test_memory_that_runs_out_while_saving(tmp_path: Path) -> None:
    """Either the new file is complete or the old one is; nothing else is left. Uses a fresh process, as above."""
    started.processes(_run_out_of_memory_while_saving, (tmp_path / "scores.safetensors",))


def _run_out_of_memory_while_saving(process: int, path: Path) -> None:
    case = models.residual_cnn()
    small = obc.score(case.model, case.batches, case.loss)
    small.save(path)
    width = 40_000_000
    large = obc.Scores(
        {"wide": obc.ChannelScores(torch.ones(width)[::1], torch.ones(2 * width)[::2])},
        num_rows=1,
        coverage={"wide": "gate"},
        metadata={},
    )
    outcomes = set()
    for megabytes in (1, 400):
        try:
            with little_memory(megabytes):
                large.save(path)
        except (MemoryError, RuntimeError):
            outcomes.add("refused")
            assert_equal(obc.Scores.load(path), small)
        else:
            outcomes.add("saved")
            assert obc.Scores.load(path)["wide"].in_channels.numel() == width
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert outcomes == {"refused", "saved"}
