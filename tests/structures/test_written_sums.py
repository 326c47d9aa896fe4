"""Blocks that add their branches in any of the ways Python has, under annotations copied from elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from obc.structures.masking import masked_copy
from obc.structures.proof import prove
from obc.structures.transformers import TransformersStructure


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Plain(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.mlp(self.norm(x))
        return x  # type: ignore[return-value]  # noqa: RET504 - the form that is tested


class Augmented(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x * 1.0
        x += self.mlp(self.norm(x))
        return x  # type: ignore[return-value]


class AugmentedArgument(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        branch = self.mlp(self.norm(x))
        branch += x
        return branch  # type: ignore[no-any-return]


class Annotated(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y: Tensor = x + self.mlp(self.norm(x))
        return y  # type: ignore[return-value]


class Walrus(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if (y := x + self.mlp(self.norm(x))) is not None:
            pass
        return y  # type: ignore[return-value]


class Direct(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class GrownTuple(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = (x + self.mlp(self.norm(x)),)
        outputs += (None,)  # type: ignore[assignment]
        return outputs  # type: ignore[return-value]


class Net(nn.Module):
    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(kind() for _ in range(3)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            assert isinstance(y, tuple) == isinstance(layer, GrownTuple) or type(layer).__name__ == "Skipped"
            x = y[0] if isinstance(y, tuple) else y
        return self.head(x)


@pytest.mark.parametrize("kind", [Plain, Augmented, AugmentedArgument, Annotated, Walrus, Direct, GrownTuple])
def test_a_block_without_its_unit_returns_its_input_in_the_form_of_the_block(kind: type[Block]) -> None:
    torch.manual_seed(0)
    model, x = Net(kind).double().eval(), torch.randn(2, 3, 8, dtype=torch.float64)
    structure = TransformersStructure(model, ["layers"])
    assert not prove(structure, lambda one: one(x)).left_out
    assert {group.name for group in structure.groups} == {"layers.1", "layers.2"}
    gone = {"layers.1": torch.tensor([0])}
    expected = masked_copy(model, structure.groups, gone)(x)
    structure.remove(gone)
    assert isinstance(model.layers[1](x), tuple) == (kind is GrownTuple)
    assert torch.equal(model(x), expected)
