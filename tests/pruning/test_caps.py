"""How much a group may lose: caps by group or block, and blocks at the ends that lose nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import obc
from obc.selection.caps import Caps
from obc.selection.choice import BudgetError
from obc.selection.search import Search


def llama() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval(), [torch.randint(50, (2, 8)) for _ in range(4)]


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def widths(share: float, **options: Any) -> dict[str, tuple[int, int]]:
    model, batches = llama()
    result = obc.prune(model, None, batches, loss, blocks=share, steps=1, verify=False, progress=False, **options)
    return result.report.widths


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize(
    ("criterion", "allocation"),
    [
        ("jacobian", "global"),
        ("l2", "global"),
        ("l2", "uniform"),
        ("l2", Search(generations=1, offspring=2, batches=1)),
    ],
)
def test_no_group_loses_more_than_its_cap(criterion: str, allocation: Any) -> None:
    for before, after in widths(0.7, allocation=allocation, criterion=criterion, max_pruning_ratio=0.5).values():
        assert after >= before - math.floor(before * 0.5 + 1e-9)


def test_caps_by_name_of_a_group_or_a_block() -> None:
    free = widths(0.5)
    name = min((name for name in free if "mlp" in name), key=lambda name: free[name][1])
    assert free[name][1] < 36
    block = name.rpartition(".mlp")[0]
    for cap in ({name: 0.1}, {block: 0.1}):
        found = widths(0.5, max_pruning_ratio=cap)
        assert found[name][1] >= 36
        assert any(after < 0.6 * before for before, after in found.values())  # others make up for it


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize(("protected", "ends"), [(1, (1, 1)), ((2, 0), (2, 0)), ((0, 3), (0, 3))])
def test_protected_blocks_lose_nothing(protected: Any, ends: tuple[int, int]) -> None:
    found = widths(0.8, protected_blocks=protected)
    spared = {*range(ends[0]), *range(5 - ends[1], 5)}
    lost = {int(name.split(".")[2]) for name, (before, after) in found.items() if after < before}
    assert lost
    assert not lost & spared


def test_more_protected_blocks_than_there_are_protect_all() -> None:
    assert Caps.of(1.0, (0, 7)).least({f"layers.{i}.mlp": 4 for i in range(3)}) == {
        f"layers.{i}.mlp": 4 for i in range(3)
    }


@pytest.mark.parametrize("selection", ["joint", "independent"])
def test_select_takes_the_same_caps(selection: Any) -> None:
    torch.manual_seed(0)
    sizes = {f"layers.{i}.mlp": 20 for i in range(4)}
    rows = {name: torch.randn(200, size) * (1 + place) for place, (name, size) in enumerate(sizes.items())}
    costs = dict.fromkeys(sizes, 1.0)

    def lost(**options: Any) -> list[int]:
        removed = obc.select(rows, costs, 24, selection=selection, **options)
        assert sum(map(len, removed.values())) == 24
        return [len(units) for units in removed.values()]

    assert lost()[0] > 16
    assert max(lost(max_pruning_ratio=0.5)) <= 10
    assert lost(max_pruning_ratio={"layers.0": 0.25})[0] <= 5
    assert lost(protected_blocks=(1, 0))[0] == 0
    assert lost(protected_blocks=1)[0] == lost(protected_blocks=1)[3] == 0
    with pytest.raises(BudgetError, match="at most 16 can be freed"):
        lost(max_pruning_ratio=0.2)
    with pytest.raises(ValueError, match=r"no group is named 'layers\.9'"):
        lost(max_pruning_ratio={"layers.9": 0.2})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_pruning_ratio": 0.3}, r"out of reach: 0\.8\d* remain"),
        ({"max_pruning_ratio": 1.5}, r"\[0, 1\], got 1\.5"),
        ({"max_pruning_ratio": {"model.layers.0": -1}}, "got -1 for 'model.layers.0'"),
        ({"max_pruning_ratio": {"layers.0": 0.5}}, "no group is named 'layers.0'; there are model.layers.0"),
        ({"protected_blocks": (1, 2, 3)}, r"\(first, last\), got \(1, 2, 3\)"),
        ({"protected_blocks": -1}, "got -1"),
        ({"protected_blocks": 3}, "out of reach"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        widths(0.5, **options)
