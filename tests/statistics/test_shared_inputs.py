"""Gram matrices are packed triangles; layers that read the same tensor share its sums, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers_families as families
from torch import Tensor, nn

from obc.model.experts import fused_experts
from obc.model.groups import ChannelGroup, Slice
from obc.statistics import Gram, routed, triangle
from obc.statistics.part import Part
from obc.statistics.run import collect
from obc.statistics.triangle import Triangle

STATISTICS = ["moments", "gram"]


@pytest.mark.parametrize("width", [1, 5, 127, 128, 129, 300, 2050])
@pytest.mark.parametrize("half", [True, False])
def test_triangles_hold_symmetric_products(width: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "computes_half", lambda device: half)
    packing = Triangle(width)
    torch.manual_seed(width)
    x, y = torch.randn(7, width, dtype=torch.float64), torch.randn(width, 3, dtype=torch.float64).mT
    omega = torch.rand(7, 1, dtype=torch.float64)
    packed = torch.full((packing.numbers,), float("nan"), dtype=torch.float64)
    packing.add_product(packed, x * omega, x, beta=0)
    packing.add_product(packed, y, y, beta=1)
    expected = (x * omega).mT @ x + y.mT @ y
    whole = packing.unpacked(packed)
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole, whole.mT)
    assert torch.equal(packing.diagonal(packed), whole.diagonal())
    assert packing.numbers <= (width**2 if width < 256 else 0.75 * width**2)


class Attention(nn.Module):
    """Three layers that are given the same tensor, or tensors that look the same."""

    def __init__(self, between: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.between, self.calls = between, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total = torch.zeros_like(x)
        for index, layer in enumerate(self.layers):
            x = self.between(x, self.calls + index)
            total = total + layer(x)
        self.calls += 1
        return total


def _scaled_once(x: Tensor, index: int) -> Tensor:
    return x.detach().mul_(2.0) if index == 1 else x


def _in_place(x: Tensor, index: int) -> Tensor:
    with torch.no_grad():
        return x.mul_(2.0) if index == 1 else x


# How the input goes on from one layer to the next, and whether the first two layers share in the first batch.
BETWEEN: dict[str, tuple[Callable[[Tensor, int], Tensor], bool]] = {
    "the same": (lambda x, index: x, True),
    "equal": (lambda x, index: x.clone(), False),
    "changed in place": (_in_place, False),
    "changed in place, another tensor": (_scaled_once, False),
    "shared in some batches": (lambda x, index: x * (1 + index) if index in (2, 3) else x, True),
}


def oracle(model: Attention, batches: list[Tensor]) -> dict[str, Tensor]:
    """Gram matrices in float64, from inputs that are copied as they come."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].detach().double().flatten(0, -2)
            found[name] = found.get(name, 0) + x.mT @ x

        return add

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.calls = 0
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    model.calls = 0
    return found


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_layers_share_only_what_is_the_same(name: str, backward: bool, micro_batch: int | None) -> None:
    between, shares = BETWEEN[name]
    torch.manual_seed(0)
    model = Attention(between)
    batches = [torch.randn(4, 5, 4) for _ in range(3)]
    parts = batches if micro_batch is None else [part for batch in batches for part in batch.split(micro_batch)]
    expected = oracle(model, parts)
    loss = (lambda model, batch: model(batch).square().mean()) if backward else None
    statistics = [*STATISTICS, *(["gradient_moments"] if backward else [])]
    got = collect(model, batches, loss, statistics=statistics, micro_batch=micro_batch, progress=False)
    assert set(got.gram) == set(expected)
    for layer, total in expected.items():
        torch.testing.assert_close(got.gram[layer].total, total, rtol=1e-5, atol=1e-5 * float(total.abs().max()))
        torch.testing.assert_close(got.moments[layer].square, total.diagonal(), rtol=1e-5, atol=1e-6)
        assert got.gram[layer].count == got.moments[layer].count == sum(len(p) * 5 for p in parts)
    if name != "shared in some batches":
        together = got.gram["layers.0"].total is got.gram["layers.1"].total
        assert together == shares


def test_readers_share_one_copy_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes alone count no changes of tensors: what was read is compared with a copy, one for all readers."""
    copies: list[Tensor] = []
    copy_of = Part.copy_of

    def noting(self: Part, x: Tensor) -> Tensor:
        copies.append(copy_of(self, x))
        return copies[-1]

    monkeypatch.setattr(Part, "copy_of", noting)
    collect(Attention(lambda x, index: x), [torch.randn(4, 5, 4)], statistics=STATISTICS, progress=False)
    assert len(copies) == len(STATISTICS), (
        "each asks once for what three layers are given; the batch counts its changes"
    )
    assert len(set(map(id, copies))) == 1


def test_a_copy_is_of_the_tensor_as_it_is() -> None:
    part = Part()
    with torch.inference_mode():
        x = torch.arange(3.0)
        first = part.copy_of(x)
        assert part.copy_of(x) is first
        assert part.copy_of(x.clone()) is not first
        first = part.copy_of(x)
        x += 1
        assert torch.equal(part.copy_of(x), torch.tensor([1.0, 2.0, 3.0]))
        assert torch.equal(first, torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("backward", [False, True])
def test_query_key_and_value_are_one_product(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are those of each layer read alone, bit for bit."""
    case = models.llama()
    add, products = Triangle.add_product, []

    def noting(self: Triangle, *args: Any, **kwargs: Any) -> None:
        products.append(self.width)
        add(self, *args, **kwargs)

    monkeypatch.setattr(Triangle, "add_product", noting)
    loss = case.loss if backward else None
    got = collect(case.model, case.batches, loss, statistics=[Gram()])
    layers = case.model.config.num_hidden_layers
    assert len(got.gram) == 7 * layers + 1
    assert len(products) == (4 * layers + 1) * len(case.batches)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = f"model.layers.0.self_attn.{name}"
        group = ChannelGroup(name, (Slice(layer, "in", torch.arange(case.model.config.hidden_size).unsqueeze(1)),))
        alone = collect(case.model, case.batches, loss, statistics="gram", groups=[group])
        assert torch.equal(alone.gram[layer].total, got.gram[layer].total)


@pytest.mark.parametrize("statistics", [["moments"], ["moments", "gram"], ["gradient_moments", "gram", "moments"]])
def test_inputs_of_experts_are_computed_once_for_all_readers(
    statistics: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = families.FAMILIES["mixtral"]()
    case.model.set_experts_implementation("eager")
    alone = {one: getattr(collect(case.model, case.batches, case.loss, statistics=one), one) for one in statistics}
    computed: list[int] = []
    original = routed.routed_input

    def counted(module: Any, expert: int, *arguments: Any) -> Any:
        computed.append(expert)
        return original(module, expert, *arguments)

    monkeypatch.setattr(routed, "routed_input", counted)
    together = collect(case.model, case.batches, case.loss, statistics=statistics)
    mixtures = [module for module in case.model.modules() if fused_experts(module) is not None]
    experts = sum(routed.expert_count(module) for module in mixtures)
    assert len(computed) == experts * len(case.batches)
    for one, found in alone.items():
        for name, value in found.items():
            for field, got in vars(getattr(together, one)[name]).items():
                assert torch.equal(torch.as_tensor(got), torch.as_tensor(getattr(value, field))), (one, name, field)
