"""Orders of channels found by running: where each input comes from, which units keep the order, models as written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from random_wirings import random_wired, zero_inputs

from obc.structures.influence import Source, influences
from obc.structures.traced import TorchPruningStructure
from obc.structures.units import NotPrunableError, divided

SIZE = 6


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("seed", range(20))
def test_every_input_of_a_random_wiring_is_traced_to_its_channel(seed: int) -> None:
    net = random_wired(seed)
    x = torch.randn(1, 6, SIZE, SIZE, dtype=torch.float64)
    names = [f"layers.{index}" for index in range(len(net.stages))]
    found, _ = influences(net, lambda model: model(x), {name: Source(name, 12) for name in names})
    for index, stage in enumerate(net.stages):
        truth = F.one_hot(torch.tensor(stage.sources(12, SIZE)), 12).bool()  # type: ignore[operator]
        inputs = found[names[index]].inputs
        assert {name for name in inputs if name.startswith("layers")} == {f"layers.{index + 1}"}
        torch.testing.assert_close(inputs[f"layers.{index + 1}"], truth)


class Between(nn.Module):
    """Two layers with something between, and perhaps other layers."""

    def __init__(self, between: Callable[..., Tensor], read: int, channels: int = 12, **others: nn.Module) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, channels, 3, padding=1)
        self.between, self.others = between, nn.ModuleDict(others)
        flat = between(torch.zeros(1, channels, 8, 8), self.others).dim() == 2
        self.b: nn.Module = nn.Linear(read, 8) if flat else nn.Conv2d(read, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.between(self.a(x), self.others)).relu()
        return self.head(x if x.dim() == 2 else x.mean((2, 3)))


def gate(x: Tensor, others: Any) -> Tensor:
    return x.relu() * others["f2"](others["f1"](x.relu().mean((2, 3), keepdim=True)).relu()).sigmoid().flip(1)


def squeeze() -> dict[str, nn.Module]:
    return {"f1": nn.Conv2d(12, 4, 1), "f2": nn.Conv2d(4, 12, 1)}


def residual(x: Tensor, others: Any) -> Tensor:
    return x.relu() + others["c"](x.relu()).flip(1)


def glu_halves(x: Tensor, others: Any) -> Tensor:
    return F.glu(x, 1)


def joined_flip(x: Tensor, others: Any) -> Tensor:
    return torch.cat([x.relu(), others["c"](x.relu()).relu()], 1).flip(1)


def residual_last(x: Tensor, others: Any) -> Tensor:
    x = x.relu() + others["c"](x.relu())
    return F.adaptive_avg_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1)


SAME = {"c": nn.Conv2d(12, 12, 3, padding=1)}
# Name -> (the model, units of the first layer, its channels in each).
WRITTEN: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "gate in another order": (lambda: Between(gate, 12, **squeeze()), 12, 1),
    "residual in another order": (lambda: Between(residual, 12, **copy.deepcopy(SAME)), 12, 1),
    "residual, channels last": (lambda: Between(residual_last, 48, **copy.deepcopy(SAME)), 12, 1),
    "concatenated with itself": (lambda: Between(lambda x, o: torch.cat([x, -x.flip(1)], 1).relu(), 24), 12, 1),
    "two layers, then a flip": (lambda: Between(joined_flip, 24, **copy.deepcopy(SAME)), 12, 1),
    "repeated": (lambda: Between(lambda x, o: x.relu().repeat(1, 2, 1, 1), 24), 12, 1),
    "gated halves": (lambda: Between(glu_halves, 6), 6, 2),
    "gated by halves in another order": (
        lambda: Between(lambda x, o: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].flip(1).sigmoid(), 6),
        6,
        2,
    ),
    "pixel shuffle": (lambda: Between(lambda x, o: F.pixel_shuffle(x.relu(), 2), 3), 3, 4),
    "pixel unshuffle": (lambda: Between(lambda x, o: F.pixel_unshuffle(x.relu(), 2), 48), 12, 1),
    "patches": (lambda: Between(lambda x, o: F.unfold(x.relu(), 4, stride=4).flatten(1), 768), 12, 1),
    "largest of neighbours": (lambda: Between(lambda x, o: x.unflatten(1, (-1, 3)).amax(2), 4), 4, 3),
    "largest of thirds": (lambda: Between(lambda x, o: x.unflatten(1, (3, -1)).amax(1), 4), 4, 3),
    "every second alone": (lambda: Between(lambda x, o: x.relu()[:, ::2], 6), 6, 2),
    "transposed convolution": (
        lambda: Between(lambda x, o: o["t"](x.relu().flip(1)).relu(), 8, t=nn.ConvTranspose2d(12, 8, 2, 2)),
        12,
        1,
    ),
}
TRACED = ("patches", "largest of neighbours")  # rightly, without probing
MIXED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "softmax over channels": lambda x, o: x.softmax(1),
    "normalised over channels": lambda x, o: F.normalize(x, dim=1),
    "less their mean": lambda x, o: x - x.mean(1, keepdim=True),
    "scaled by their number": lambda x, o: x.relu() / x.shape[1] ** 0.5,
    "products of pairs": lambda x, o: torch.einsum("bc,bd->bcd", x.mean((2, 3)), x.mean((2, 3))).flatten(1),
}


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("count", [1, 2])
def test_models_that_people_write_are_pruned_exactly(name: str, count: int) -> None:
    """Truth: what a layer loses of its inputs is zero there in the unpruned model."""
    build, size, width = WRITTEN[name]
    torch.manual_seed(0)
    net = build().double().eval()
    structure = TorchPruningStructure(copy.deepcopy(net), images())
    group = next(group for group in structure.groups if group.name == "a")
    assert (group.size, group.slices[0].channels.shape[1]) == (size, width)
    assert structure.proof is not None
    assert ("a" in structure.proof.probed) == (name not in TRACED)
    assert "a" in structure.proof.proved
    structure.remove({"a": torch.tensor([size - 1, 1][:count])})
    for part, kept in structure.plan.items():
        layer: Any = net.get_submodule(part)
        if kept.in_columns is not None and not isinstance(layer, nn.ConvTranspose2d):
            zero_inputs(layer, sorted(set(range(layer.weight.shape[1])) - set(kept.in_columns.tolist())))
        elif kept.in_columns is not None:
            layer.weight.data[sorted(set(range(len(layer.weight))) - set(kept.in_columns.tolist()))] = 0
    torch.testing.assert_close(structure.model(images()), net(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXED)
def test_channels_that_are_mixed_are_left_out(name: str) -> None:
    torch.manual_seed(0)
    read = {"products of pairs": 144}.get(name, 12)
    structure = TorchPruningStructure(Between(MIXED[name], read).double().eval(), images())
    assert [group.name for group in structure.groups] == ["b"]
    assert "a" in structure.left_out


def test_a_norm_that_keeps_its_channels_first() -> None:
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    for flip in (False, True):
        net = Between(lambda x, o, flip=flip: o["norm"](x.flip(1) if flip else x), 12, norm=ChannelsFirst(12))
        structure = TorchPruningStructure(net.double().eval(), images())
        assert structure.proof is not None
        assert structure.proof.proved == ["a", "b"]
        assert structure.proof.probed == (["a"] if flip else [])


def test_several_channels_are_told_from_one() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 2)).double()
    net[2].forward = lambda x: torch.cat([x.sum(2), x[:, 0]], 1)
    found, _ = influences(net, lambda model: model(torch.ones(2, 3).double()), {"0": Source("0", 4)})
    assert found["0"].inputs["3"].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0]]


def test_parts_stay_equally_wide() -> None:
    each, halves = torch.arange(8)[:, None], F.one_hot(torch.arange(8) // 4)
    assert divided(each, []).tolist() == each.tolist()
    assert divided(each, [halves]).tolist() == [[i, i + 4] for i in range(4)]
    uneven = F.one_hot(torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]))
    assert divided(each, [uneven]).tolist() == [[0, 5], [1, 6], [2, 7]]  # 3 and 4 stay
    # Halves and thirds of twelve: cells of 4, 2, 2 and 4 give in proportion.
    twelve = torch.arange(12)
    both = [F.one_hot(twelve // 6), F.one_hot(twelve // 4)]
    assert divided(twelve[:, None], both).tolist() == [[0, 1, 4, 6, 8, 9], [2, 3, 5, 7, 10, 11]]
    with pytest.raises(NotPrunableError, match="equally wide"):
        divided(each, [F.one_hot(torch.arange(8).clamp(max=1)), halves])


def test_layers_that_share_a_weight_must_pass_alone() -> None:
    """Groups whose layers share a weight may lose the same places in every try; alone they can't."""

    class Shared(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.e, self.m = nn.Linear(6, width), nn.Linear(width, width)
            self.o, self.h = nn.Linear(width, width, bias=False), nn.Linear(width, 5)
            self.o.weight = self.m.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.o(self.m(self.e(x).relu()).relu()).relu())

    for width in (2, 3, 4, 12):
        structure = TorchPruningStructure(Shared(width), torch.randn(4, 6))
        assert not structure.groups
        assert "are one parameter" in structure.left_out["m"]
