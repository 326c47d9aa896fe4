"""Modules that hold counts of what is pruned, under any name: widths of splits, heads, hidden sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

LENGTH, FEATURES = 7, 12


class Attention(nn.Module):
    """Heads with names that no family has; ``kept`` are the heads that count, for the expected values."""

    def __init__(self) -> None:
        super().__init__()
        self.branches, self.each, self.kept = 4, 6, torch.ones(4)
        self.stem = nn.Linear(FEATURES, 20)
        self.ask, self.hold, self.give = (nn.Linear(20, 24) for _ in range(3))
        self.mix, self.head = nn.Linear(24, 20), nn.Linear(20, 5)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.branches, self.each).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        q, k, v = (self.split(layer(x)) for layer in (self.ask, self.hold, self.give))
        mixed = (q @ k.mT).softmax(-1) @ v * self.kept[: self.branches, None, None]
        return self.head(x + self.mix(mixed.transpose(1, 2).flatten(2)))

    def without(self, gone: Tensor) -> None:
        self.kept[gone] = 0


class InAShape(Attention):
    """The same, with the heads in a tuple, and the width of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.inner = (4, 6), 24

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], *self.shape).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        q, k, v = (self.split(layer(x)) for layer in (self.ask, self.hold, self.give))
        mixed = (q @ k.mT).softmax(-1) @ v * self.kept[: self.shape[0], None, None]
        return self.head(x + self.mix(mixed.transpose(1, 2).reshape(*x.shape[:2], self.inner)))


class Recurrent(nn.Module):
    """A recurrent cell by hand, with its hidden size."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.keeps = 10, torch.ones(10)
        self.reads, self.repeats, self.head = nn.Linear(FEATURES, 40), nn.Linear(10, 40), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = cell = x.new_zeros(len(x), self.hidden)
        for step in range(x.shape[1]):
            i, f, g, o = (self.reads(x[:, step]) + self.repeats(state)).split(self.hidden, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh() * self.keeps[: self.hidden]
        return self.head(state)

    def without(self, gone: Tensor) -> None:
        self.keeps[gone] = 0


class Pieces(nn.Module):
    """A split by a list of widths; each unit takes channels of every piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces, self.keeps = [4, 4, 8], torch.ones(16)
        self.stem, self.one, self.other = nn.Linear(FEATURES, 16), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)) * (self.keeps if len(self.stem.weight) == 16 else 1)
        a, b, c = torch.split(x, self.pieces, -1)
        y = torch.cat([self.one(a), self.other(b).tanh(), c], -1)
        y = self.last(y) * (self.keeps if len(self.stem.weight) == 16 else 1)
        return self.head(F.relu(x + y))

    def without(self, gone: Tensor) -> None:
        self.keeps[gone] = 0


# Class -> (the group's first layer, what its counts are without two units).
EXPECTED: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    Attention: ("ask", {"branches": 2}),
    InAShape: ("ask", {"shape": [2, 6], "inner": 12}),
    Recurrent: ("reads", {"hidden": 8}),
    Pieces: ("stem", {"pieces": [2, 2, 6]}),
}


def built(kind: type[nn.Module]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return kind().double().eval(), torch.randn(2, LENGTH, FEATURES, dtype=torch.float64)


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_counts_follow_the_units_and_the_plan_holds_them(kind: type[nn.Module], tmp_path: Path) -> None:
    model, x = built(kind)
    first, counts = EXPECTED[kind]
    masked, other = copy.deepcopy(model), torch.randn(3, LENGTH, FEATURES, dtype=torch.float64)
    structure = TorchPruningStructure(copy.deepcopy(model), x)
    group = next(group for group in structure.groups if group.name == first)
    gone = torch.tensor([0, 2])
    masked.without(group.slices[0].channels[gone].flatten() if isinstance(model, Pieces) else gone)
    structure.remove({first: gone})
    torch.testing.assert_close(structure.model(other), masked(other), rtol=1e-10, atol=1e-12)
    assert structure.plan.counts == {"": counts}

    structure.plan.save(tmp_path / "plan.json")
    again = obc.PruningPlan.load(tmp_path / "plan.json").apply(copy.deepcopy(model))
    again.load_state_dict(structure.model.state_dict())
    assert torch.equal(again(other), structure.model(other))
    for name in counts:
        assert type(getattr(again, name)) is type(getattr(model, name))


class Usual(nn.Module):
    """An attention with the usual names whose ``embed_dim`` is the width that it reads, however many heads it has."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.scaled = 24, 4, 6, scaled
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if not self.scaled and x.shape[-1] != self.embed_dim:
            raise ValueError(f"expected a width of {self.embed_dim}")
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = (q @ k.mT * (self.embed_dim if self.scaled else self.head_dim) ** -0.5).softmax(-1) @ v
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("scaled", [False, True], ids=["checks its width", "is scaled by its width"])
def test_a_plan_sets_the_counts_that_were_proved_and_no_others(scaled: bool, tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attention, self.head = nn.Linear(FEATURES, 24), Usual(scaled), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.attention(x))

    model, x = built(Residual)
    masked = copy.deepcopy(model)
    structure = TorchPruningStructure(copy.deepcopy(model), x)
    name = next(group.name for group in structure.groups if group.kind == "heads")
    structure.remove({name: torch.tensor([1, 3])})
    with torch.no_grad():
        masked.attention.out_proj.weight.unflatten(1, (4, 6))[:, [1, 3]] = 0
    structure.plan.save(tmp_path / "plan.json")
    again = obc.PruningPlan.load(tmp_path / "plan.json").apply(model)
    again.load_state_dict(structure.model.state_dict())
    for pruned in (structure.model, again):
        torch.testing.assert_close(pruned(x), masked(x), rtol=1e-10, atol=1e-12)
    assert again.attention.embed_dim == 24


def test_heads_and_the_stream_whose_width_the_heads_take_shrink_together() -> None:
    class OfTheStream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = 4
            self.stem, self.all = nn.Linear(FEATURES, 24), nn.Linear(24, 72)
            self.back, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.stem(x))
            b, n, c = x.shape
            q, k, v = self.all(x).view(b, n, 3, self.parts, c // self.parts).permute(2, 0, 3, 1, 4)
            y = (q @ k.mT).softmax(-1) @ v
            return self.head(x + self.back(y.transpose(1, 2).reshape(b, n, c)))

    model, x = built(OfTheStream)
    structure = TorchPruningStructure(model, x)
    (group,) = structure.groups
    structure.remove({group.name: torch.tensor([1, 3])})
    assert model.all.weight.shape == (48, 16)
    assert model(x).shape == (2, LENGTH, 5)


def test_a_count_of_two_groups_keeps_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.one, self.other = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            one, other = (F.relu(layer(x)).reshape(-1, self.width) for layer in (self.one, self.other))
            return self.head(torch.cat([one, other], -1))

    model, x = built(Shared)
    structure = TorchPruningStructure(model, x)
    assert not structure.groups
    assert {"one", "other"} <= structure.left_out.keys()


def test_a_plan_whose_counts_do_not_fit_is_refused(tmp_path: Path) -> None:
    model, _ = built(Pieces)
    for counts, said in (
        ({"gone": 3}, "the plan sets the number 'gone', which the model lacks"),
        ({"pieces": [1, 2]}, "the plan sets the 2 numbers 'pieces', which the model lacks"),
        ({"pieces": 3}, "the plan sets the number 'pieces', which the model lacks"),
    ):
        with pytest.raises(obc.PlanError) as error:
            obc.PruningPlan(counts={"": counts}).apply(model)
        assert str(error.value).startswith(said)
    path = tmp_path / "plan.json"
    path.write_text('{"format": "obc.PruningPlan", "version": 1, "layers": {}, "counts": {"a": {"x": [1.5]}}}')
    with pytest.raises(obc.PlanError, match="damaged"):
        obc.PruningPlan.load(path)
