"""obc.select against a plain greedy that computes the loss of every candidate set afresh, and against every subset."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import obc
from obc.selection import BudgetError, Costs
from obc.selection.interactions import FORMS, BlockedGram, FullGram, RowsOnly, choose_form, products_within
from obc.selection.shrinkage import estimated_shrinkage

# Small cases have few rows and narrow groups; the warnings that say so have tests of their own.
pytestmark = pytest.mark.filterwarnings(
    "ignore:fewer than a tenth:UserWarning",
    "ignore:.* rows are fewer:UserWarning",
    "ignore:all :UserWarning",
    "ignore:removing units:UserWarning",
)

Removed = dict[str, list[int]]


@dataclass
class Problem:
    """What ``obc.select`` is called with. Rows and costs are small integers: exact, whatever the order of sums."""

    rows: dict[str, np.ndarray]
    costs: Costs | dict[str, np.ndarray]
    budget: float
    selection: str = "joint"
    shrinkage: float = 0.0
    per_cost: bool = True
    min_units: dict[str, int] | int = 1
    round_to: dict[str, int] | int = 1

    def select(self, **more: Any) -> Removed:
        rows = {name: torch.from_numpy(values) for name, values in self.rows.items()}
        costs = self.costs
        if not isinstance(costs, Costs):
            costs = {name: torch.from_numpy(values) for name, values in costs.items()}
        options = {key: value for key, value in vars(self).items() if key not in ("rows", "costs", "budget")}
        return {name: units.tolist() for name, units in obc.select(rows, costs, self.budget, **options, **more).items()}

    def size(self, name: str) -> int:
        return self.rows[name].shape[1]

    def freed(self, removed: Removed) -> float:
        if not isinstance(self.costs, Costs):
            return float(sum(self.costs[name][units].sum() for name, units in removed.items()))
        widths = [float(self.size(name) - len(removed[name])) for name in self.costs.names]
        return self.costs.total() - self.costs.total(torch.tensor(widths))

    def loss(self, removed: Removed) -> float:
        """sum_n delta[n]^2, products of different units shrunk."""
        picked = np.concatenate([values[:, removed[name]] for name, values in self.rows.items()], 1)
        squares = float(np.square(picked).sum())
        joint = float(np.square(picked.sum(1)).sum())
        keep = 1 - self.shrinkage if self.selection == "joint" else 0.0
        return squares + keep * (joint - squares)

    def score(self, before: Removed, after: Removed) -> float:
        """The smaller the better; infinite where nothing is freed."""
        increment, freed = self.loss(after) - self.loss(before), self.freed(after) - self.freed(before)
        if freed <= 0:
            return np.inf
        if not self.per_cost:
            return increment
        return increment * freed if increment < 0 else increment / freed


def of_group(value: Mapping[str, int] | int, name: str) -> int:
    return value.get(name, 1) if isinstance(value, Mapping) else value


def next_of_group(problem: Problem, removed: Removed, name: str) -> Removed | None:
    """``removed`` with what group ``name`` would lose next; None where it may lose nothing."""
    width, multiple = problem.size(name) - len(removed[name]), of_group(problem.round_to, name)
    count = width % multiple or multiple
    if width - count < of_group(problem.min_units, name):
        return None
    after = removed
    for _ in range(count):
        left = [unit for unit in range(problem.size(name)) if unit not in after[name]]
        candidates = [after | {name: [*after[name], unit]} for unit in left]
        before = after
        after = min(candidates, key=lambda candidate: problem.score(before, candidate))
        if problem.score(before, after) == np.inf:
            return None
    return after


def plain_greedy(problem: Problem) -> Removed | None:
    """The definition, step by step; None where nothing more may go before the budget is met."""
    removed: Removed = {name: [] for name in problem.rows}
    while problem.freed(removed) < problem.budget:
        candidates = [next_of_group(problem, removed, name) for name in problem.rows]
        possible = [candidate for candidate in candidates if candidate is not None]
        if not possible:
            return None
        before = removed
        removed = min(possible, key=lambda candidate: problem.score(before, candidate))
    return {name: sorted(units) for name, units in removed.items()}


@st.composite
def problems(draw: st.DrawFn, max_size: int = 6, own_costs: bool = False) -> Problem:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, max_size), min_size=1, max_size=4))
    names = [f"group {place}" for place in range(len(sizes))]
    count = draw(st.integers(1, 8))
    rows = {
        name: generator.integers(-3, 4, (count, size)).astype(np.float32)
        for name, size in zip(names, sizes, strict=True)
    }
    costs: Costs | dict[str, np.ndarray]
    if own_costs:
        costs = {name: generator.integers(0, 9, values.shape[1]).astype(np.float64) for name, values in rows.items()}
        total = float(sum(values.sum() for values in costs.values()))
    else:
        quadratic = torch.from_numpy(generator.integers(0, 9, (len(names), len(names)))).double()
        linear = torch.from_numpy(generator.integers(0, 9, len(names))).double()
        costs = Costs(names, sizes, constant=7, linear=linear, quadratic=quadratic + quadratic.T)
        total = costs.total() - 7
    return Problem(
        rows,
        costs,
        budget=draw(st.floats(0, 1)) * total,
        selection=draw(st.sampled_from(["joint", "joint", "independent"])),
        shrinkage=draw(st.sampled_from([0.0, 0.25, 1.0])),
        per_cost=draw(st.booleans()),
        min_units=draw(st.one_of(st.integers(0, 2), st.just({names[-1]: 3}))),
        round_to=draw(st.one_of(st.sampled_from([1, 1, 2, 3]), st.just({names[0]: 2}))),
    )


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


def correlated_rows(sizes: Sequence[int], count: int, twins: bool = True) -> dict[str, Tensor]:
    """Rows of units that share directions, like those of a network; every seventh unit is equal to the one before."""
    rank = max(1, count // 4)
    shared = torch.randn(count, rank)
    rows = {}
    for place, size in enumerate(sizes):
        values = shared @ torch.randn(rank, size) / rank**0.5 + 0.5 * torch.randn(count, size)
        values *= torch.rand(size).mul(3).exp()
        if twins:
            values[:, 7::7] = values[:, 6:-1:7][:, : values[:, 7::7].shape[1]]
        rows[f"layer {place}"] = values
    return rows


def chained_costs(rows: Mapping[str, Tensor]) -> Costs:
    """Every group's layer reads the group before, with a 3 x 3 kernel on 8 x 8 positions."""
    sizes = [values.shape[-1] for values in rows.values()]
    quadratic = torch.diag(torch.full((len(sizes) - 1,), 9.0 * 64), 1)
    linear = torch.zeros(len(sizes))
    linear[0], linear[-1] = 27 * 64, 10
    return Costs(list(rows), sizes, linear=linear, quadratic=quadratic)


def as_lists(removed: Mapping[str, Tensor]) -> Removed:
    return {name: units.tolist() for name, units in removed.items()}


MANY_SIZES = (130, 1, 64, 257)


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


# --- what joint selection is for ---------------------------------------------------------------------------------


def test_joint_selection_keeps_one_of_two_alike_and_takes_two_that_cancel() -> None:
    a, b, c = torch.eye(3)
    rows = {"layer": torch.stack([a, a, 0.9 * b, 1.2 * c, -1.2 * c], 1)}
    joint = obc.select(rows, {"layer": 1.0}, 3, shrinkage=0.0)
    alone = obc.select(rows, {"layer": 1.0}, 3, selection="independent")
    # Alone the cheapest are b and the two a, which together change the loss by 2 a.
    assert alone["layer"].tolist() == [0, 1, 2]
    # With c, -c costs less than nothing; but greedy sees c only at its own price of 1.44, below 1 + 2 for the second a.
    assert joint["layer"].tolist() == [0, 2, 3]
    assert obc.select(rows, {"layer": 1.0}, 4, shrinkage=0.0)["layer"].tolist() == [0, 2, 3, 4]


def test_of_removals_that_lower_the_loss_the_dear_one_goes_first() -> None:
    one = torch.ones(1, 1)
    rows = {"first": -10 * one, "cheap": one, "dear": one.clone()}
    # Only "first" must go: then both others undo a part of it, and the one that frees more does so better.
    removed = obc.select(rows, {"first": 1000.0, "cheap": 1.0, "dear": 5.0}, 1001, min_units=0, shrinkage=0.0)
    assert as_lists(removed) == {"first": [0], "cheap": [], "dear": [0]}


def test_increments_survive_cancellation() -> None:
    # 1e2 +- 1e-2: where float32 rounds the sums of squares, 4e4, nothing is left of the difference, 6e-4.
    large = 1e2 * torch.ones(4, 1)
    small = 1e-2 * torch.tensor([[3.0, -1, 2], [1, 1, -2], [0, 1, 1], [1, -1, 1]])
    rows = {"pairs": torch.cat([large, -large + small], 1)}
    # The first has to go, then the one that leaves least of it: the column of small with the least norm.
    removed = obc.select(rows, {"pairs": torch.tensor([100.0, 1, 1, 1])}, 101, shrinkage=0.0)
    assert removed["pairs"].tolist() == [0, 2]


# --- forms of the Gram matrix ------------------------------------------------------------------------------------


def test_every_form_gives_the_columns_of_the_gram_matrix() -> None:
    units = torch.randn(300, 20, dtype=torch.float64)
    gram = units @ units.T
    ranking = torch.rand(300, dtype=torch.float64)
    forms = [
        FullGram(units),
        RowsOnly(units),
        BlockedGram(units, 2**30),
        BlockedGram(units, 8 * 300 * 3),
        BlockedGram(units, 0),
    ]
    for picks in torch.randperm(300)[:240].split(3):
        valid = torch.tensor([True, False, True])
        expected = gram[:, picks[valid]].sum(1)
        ranking[picks[valid]] = torch.inf
        for columns in forms:
            torch.testing.assert_close(columns(picks, valid, lambda: ranking), expected)


@pytest.mark.parametrize("max_bytes", [0, 2**20], ids=["from rows", "from blocks"])
def test_products_within_groups(max_bytes: int) -> None:
    sizes = [3, 1, 5]
    units = torch.randn(9, 4, dtype=torch.float64)
    picks = torch.tensor([1, 3, 8])
    of_unit = picks.repeat_interleave(torch.tensor(sizes))
    expected = (units * units[of_unit]).sum(1)
    torch.testing.assert_close(products_within(units, sizes, max_bytes)(picks), expected)


@pytest.mark.parametrize(
    ("channels", "rows", "device", "chunks", "max_bytes", "expected"),
    [
        (1000, 512, "cpu", False, 2**31, "full"),
        (10_000, 512, "cpu", False, 2**31, "blocked"),
        (10_000, 512, "meta", False, 2**31, "full"),
        (100_000, 512, "cpu", False, 2**31, "blocked"),
        (100_000, 512, "cpu", False, 2**20, "rows"),
        (100_000, 8, "cpu", False, 2**31, "rows"),
        (100_000, 512, "cpu", True, 2**31, "rows"),
        (100_000, 512, "meta", False, 2**31, "rows"),
        (1000, 512, "cpu", False, 2**20, "blocked"),
    ],
)
def test_the_form_follows_from_sizes(
    channels: int, rows: int, device: str, chunks: bool, max_bytes: int, expected: str
) -> None:
    units = torch.zeros(1, dtype=torch.float64, device=device).expand(channels, rows)
    assert choose_form(units, [channels // 10] * 10, chunks=chunks, max_bytes=max_bytes) == expected


# --- shrinkage ----------------------------------------------------------------------------------------------------


def test_estimated_shrinkage_matches_its_definition() -> None:
    units = torch.randn(7, 5, dtype=torch.float64)
    units[3] = units[2] + 0.1 * units[3]
    count = units.shape[1]
    variance = square = 0.0
    for u, v in itertools.permutations(range(len(units)), 2):
        products = units[u] * units[v]
        variance += float(products.var(correction=1)) * count
        square += float(products.sum()) ** 2
    assert 0 < variance / square < 1
    assert estimated_shrinkage(units) == pytest.approx(variance / square, rel=1e-12)


def test_estimated_shrinkage_tells_signal_from_noise() -> None:
    noise = torch.randn(500, 40, dtype=torch.float64)
    assert estimated_shrinkage(noise) > 0.9
    shared = torch.randn(500, 1, dtype=torch.float64) @ torch.randn(1, 40, dtype=torch.float64)
    assert estimated_shrinkage(shared + 0.1 * noise) < 0.1
    assert estimated_shrinkage(noise[:, :1]) == 1.0
    assert estimated_shrinkage(torch.zeros(3, 4, dtype=torch.float64)) == 1.0


def test_fewer_rows_than_units_are_shrunk_as_estimated_and_said_so_once() -> None:
    rows = correlated_rows((60, 40), 25)
    costs = chained_costs(rows)
    budget = 0.4 * costs.total()
    estimate = estimated_shrinkage(torch.cat([values.T for values in rows.values()]).double())
    assert 0.05 < estimate < 0.95
    with pytest.warns(UserWarning, match=r"25 rows are fewer than the units .* as many rows as units") as warned:
        by_rule = obc.select(rows, costs, budget)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert as_lists(by_rule) == as_lists(obc.select(rows, costs, budget, shrinkage=estimate))
    assert as_lists(by_rule) != as_lists(obc.select(rows, costs, budget, shrinkage=0.0))


@pytest.mark.filterwarnings("error")
def test_as_many_rows_as_units_are_taken_as_they_are_without_a_word() -> None:
    rows = correlated_rows((60, 40), 100)
    costs = chained_costs(rows)
    by_rule = obc.select(rows, costs, 0.4 * costs.total())
    assert as_lists(by_rule) == as_lists(obc.select(rows, costs, 0.4 * costs.total(), shrinkage=0.0))


@pytest.mark.filterwarnings("error")
def test_full_shrinkage_is_independent_selection() -> None:
    rows = correlated_rows((60, 40), 25)
    costs = chained_costs(rows)
    joint = obc.select(rows, costs, 0.4 * costs.total(), shrinkage=1.0)
    assert as_lists(joint) == as_lists(obc.select(rows, costs, 0.4 * costs.total(), selection="independent"))


# --- what goes in and comes out -----------------------------------------------------------------------------------


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
