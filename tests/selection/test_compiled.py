"""The compiled steps of the greedy choice against the tensor operations that define them: the same units, ties too."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import obc
from obc.selection import Costs, choice, compiled, fronts
from obc.selection.choice import BudgetError
from obc.selection.compiled import FrontGreedy
from obc.selection.greedy import Greedy
from obc.selection.interactions import FORMS

if compiled._native is None:
    pytest.skip("obc's native module was not built", allow_module_level=True)


def both(rows: dict[str, Tensor], costs: object, share: float, **options: object) -> list[object]:
    """The choices of the compiled steps and of the tensor operations: units, or the most that can be freed."""
    total = costs.total() if isinstance(costs, Costs) else sum(_total(costs[name], rows[name]) for name in rows)
    chosen: list[object] = []
    for made in (compiled.greedy, Greedy):
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")
            patch.setattr(choice, "greedy", made)
            try:
                chosen.append({k: v.tolist() for k, v in obc.select(rows, costs, share * total, **options).items()})
            except BudgetError as error:
                chosen.append(pytest.approx(error.reachable))
    return chosen


def _total(cost: Tensor | float, rows: Tensor) -> float:
    return float(cost.sum()) if isinstance(cost, Tensor) else cost * rows.shape[-1]


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Tensor], object]:
    """Groups of units, some of them copies or opposites of others; costs of all three kinds."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    count = draw(st.integers(1, 24))
    widths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    rows = {}
    for place, width in enumerate(widths):
        values = torch.randn(count, width, generator=generator)
        if draw(st.booleans()):  # families: equal units, and units that cancel each other
            parents = torch.randint(max(1, width // 3), (width,), generator=generator)
            signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1
            values = values[:, parents] * signs
        if draw(st.booleans()):
            values = values.round()  # many exact ties
        rows[f"group {place}"] = values
    kind = draw(st.sampled_from(["polynomial", "group", "unit"]))
    if kind == "group":
        return rows, {name: float(place + 1) for place, name in enumerate(rows)}
    if kind == "unit":
        costs = {
            name: torch.randint(0, 4, (values.shape[1],), generator=generator).double() for name, values in rows.items()
        }
        return rows, {name: cost + (cost.sum() == 0) for name, cost in costs.items()}
    groups = len(widths)
    quadratic = torch.diag(torch.full((groups - 1,), 9.0), 1)
    linear = torch.zeros(groups)
    linear[0], linear[-1] = 27.0, 10.0
    return rows, Costs(list(rows), widths, linear=linear, quadratic=quadratic)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    problem=problems(),
    share=st.floats(0.05, 0.9),
    form=st.sampled_from(FORMS),
    selection=st.sampled_from(["joint", "independent"]),
    per_cost=st.booleans(),
    min_units=st.integers(1, 3),
    round_to=st.sampled_from([None, None, 2, 4]),
    shrinkage=st.sampled_from([None, 0.0, 0.3]),
)
def test_the_compiled_steps_choose_the_same(
    problem: tuple[dict[str, Tensor], object],
    share: float,
    form: str,
    selection: str,
    per_cost: bool,
    min_units: int,
    round_to: int | None,
    shrinkage: float | None,
) -> None:
    rows, costs = problem
    least = min(min_units, *(values.shape[1] for values in rows.values()))
    first, second = both(
        rows,
        costs,
        share,
        form=form,
        selection=selection,
        per_cost=per_cost,
        min_units=least,
        round_to=round_to,
        shrinkage=shrinkage,
    )
    assert first == second


@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_steps_choose_the_same_in_wide_groups(form: str) -> None:
    """Wider than the lanes of a step, more units than one block of columns."""
    torch.manual_seed(0)
    rows = {f"group {place}": torch.randn(40, width) for place, width in enumerate((1, 7, 8, 9, 333, 500))}
    costs = {name: float(place + 1) for place, name in enumerate(rows)}
    first, second = both(rows, costs, 0.6, form=form)
    assert first == second


def test_units_one_by_one_on_the_cpu_are_chosen_by_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(
        compiled.CompiledGreedy, "until", lambda self, budget: used.append(self) or (torch.tensor([0]), budget)
    )
    rows = {"a": torch.randn(20, 8)}
    obc.select(rows, {"a": 1.0}, 1.0)
    assert len(used) == 1
    obc.select(rows, {"a": 1.0}, 2.0, round_to=2)
    assert len(used) == 1


ROUNDS = {
    "one front": ((24, 4),),
    "fronts of one": ((1, 3), (1, 1)),
    "a front within a front": ((40, 16), (6, 2)),
    "fronts that are too large": ((8192, 128), (1024, 16)),
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds for problems of any size, with products of this dtype."""
    monkeypatch.setattr(fronts, "LARGE", 0)
    monkeypatch.setattr(fronts, "fast_dtype", lambda: request.param)
    monkeypatch.setattr(fronts, "FRONT_SHARE", 1.0)
    monkeypatch.setattr(fronts, "LEAST_STEPS", 1)
    monkeypatch.setattr(fronts, "PATIENCE", 3)
    monkeypatch.setattr(fronts, "ROWS_AT_ONCE", 37)


@pytest.mark.sampled(members=2)
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    problem=problems(),
    share=st.floats(0.05, 0.9),
    scale=st.sampled_from([1.0, 1e-30, 1e30]),
    per_cost=st.booleans(),
    min_units=st.integers(1, 3),
    shrinkage=st.sampled_from([None, 0.0, 0.3]),
)
def test_rounds_choose_the_same(
    rounds: tuple[tuple[int, int], ...],
    problem: tuple[dict[str, Tensor], object],
    share: float,
    scale: float,
    per_cost: bool,
    min_units: int,
    shrinkage: float | None,
) -> None:
    rows = {name: values.double() * scale for name, values in problem[0].items()}
    least = min(min_units, *(values.shape[1] for values in rows.values()))
    options = {"form": "blocked", "per_cost": per_cost, "min_units": least, "shrinkage": shrinkage}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fronts, "ROUNDS", rounds)
        first, second = both(rows, problem[1], share, **options)
    assert first == second


@pytest.mark.sampled(members=2)
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dead", [0, 300], ids=["", "dead units"])
@pytest.mark.parametrize("kind", ["random", "lengths", "equal", "opposite"])
def test_rounds_choose_the_same_among_many(kind: str, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More units than one product takes, of lengths that differ, or in families of equal or opposite units."""
    monkeypatch.setattr(fronts, "ROUNDS", ((96, 24), (16, 8)))
    torch.manual_seed(1)
    rows = {f"group {place}": torch.randn(48, width) for place, width in enumerate((7, 393, 500))}
    for name, values in rows.items():
        if kind == "lengths":
            rows[name] = values * torch.rand(values.shape[1]).mul(3).exp()
        elif kind != "random":
            parents = torch.randint(1 + values.shape[1] // 3, (values.shape[1],))
            signs = torch.randint(0, 2, (values.shape[1],)) * 2.0 - 1
            rows[name] = values[:, parents] * (signs if kind == "opposite" else 1.0)
    rows["group 2"][:, :dead] = 0
    made = []
    monkeypatch.setattr(compiled, "FrontGreedy", lambda *given: made.append(FrontGreedy(*given)) or made[-1])
    quadratic = torch.diag(torch.full((2,), 9.0), 1)
    costs = Costs(list(rows), [7, 393, 500], linear=torch.tensor([27.0, 0.0, 10.0]), quadratic=quadratic)
    least = {"group 0": 1, "group 1": 60, "group 2": 20}
    first, second = both(rows, costs, 0.7, form="blocked", min_units=least, shrinkage=0.1)
    assert first == second
    assert len(made) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-38, 1e-44])
def test_products_of_low_precision_stay_within_their_bound(dtype: torch.dtype, size: float) -> None:
    """Where all roundings have the same sign, and where entries are too small for the dtype."""
    torch.manual_seed(0)
    counts = torch.arange(1, 600)
    for count in counts.tolist():
        direction = torch.full((1, count), count**-0.5, dtype=torch.float64)
        sums = size * torch.cat([torch.tensor([0.50196, 0.99609, 1.0]), torch.rand(5)]).double().expand(count, 8)
        found = (direction.to(dtype) @ sums.to(dtype)).double()
        error = (found - direction @ sums).abs()[0]
        assert (error <= fronts.product_slack(sums.norm(dim=0), count)).all(), count


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("exponent", [-320, -170, -160, -150, -100])
def test_directions_have_at_most_length_one(exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows whose squares are zero in float64."""
    made: list[FrontGreedy] = []
    monkeypatch.setattr(compiled, "FrontGreedy", lambda *given: made.append(FrontGreedy(*given)) or made[-1])
    torch.manual_seed(0)
    rows = {"a": torch.randn(40, 60, dtype=torch.float64)}
    rows["a"][:, 30:] *= 10.0**exponent
    first, second = both(rows, {"a": 1.0}, 0.8, form="blocked", shrinkage=0.1)
    assert first == second
    assert made[0]._field._units.directions.double().norm(dim=1).max() < 1.01


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_rounds_are_for_many_units_or_many_rows(fast: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fronts, "fast_dtype", lambda: fast)
    small = fronts.SMALL_ROUNDS if fast is torch.bfloat16 else ()
    assert fronts.rounds_for(1 << 15, 17) == fronts.ROUNDS
    assert fronts.rounds_for(20_000, 512) == small
    assert fronts.rounds_for(20_000, 64) == fronts.rounds_for(10_000, 512) == ()
    assert all(fronts.fitting([fronts.Pace(*size)], fronts.SMALL) for size in fronts.SMALL_ROUNDS)


def test_large_problems_on_the_cpu_are_solved_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that most steps of a round are kept, without which rounds cost more than they save."""
    monkeypatch.setattr(fronts, "LARGE", 2000)
    monkeypatch.setattr(fronts, "ROUNDS", ((400, 32),))
    kept: list[tuple[int, int]] = []
    learn = fronts.Pace.learn
    monkeypatch.setattr(fronts.Pace, "learn", lambda pace, *found: kept.append(found) or learn(pace, *found))
    torch.manual_seed(0)
    rows = {"a": torch.randn(40, 1000), "b": 3 * torch.randn(40, 1000)}
    removed = obc.select(rows, {"a": 1.0, "b": 2.0}, 600.0, form="blocked", shrinkage=0.2)
    tried, useful = (sum(values) for values in zip(*kept, strict=True))
    assert useful == sum(map(len, removed.values()))
    assert useful > tried / 2
    kept.clear()
    obc.select({"a": rows["a"]}, {"a": 1.0}, 100.0, form="blocked", shrinkage=0.2)
    assert not kept, "so few units need no rounds"
