"""Any set of statistics collected together equals each collected alone, however the batches are run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers_families as families
from collected import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import obc
from obc.statistics import Blocks, Experts, Gram, StatisticsError
from obc.statistics.routed import RoutedCalls
from obc.statistics.run import collect

# With options, so that every field of every statistic is there.
ALL: dict[str, Any] = {
    "rows": "rows",
    "moments": "moments",
    "gram": Gram(),
    "gradient_moments": "gradient_moments",
    "weight_gradients": obc.statistics.WeightGradients(square=True),
    "experts": Experts("softmax"),
    "blocks": Blocks(entropy_bins=6),
}
FORWARD = ("moments", "gram", "experts", "blocks")
_alone: dict[Any, obc.Statistics] = {}
_case = families.FAMILIES["mixtral"]()


def run(names: list[str], rows: str, micro_batch: int | None) -> obc.Statistics:
    backward = any(name not in FORWARD for name in names)
    loss = _case.loss_fn(rows) if backward else None  # type: ignore[arg-type]
    return collect(
        _case.model,
        _case.batches,
        loss,
        statistics=[ALL[name] for name in names],
        rows=rows,  # type: ignore[arg-type]
        micro_batch=micro_batch,
        progress=False,
    )


def alone(name: str, rows: str, micro_batch: int | None) -> obc.Statistics:
    key = (name, rows, micro_batch)
    if key not in _alone:
        _alone[key] = run([name], rows, micro_batch)
    return _alone[key]


@settings(max_examples=12, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(ALL)), min_size=2, unique=True),
    rows=st.sampled_from(["batch", "sample"]),
    micro_batch=st.sampled_from([None, 3]),
)
def test_any_set_equals_each_alone(names: list[str], rows: str, micro_batch: int | None) -> None:
    if {"rows", "weight_gradients"} <= set(names):
        with pytest.raises(StatisticsError, match="rows freeze the weights"):
            run(names, rows, micro_batch)
        return
    together = run(names, rows, micro_batch)
    assert set(together.collected) == set(names)
    for name in names:
        one = alone(name, rows, micro_batch)
        if name != "rows":
            assert_same(one, together, name, exact=False)
            continue
        for module in one.rows:
            for a, b in zip(vars(one.rows[module]).values(), vars(together.rows[module]).values(), strict=True):
                assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", ["blocks", "experts", "gradient_moments", "gram", "moments"])
def test_bf16_models_are_summed_in_wider_numbers(name: str) -> None:
    """The sums of many equal batches are as many times those of one, to far less than a rounding of bfloat16."""
    model = copy.deepcopy(_case.model).bfloat16()
    batch = _case.batches[0]
    options: dict[str, Any] = {"statistics": ALL[name], "progress": False}
    loss = _case.loss if name == "gradient_moments" else None
    one, many = (collect(model, [batch] * count, loss, **options) for count in (1, 33))
    for module, found in getattr(one, name).items():
        for field, value in vars(found).items():
            got = torch.as_tensor(vars(getattr(many, name)[module])[field], dtype=torch.float64)
            torch.testing.assert_close(got, 33 * torch.as_tensor(value, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_kill_and_resume_with_experts_and_entropies(tmp_path: Path) -> None:
    batches, path = _case.batches * 2, tmp_path / "state"
    statistics = [ALL[name] for name in ("moments", "experts", "blocks", "gram")]

    class KilledError(Exception):
        pass

    def stopped() -> Iterator[Any]:
        yield from batches[:3]
        raise KilledError

    with pytest.raises(KilledError):
        collect(_case.model, stopped(), statistics=statistics, checkpoint=path, every=1)
    again = collect(_case.model, iter(batches), statistics=statistics, checkpoint=path)
    whole = collect(_case.model, iter(batches), statistics=statistics)
    for name in whole.collected:
        assert_same(again, whole, name)


def test_experts_that_no_token_reached_are_named() -> None:
    model: Any = copy.deepcopy(_case.model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()[:2] = 5.0  # ties between two groups: the first two or the last two
    tokens = [_case.batches[0][:1, :1]]
    with pytest.warns(UserWarning, match=r"no token was routed to it"):
        got = collect(model, tokens, statistics=["moments", "gram"])
    reached = [name for name in got.gram if name.startswith("model.layers.0.mlp.experts[")]
    assert len(reached) == 2
    missing = next(n for n in got.coverage["gram"] if "experts[" in n and n not in got.gram)
    with pytest.raises(KeyError, match="no token was routed to it"):
        got.gram[missing]


class OwnExperts(nn.Module):
    """Three-dimensional parameters of the right names that mean something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.randn(2, 4, 3))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return hidden * 2


def test_experts_that_compute_something_else_are_not_read() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.experts = nn.Linear(4, 4), OwnExperts()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return self.experts(x, torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1))

    with pytest.warns(UserWarning, match="what its experts return is not down"):
        got = collect(Net(), [torch.randn(5, 4)], statistics="gram")
    assert list(got.gram) == ["inner"]


@pytest.mark.parametrize("hidden", [torch.zeros(5, 4), torch.full((5, 4), torch.nan)], ids=["zeros", "not finite"])
def test_a_call_that_can_not_tell_proves_nothing_about_later_calls(hidden: Tensor) -> None:
    experts, calls = OwnExperts(), RoutedCalls()
    routing = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    assert not isinstance(calls.inputs(experts, [hidden, *routing], experts(hidden, *routing)), str)
    later = torch.randn(5, 4)
    found = calls.inputs(experts, [later, *routing], experts(later, *routing))
    assert found == "what its experts return is not down(act(gate(x)) * up(x)), weighted and added"


def test_bad_input_of_models() -> None:
    case = models.llama()
    with pytest.raises(StatisticsError, match="nothing to read 'experts'"):
        collect(case.model, case.batches, statistics="experts", by_block=True)
