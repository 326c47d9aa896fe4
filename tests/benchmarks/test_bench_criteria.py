"""The benchmark of criteria: what a library refuses is listed, a fault ends the run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_criteria
from benchmarks.bench_criteria import FUNC, OPACUS, refusal
from benchmarks.bench_scoring import Subject


class ByData(nn.Module):
    """The path taken depends on values: autograd follows, vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else 2 * y


def make(rows: int, batch: int) -> Subject:
    batches = [(torch.randn(batch, 6), torch.randint(3, (batch,))) for _ in range(rows)]
    return Subject(ByData().eval(), batches, bench_criteria._class_losses)


@pytest.fixture(autouse=True)
def _without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_criteria.importlib.util, "find_spec", lambda name: None)


def test_a_way_that_a_library_refuses_is_listed_with_its_reason() -> None:
    case, refused = bench_criteria.case_of(make, rows=1, batch=2)
    assert set(refused) == {OPACUS, FUNC}
    assert refused[OPACUS].startswith("Opacus is not installed")
    assert refused[FUNC].startswith("RuntimeError: vmap: ")
    assert {provider.name for provider in case.providers} == set(bench_criteria.WAYS) - set(refused)


@pytest.mark.parametrize("way", [way for way in bench_criteria.WAYS if way != OPACUS])
def test_a_fault_ends_the_run(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(subject: Subject) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setitem(bench_criteria.WAYS, way, faulty)
    with pytest.raises(TypeError, match="unsupported operand"):
        bench_criteria.case_of(make, rows=1, batch=2)


def test_refusals_belong_to_the_way_whose_library_speaks_so() -> None:
    in_place = RuntimeError("Output 0 of BackwardHookFunctionBackward is a view and is being modified inplace.")
    buffers = NotImplementedError("This layer has buffers and is not supported by Opacus\n...")
    by_data = RuntimeError("vmap: It looks like you're either (1) calling .item() on a Tensor or ...")
    assert refusal(OPACUS, buffers) == "NotImplementedError: This layer has buffers and is not supported by Opacus"
    assert refusal(OPACUS, in_place) is not None
    assert refusal(FUNC, by_data) is not None
    assert refusal(OPACUS, by_data) is None
    assert refusal(FUNC, in_place) is None
    assert refusal(FUNC, RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x6 and 5x3)")) is None
    for error in (in_place, buffers, by_data):
        assert refusal("obc, JC batch rows", error) is None
