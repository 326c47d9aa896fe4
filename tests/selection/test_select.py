"""obc.select against a plain greedy that computes the loss of every candidate set afresh, and against every subset."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from plain_selection import MANY_SIZES, Problem, as_lists, chained_costs, correlated_rows, plain_greedy, problems
from torch.utils._python_dispatch import TorchDispatchMode

import obc
from obc.selection import BudgetError, Costs
from obc.selection.interactions import FORMS

# Small cases have few rows and narrow groups; other tests check the warnings about this.
pytestmark = pytest.mark.filterwarnings(
    "ignore:fewer than a tenth:UserWarning",
    "ignore:.* rows are fewer:UserWarning",
    "ignore:all :UserWarning",
    "ignore:removing units:UserWarning",
)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100)
@given(problem=problems())
def test_select_matches_plain_greedy(form: str, problem: Problem) -> None:
    expected = plain_greedy(problem)
    if expected is None:
        with pytest.raises(BudgetError):
            problem.select(form=form)
    else:
        assert problem.select(form=form) == expected


@settings(max_examples=100)
@given(problem=problems(own_costs=True))
def test_select_with_a_cost_for_every_unit_matches_plain_greedy(problem: Problem) -> None:
    expected = plain_greedy(problem)
    if expected is not None:
        assert problem.select() == expected
        return
    try:  # greedy alone does not get there; the dearest units of every group may
        removed = problem.select()
    except BudgetError:
        return
    assert problem.freed(removed) >= problem.budget


@settings(max_examples=30)
@given(problem=problems(max_size=3))
def test_no_subset_is_better_than_the_optimum_and_greedy_is_a_subset(problem: Problem) -> None:
    problem = replace(problem, round_to=1, min_units=0)
    try:
        removed = problem.select()
    except BudgetError:
        assert problem.freed({name: list(range(problem.size(name))) for name in problem.rows}) < problem.budget
        return
    every = [
        [list(units) for count in range(size + 1) for units in itertools.combinations(range(size), count)]
        for size in map(problem.size, problem.rows)
    ]
    losses = [
        problem.loss(candidate)
        for units in itertools.product(*every)
        if problem.freed(candidate := dict(zip(problem.rows, units, strict=True))) >= problem.budget
    ]
    assert problem.loss(removed) >= min(losses)


@pytest.mark.parametrize("round_to", [None, 8])
@pytest.mark.parametrize("count", [20, 500], ids=["few rows", "many rows"])
def test_forms_agree_also_on_equal_units(count: int, round_to: int | None) -> None:
    rows = correlated_rows(MANY_SIZES, count)
    costs = chained_costs(rows)
    # So little memory that columns are pushed out before their use, and diagonal blocks do not fit.
    scarce = 8 * 300 * sum(MANY_SIZES)
    found = [
        as_lists(obc.select(rows, costs, 0.5 * costs.total(), round_to=round_to, form=form, max_bytes=max_bytes))
        for form, max_bytes in (("full", 2**30), ("blocked", 2**30), ("blocked", scarce), ("rows", 2**30), ("rows", 0))
    ]
    assert sum(map(len, found[0].values())) > 64  # more than one look at the outcome
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize("form", FORMS)
def test_of_equal_units_the_first_goes(form: str) -> None:
    one = torch.randn(40, 1)
    rows = {"a": one.repeat(1, 20), "b": one.repeat(1, 33)}
    removed = obc.select(rows, {"a": 3.0, "b": 3.0}, 30, form=form)
    assert as_lists(removed) == {"a": list(range(10)), "b": []}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("round_to", [None, 4])
def test_select_is_independent_of_the_number_of_threads(form: str, round_to: int | None, threads: None) -> None:
    rows = correlated_rows(MANY_SIZES, 300)
    costs = chained_costs(rows)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(as_lists(obc.select(rows, costs, 0.5 * costs.total(), round_to=round_to, form=form)))
    assert found[0] == found[1] == found[2]


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["joint", "independent"])
@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("round_to", [None, 8])
def test_select_on_a_gpu_matches_the_cpu(selection: str, form: str | None, round_to: int | None) -> None:
    rows = correlated_rows(MANY_SIZES, 300)
    costs = chained_costs(rows)
    options: dict[str, Any] = {"selection": selection, "form": form, "round_to": round_to}
    expected = obc.select(rows, costs, 0.5 * costs.total(), **options)
    on_gpu = {name: values.cuda() for name, values in rows.items()}
    removed = obc.select(on_gpu, costs, 0.5 * costs.total(), **options)
    assert all(units.device.type == "cpu" for units in removed.values())
    assert as_lists(removed) == as_lists(expected)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for an accelerator."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.name() == "aten::index.Tensor" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += by_mask or func.name() in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["full", "rows"])
@pytest.mark.parametrize("round_to", [None, 2])
def test_the_host_waits_once_in_many_steps(form: str, round_to: int | None) -> None:
    rows = correlated_rows((200, 200), 30)
    reads = []
    for steps in (32, 160):
        with HostReads() as counter:
            removed = obc.select(rows, dict.fromkeys(rows, 1.0), steps * (round_to or 1), form=form, round_to=round_to)
        assert sum(map(len, removed.values())) == steps * (round_to or 1)
        reads.append(counter.count)
    looks = (160 - 32) // 32
    assert reads[1] - reads[0] <= 6 * looks


def test_indices_are_ascending_int64_on_the_cpu_and_empty_where_nothing_goes() -> None:
    rows = {"a": 1e3 * torch.ones(2, 3) + torch.randn(2, 3), "b": torch.randn(2, 4)}
    removed = obc.select(rows, {"a": 1.0, "b": 1.0}, 2)
    assert list(removed) == ["a", "b"]
    assert all(units.dtype == torch.int64 and units.device.type == "cpu" for units in removed.values())
    assert removed["a"].shape == (0,)
    assert removed["b"].tolist() == sorted(set(removed["b"].tolist()))


def test_a_budget_of_zero_removes_nothing() -> None:
    assert as_lists(obc.select({"a": torch.randn(9, 3)}, {"a": 1.0}, 0)) == {"a": []}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_select_takes_rows_of_any_floating_dtype(dtype: torch.dtype) -> None:
    rows = {"a": torch.randint(-3, 4, (20, 8)).to(dtype), "b": torch.randint(-3, 4, (20, 5)).to(dtype)}
    costs = chained_costs(rows)
    as_float = {name: values.float() for name, values in rows.items()}
    assert as_lists(obc.select(rows, costs, 5000)) == as_lists(obc.select(as_float, costs, 5000))


def test_select_takes_strided_rows_that_require_grad_and_leaves_them_alone() -> None:
    wide = torch.randn(16, 40, requires_grad=True)
    before = wide.detach().clone()
    rows = {"a": wide[:, 3:20:2], "b": wide.T[:16, 5:15].T[:10].T}
    copies = {name: values.detach().clone(memory_format=torch.contiguous_format) for name, values in rows.items()}
    found = obc.select(rows, {"a": 1.0, "b": 2.0}, 8)
    assert as_lists(found) == as_lists(obc.select(copies, {"a": 1.0, "b": 2.0}, 8))
    assert torch.equal(wide, before)


def test_independent_selection_takes_scores_and_rows_alike() -> None:
    rows = correlated_rows((30, 20), 60)
    costs = chained_costs(rows)
    scores = {name: values.double().square().sum(0) for name, values in rows.items()}
    from_scores = obc.select(scores, costs, 0.5 * costs.total(), selection="independent")
    from_rows = obc.select(rows, costs, 0.5 * costs.total(), selection="independent")
    assert as_lists(from_scores) == as_lists(from_rows)


def test_groups_of_the_costs_without_rows_keep_their_widths() -> None:
    costs = Costs(["a", "fixed", "b"], [4, 10, 4], quadratic=torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 0, 0]]))
    rows = {"b": torch.tensor([[4.0, 3, 2, 1]]), "a": torch.tensor([[1.5, 2.5, 3.5, 4.5]])}
    removed = obc.select(rows, costs, 30, selection="independent")
    assert as_lists(removed) == {"b": [2, 3], "a": [0]}


def test_each_removal_changes_what_the_others_free() -> None:
    costs = Costs(["a", "b"], [4, 4], quadratic=torch.tensor([[0.0, 1], [0, 0]]))
    rows = {"a": torch.tensor([[1.0, 1.1, 1.2, 9]]), "b": torch.tensor([[1.05, 1.15, 1.25, 8]])}
    removed = obc.select(rows, costs, 12, selection="independent", per_cost=False)
    # In the order of the scores: one of a frees 4, then b 3, a 3, b 2. At first each freed 4, and three seemed enough.
    assert as_lists(removed) == {"a": [0, 1], "b": [0, 1]}


@pytest.mark.parametrize(
    ("budget", "widths"),
    [
        (5, {"odd": 8, "even": 16, "dear": 13, "small": 7}),
        (13, {"odd": 8, "even": 8, "dear": 13, "small": 7}),
        (14, {"odd": 8, "even": 8, "dear": 8, "small": 7}),
    ],
)
def test_groups_that_lose_units_keep_multiples_and_others_their_widths(budget: int, widths: dict[str, int]) -> None:
    sizes, scores = {"odd": 13, "even": 16, "dear": 13, "small": 7}, {"odd": 0.1, "even": 0.2, "dear": 9, "small": 0.01}
    rows = {name: torch.full((size,), float(scores[name])) for name, size in sizes.items()}
    removed = obc.select(rows, dict.fromkeys(rows, 1.0), budget, selection="independent", round_to=8)
    assert {name: sizes[name] - len(units) for name, units in removed.items()} == widths


def test_dear_units_go_where_cheap_ones_can_not_meet_the_budget() -> None:
    rows = {"a": torch.tensor([[1.0, 1.0, 9.0]])}
    costs = {"a": torch.tensor([1.0, 1.0, 10.0])}
    assert obc.select(rows, costs, 2, selection="independent")["a"].tolist() == [0, 1]
    assert obc.select(rows, costs, 11, selection="independent")["a"].tolist() == [0, 2]


def test_units_that_free_nothing_stay() -> None:
    rows = {"a": torch.zeros(1, 3), "b": torch.ones(1, 3)}
    with pytest.warns(UserWarning, match="removing units of 'a' frees nothing") as warned:
        removed = obc.select(rows, {"a": 0.0, "b": 1.0}, 2, selection="independent")
    assert warned[0].filename == __file__
    assert as_lists(removed) == {"a": [], "b": [0, 1]}
