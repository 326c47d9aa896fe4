"""The use of joint selection, the forms of its Gram matrix, and shrinkage."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from plain_selection import as_lists, chained_costs, correlated_rows

import obc
from obc.selection import Costs, choice, interactions
from obc.selection.compiled import CompiledGreedy
from obc.selection.greedy import Greedy
from obc.selection.interactions import (
    BlockedGram,
    FullGram,
    RowsOnly,
    Standing,
    choose_form,
    estimated_shrinkage,
    products_within,
)

# Small cases have few rows and narrow groups; other tests check the warnings about this.
pytestmark = pytest.mark.filterwarnings(
    "ignore:fewer than a tenth:UserWarning",
    "ignore:.* rows are fewer:UserWarning",
    "ignore:all :UserWarning",
    "ignore:removing units:UserWarning",
)


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


def test_every_form_gives_the_columns_of_the_gram_matrix() -> None:
    units = torch.randn(300, 20, dtype=torch.float64)
    gram = units @ units.T
    standing = Standing(torch.rand(300, dtype=torch.float64), torch.ones(300, dtype=torch.float64), 2.0)
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
        standing.increments[picks[valid]] = torch.inf
        for columns in forms:
            torch.testing.assert_close(columns(picks, valid, lambda: standing), expected)


@pytest.mark.parametrize("max_bytes", [0, 2**20], ids=["from rows", "from blocks"])
def test_products_within_groups(max_bytes: int) -> None:
    sizes = [3, 1, 5]
    units = torch.randn(9, 4, dtype=torch.float64)
    picks = torch.tensor([1, 3, 8])
    unit_groups = picks.repeat_interleave(torch.tensor(sizes))
    expected = (units * units[unit_groups]).sum(1)
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
    with pytest.warns(UserWarning, match=r"25 rows are fewer than the \d+ units .* more batches") as warned:
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


@pytest.mark.parametrize("kind", ["random", "equal rows", "opposite rows", "whole numbers"])
@pytest.mark.parametrize("front", [1, 16, 400], ids=lambda front: f"front of {front}")
def test_foreseeing_columns_changes_no_choice(kind: str, front: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "greedy", Greedy)
    monkeypatch.setattr(interactions, "FORESEEN_UNITS", 0)
    monkeypatch.setattr(interactions, "FRONT_SHARE", 0.0)
    monkeypatch.setattr(interactions, "LEAST_FRONT", front)
    generator = torch.Generator().manual_seed(front)
    rows = {f"group {place}": torch.randn(24, width, generator=generator) for place, width in enumerate((7, 93, 300))}
    for name, values in rows.items():
        if kind in ("equal rows", "opposite rows"):
            parents = torch.randint(1 + values.shape[1] // 3, (values.shape[1],), generator=generator)
            signs = torch.randint(0, 2, (values.shape[1],), generator=generator) * 2.0 - 1
            rows[name] = values[:, parents] * (signs if kind == "opposite rows" else 1.0)
        elif kind == "whole numbers":
            rows[name] = values.round()
    widths = [values.shape[1] for values in rows.values()]
    quadratic = torch.diag(torch.full((2,), 9.0), 1)
    costs = Costs(list(rows), widths, linear=torch.tensor([27.0, 0.0, 10.0]), quadratic=quadratic)
    least = {"group 0": 1, "group 1": 60, "group 2": 20}
    chosen = [
        as_lists(obc.select(rows, costs, 0.7 * costs.total(), form=form, min_units=least))
        for form in ("full", "blocked")
    ]
    assert chosen[0] == chosen[1]


def test_foreseen_columns_are_those_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """At costs that do not change, and a front of all units, a greedy choice is foreseen exactly."""
    monkeypatch.setattr(choice, "greedy", CompiledGreedy)
    monkeypatch.setattr(interactions, "FORESEEN_UNITS", 0)
    fills = []
    fill = BlockedGram._fill
    monkeypatch.setattr(BlockedGram, "_fill", lambda *arguments: fills.append(fill(*arguments)))
    rows = {"a": torch.randn(40, 300), "b": torch.randn(40, 300)}
    removed = obc.select(rows, {"a": 1.0, "b": 2.0}, 450.0, form="blocked")
    assert len(fills) == math.ceil(sum(map(len, removed.values())) / interactions.BLOCK)
