"""Rows of scoring on a GPU: captured in a CUDA graph, and compiled, they are what eager rows are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capturable import llama_like, small_cnn
from cases import on
from models import Case
from parity import assert_parity, expected_scores
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import obc
from benchmarks.gpu_timing import captured

pytestmark = pytest.mark.gpu

REPLAYS = 3


@pytest.fixture(params=["triton", "cuda"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with on((request.param, "cuda")):
        yield


def on_gpu(case: Case) -> Case:
    batches = pytree.tree_map(lambda leaf: leaf.cuda(), case.batches)
    return Case(case.model.cuda(), batches, case.losses, case.oracle_model)


def backward(case: Case, model: nn.Module, batch: Any, rows: str) -> None:
    losses = case.losses(model, batch)
    (losses.sum() if rows == "sample" else losses.mean()).backward()


def eager_scores(case: Case, batches: list[Any], rows: Any) -> obc.Scores:
    scorer = obc.JacobianScorer(case.model, rows=rows)
    with scorer:
        for batch in batches:
            with scorer.row():
                backward(case, case.model, batch, rows)
    return scorer.scores()


def assert_equal_scores(actual: obc.Scores, expected: obc.Scores) -> None:
    """Equal to 1e-5 of a layer's largest: cuDNN and cuBLAS may choose other kernels while capturing."""
    assert actual.num_rows == expected.num_rows
    for name, channels in expected.items():
        for got, want in (
            (actual[name].out_channels, channels.out_channels),
            (actual[name].in_channels, channels.in_channels),
        ):
            if want is not None:
                assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", [small_cnn, llama_like], ids=lambda family: family.__name__)
@pytest.mark.usefixtures("_backend")
def test_a_captured_row_equals_eager_rows(family: Callable[[], Case], rows: Any) -> None:
    """Forward, backward and the end of the row as one graph: every replay is a row, with its own batch."""
    case = on_gpu(family())
    first, *later = case.batches
    still = pytree.tree_map(torch.clone, first)
    scorer = obc.JacobianScorer(case.model, rows=rows)
    samples = 4 if rows == "sample" else None

    def row() -> None:
        with scorer.row(samples=samples):
            backward(case, case.model, still, rows)

    with scorer:
        row()  # the checking row
        graph, _ = captured(row)  # runs one row, which compiles and allocates
        for batch in later:
            pytree.tree_map(lambda to, new: to.copy_(new), still, batch)
            graph.replay()
        torch.cuda.synchronize()
    # Recording a graph runs nothing: two rows of the first batch, then one of each other.
    assert_equal_scores(scorer.scores(), eager_scores(case, [first, first, *later], rows))


@pytest.mark.filterwarnings("ignore:row 3 is not finite")
@pytest.mark.parametrize("family", [small_cnn, llama_like], ids=lambda family: family.__name__)
@pytest.mark.usefixtures("_backend")
def test_a_captured_row_that_is_not_finite_is_left_out(family: Callable[[], Case]) -> None:
    case = on_gpu(family())
    still = pytree.tree_map(torch.clone, case.batches[0])
    scorer = obc.JacobianScorer(case.model)
    scale = torch.ones((), device="cuda")

    def row() -> None:
        with scorer.row():
            (case.losses(case.model, still).mean() * scale).backward()

    with scorer:
        row()
        row()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            row()
        for factor in (1.0, float("nan"), 1.0):
            scale.fill_(factor)
            graph.replay()
        torch.cuda.synchronize()
    assert len(scorer.left_out) == 1
    assert "row 3 is not finite" in scorer.left_out[0]
    assert_equal_scores(scorer.scores(), eager_scores(case, [case.batches[0]] * 4, "batch"))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("family", [small_cnn, llama_like], ids=lambda family: family.__name__)
@pytest.mark.usefixtures("_backend")
def test_a_compiled_row_equals_the_oracle(family: Callable[[], Case], mode: str) -> None:
    """Attached, then compiled as one graph by inductor; "reduce-overhead" replays CUDA graphs of its own."""
    case = on_gpu(family())
    expected = expected_scores(family())
    torch._dynamo.reset()
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        compiled = torch.compile(case.model, fullgraph=True, mode=mode)
        for batch in case.batches:
            torch.compiler.cudagraph_mark_step_begin()
            with scorer.row():
                backward(case, compiled, batch, "batch")
    torch._dynamo.reset()
    scores = scorer.scores()
    # Compiled convolutions may take TF32 where eager ones do not; the bound is that of its 11 bits.
    assert_parity(_on_cpu(scores), expected, tolerance=1e-3)


def _on_cpu(scores: obc.Scores) -> obc.Scores:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    channels = {
        name: obc.ChannelScores(moved(one.out_channels), moved(one.in_channels)) for name, one in scores.items()
    }
    return obc.Scores(channels, num_rows=scores.num_rows, coverage=dict(scores.coverage), metadata={})


@pytest.mark.parametrize("family", [small_cnn, llama_like], ids=lambda family: family.__name__)
@pytest.mark.usefixtures("_backend")
def test_rows_after_the_checking_row_do_not_synchronise(family: Callable[[], Case]) -> None:
    case = on_gpu(family())
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for batch in case.batches[:2]:
            with scorer.row():
                backward(case, case.model, batch, "batch")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in case.batches[2:]:
                with scorer.row():
                    backward(case, case.model, batch, "batch")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_equal_scores(scorer.scores(), eager_scores(case, case.batches, "batch"))
