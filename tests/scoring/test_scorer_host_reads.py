"""A row after the checking row reads nothing back from the device, so that it can be captured in a CUDA graph.

Shown without a GPU in two ways: on ``meta`` tensors, of which nothing can be read at all, and on CPU tensors under a
mode that sees every operator, which serves the rows that follow a real checking row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import models
import pytest
import torch
from capturable import llama_like, small_cnn
from models import Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import obc

aten = torch.ops.aten

# Operators whose results, or the shapes of whose results, the host waits for.
_READ_BACK = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten._unique2.default,
}


class NoHostReads(TorchDispatchMode):
    """Raises where an operator reads a value back, or selects by a mask, whose count the host must know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        chosen_by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in _READ_BACK or chosen_by_mask:
            raise AssertionError(f"{func} reads back from the device")
        return func(*args, **(kwargs or {}))


FAMILIES = [models.residual_cnn, small_cnn, llama_like]


@pytest.mark.parametrize("keep_rows", [False, True], ids=["sums", "kept"])
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_rows_after_the_checking_row_read_nothing_back(family: Callable[[], Case], rows: Any, keep_rows: bool) -> None:
    case = family()
    scorer = obc.JacobianScorer(case.model, rows=rows, keep_rows=keep_rows)
    if keep_rows:
        scorer.reserve_rows(100)

    def row(batch: Any) -> None:
        with scorer.row():
            losses = case.losses(case.model, batch)
            (losses.sum() if rows == "sample" else losses.mean()).backward()

    with scorer:
        row(case.batches[0])
        with NoHostReads():
            for batch in case.batches[1:]:
                row(batch)
    assert scorer.count_rows() > 1


def test_the_mode_sees_what_the_checking_row_reads() -> None:
    case = models.residual_cnn()
    with (
        pytest.raises(AssertionError, match="reads back from the device"),
        obc.JacobianScorer(case.model) as scorer,
        NoHostReads(),
        scorer.row(),
    ):
        case.losses(case.model, case.batches[0]).mean().backward()


class EndedError(RuntimeError):
    """Ends the block before the scorer counts its rows, which reads."""


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_unchecked_rows_of_tensors_without_memory(rows: Any) -> None:
    """Nothing of a row needs a value: its tensors have none."""
    with torch.device("meta"):
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)]
        model = nn.Sequential(*layers, nn.LayerNorm(4)).eval()
        scorer = obc.JacobianScorer(model, check=False, rows=rows)

        def run() -> None:
            with scorer:
                for _ in range(2):
                    with scorer.row(loss_scale=2.0):
                        model(torch.empty(2, 3, 4, 4)).square().sum().backward()
                raise EndedError

        with pytest.raises(EndedError):
            run()
    with pytest.raises(NotImplementedError, match="no data"):
        scorer.scores()


@pytest.mark.filterwarnings("ignore:row 1 is not finite")
def test_several_vectors_are_left_out_together_without_a_read() -> None:
    """A model of two dtypes has a row in two vectors: a fault in one leaves out both."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).double())

    model = Mixed().eval()
    scorer = obc.JacobianScorer(model)
    inputs = [torch.randn(6, 4) for _ in range(3)]
    inputs[1][0, 0] = torch.nan
    with scorer:
        for index, x in enumerate(inputs):
            with NoHostReads() if index else torch.enable_grad(), scorer.row():
                model(x).square().mean().backward()
    assert scorer.count_rows() == 2
    assert [text.split(",")[0] for text in scorer.left_out] == ["row 1 is not finite"]
