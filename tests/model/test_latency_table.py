"""Curves and latency tables: against numbers worked out by hand, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from obc.model.costs import Costs
from obc.model.curves import Curve
from obc.model.groups import ChannelGroup, Slice
from obc.model.latency_table import LatencyTable, LatencyTableError, SharedSeconds


def group(name: str, size: int, kind: str = "channels") -> ChannelGroup:
    return ChannelGroup(name, (Slice(name, "out", torch.arange(size)[:, None]),), kind)


def test_between_two_widths_the_curve_is_a_line() -> None:
    curve = Curve({4: 1.0, 8: 3.0, 16: 4.0})
    assert [curve.at(width) for width in (0, 3, 4, 5, 6, 8, 10, 16)] == [1, 1, 1, 1.5, 2, 3, 3.25, 4]
    assert curve.dense(16).tolist() == [curve.at(width) for width in range(17)]
    with pytest.raises(ValueError, match="ends at width 16, got 17"):
        curve.at(17)


def test_values_that_fall_as_the_width_grows_are_pooled() -> None:
    # 2 and 4 are out of order: their mean. Then 3 and 1: their mean is below it, so that all four are one pool.
    assert Curve({1: 4.0, 2: 2.0, 3: 5.0}).values == (3, 3, 5)
    assert Curve({1: 4.0, 2: 2.0, 3: 3.0, 4: 1.0, 5: 6.0}).values == (2.5, 2.5, 2.5, 2.5, 6)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_a_pooled_curve_is_the_nearest_that_never_falls(values: list[int]) -> None:
    found = np.array(Curve({place + 1: float(value) for place, value in enumerate(values)}).values)
    assert (np.diff(found) >= 0).all()
    # The max-min formula of isotonic regression: over left ends the largest of the smallest means over right ends.
    wanted = [
        max(min(np.mean(values[a : b + 1]) for b in range(place, len(values))) for a in range(place + 1))
        for place in range(len(values))
    ]
    assert found == pytest.approx(wanted)


def test_rates_look_past_a_flat_part() -> None:
    curve = Curve({2: 1.0, 4: 1.0, 6: 3.0, 8: 3.0})
    #                  width: 0  1  2  3  4  5  6  7    8
    assert curve.rates(8).tolist() == [0, 0, 0, 0, 0, 1, 1, 2 / 3, 0.5]
    assert curve.rates(8, lowest=5).tolist() == [0, 0, 0, 0, 0, 0, 1, 0.5, 1 / 3]


@given(
    points=st.dictionaries(st.integers(0, 12), st.integers(0, 20), min_size=1),
    lowest=st.integers(0, 6),
)
def test_rates_are_the_best_over_all_smaller_widths(points: dict[int, int], lowest: int) -> None:
    curve = Curve({width: float(value) for width, value in points.items()})
    size = curve.widest
    wanted = [max([0.0, *((curve.at(w) - curve.at(v)) / (w - v) for v in range(lowest, w))]) for w in range(size + 1)]
    assert curve.rates(size, lowest).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "at least one point"),
        ({-1: 1.0}, "integers from 0 on, got -1"),
        ({1: -2.0}, "not negative, got -2.0 at 1"),
        ({3: math.nan}, "finite and not negative, got nan at 3"),
    ],
)
def test_a_curve_refuses(points: dict[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(points)


# --- costs with curves ------------------------------------------------------------------------------------------


def test_costs_with_curves_by_hand() -> None:
    curve = Curve({2: 0.5, 4: 1.0})
    quadratic = torch.tensor([[0.0, 6.0], [0.0, 0.0]])
    costs = Costs(
        ["a", "b"], [4, 3], constant=1, linear=torch.tensor([8.0, 2.0]), quadratic=quadratic, curves={"a": curve}
    )
    assert costs.total() == 1 + 8 * 1 + 2 * 3 + 6 * 1 * 3
    assert costs.total(torch.tensor([2, 3])) == 1 + 8 * 0.5 + 2 * 3 + 6 * 0.5 * 3
    assert costs.freed({"a": 1, "b": 1}) == costs.total() - (1 + 8 * 0.75 + 2 * 2 + 6 * 0.75 * 2)
    assert costs.marginal().tolist() == [costs.freed({"a": 1}), costs.freed({"b": 1})]
    assert costs.only(["b"]).total() == costs.total()
    assert costs.only(["b"]).freed({"b": 2}) == costs.freed({"b": 2})
    with pytest.raises(ValueError, match="the curve of 'b' ends at width 2; the group has 3 units"):
        Costs(["b"], [3], curves={"b": Curve({2: 1.0})})
    with pytest.raises(ValueError, match="curves= names 'c'"):
        Costs(["b"], [3], curves={"c": Curve({3: 1.0})})


def test_a_block_takes_what_its_groups_take_at_width_0() -> None:
    costs = Costs(
        ["block", "inner"],
        [1, 4],
        linear=torch.tensor([3.0, 10.0]),
        inside={"block": ["inner"]},
        curves={"inner": Curve({2: 0.5, 4: 1.0})},
    )
    assert costs.total() == 13
    assert costs.freed({"inner": 4}) == 5  # its layers are still there
    assert costs.freed({"block": 1}) == 13
    assert costs.marginal().tolist() == [13, 2.5]


# --- tables --------------------------------------------------------------------------------------------------------

TABLE = LatencyTable(
    {"conv1": {4: 2.0, 8: 4.0}, "conv2": {1: 1.0, 2: 3.0}},
    rest=0.5,
    shared=[SharedSeconds(("conv1", "conv2"), 1.0)],
)


def test_a_layer_that_two_groups_share_counts_once() -> None:
    costs = TABLE.costs([group("conv1", 8), group("conv2", 2)])
    assert costs.unit == "seconds"
    assert costs.total() == 0.5 + 4 + 3 - 1
    # One group alone: exactly what the table says of it.
    assert costs.freed({"conv1": 2}) == 1
    assert costs.freed({"conv2": 1}) == pytest.approx(2)
    # Both: own parts 3 p and 2 q, shared 1 p q.
    assert costs.freed({"conv1": 4, "conv2": 1}) == pytest.approx(6 - (3 * 0.5 + 2 / 3 + 0.5 / 3))


def test_costs_after_a_step_go_on_from_there() -> None:
    whole, later = (TABLE.costs([group("conv1", size), group("conv2", 2)]) for size in (8, 5))
    assert later.total() == whole.total() - whole.freed({"conv1": 3})
    assert later.freed({"conv1": 1}) == pytest.approx(0.5)
    # A group without units is gone, so the other one costs what it takes on its own.
    assert TABLE.costs([group("conv2", 2)]).total() == 3.5


def test_a_block_has_what_its_groups_do_not_account_for() -> None:
    table = LatencyTable({"ffn": {2: 1.0, 4: 2.0}, "0.attention": {1: 1.5}, "0": {1: 5.0}})
    groups = [group("ffn", 4), group("0.attention", 1, "sublayers"), group("0", 1, "layers")]
    costs = table.costs(groups, {"0": ["ffn", "0.attention"], "0.attention": []})
    assert costs.total() == 5
    assert costs.freed({"0.attention": 1}) == 1.5
    assert costs.freed({"ffn": 2}) == 1
    assert costs.freed({"0": 1}) == 5


def test_save_and_load(tmp_path: Path) -> None:
    table = LatencyTable(
        {"a": {1: 0.25, 16: 1.0}}, 0.1, [SharedSeconds(("a", "a"), 0.5)], "cpu", "bfloat16", 2, [[4, 128]]
    )
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert loaded == table
    assert loaded.seconds["a"][16] == 1.0
    assert "cpu, bfloat16, 2 threads, inputs 4x128" in str(loaded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a latency table"),
        ('{"format": "other"}', "its format is not 'obc.LatencyTable/1'"),
        ('{"format": "obc.LatencyTable/1"}', "has no 'seconds'"),
        ('{"format": "obc.LatencyTable/1", "seconds": {"a": {"wide": 1.0}}}', "not a latency table"),
        ('{"format": "obc.LatencyTable/1", "seconds": {"a": {"4": -1.0}}}', "'a': the values of a curve"),
        ('{"format": "obc.LatencyTable/1", "seconds": {"a": {}}}', "'a': a curve needs at least one point"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(LatencyTableError, match=message):
        LatencyTable.load(path)


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(LatencyTableError, match=r"no group 'conv3' \(it has 'conv1', 'conv2'\)"):
        TABLE.costs([group("conv3", 8)])
    with pytest.raises(LatencyTableError, match="ends at 8 units of 'conv1', which has 9"):
        TABLE.costs([group("conv1", 9)])
    with pytest.raises(LatencyTableError, match="ends at 2 units of 'conv2', which has 3"):
        TABLE.at("conv2", 3)
    with pytest.raises(LatencyTableError, match="lists 'b' among shared layers, but has no seconds for it"):
        LatencyTable({"a": {1: 1.0}}, shared=[SharedSeconds(("a", "b"), 1.0)])
    with pytest.raises(LatencyTableError, match="not negative, got -1"):
        LatencyTable({"a": {1: 1.0}}, rest=-1.0)


def test_a_table_of_another_device_is_refused() -> None:
    other = LatencyTable({"a": {1: 1.0}}, device="NVIDIA H100")
    with pytest.raises(LatencyTableError, match=r"measured on 'NVIDIA H100', and the model is on 'cpu'.*device=None"):
        other.check_device(nn.Linear(2, 2))
    TABLE.check_device(nn.Linear(2, 2))  # says no device
    LatencyTable(json.loads('{"a": {}}') | {"a": {1: 1.0}}, device="cpu").check_device(nn.Linear(2, 2))
