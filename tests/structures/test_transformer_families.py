"""The registry of families: what a file registers is found, and names that fit by accident are not believed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from obc.model.groups import ChannelGroup, Slice
from obc.model.names import joined
from obc.structures.transformers import Family, TransformersStructure, families, register_family
from obc.structures.transformers.block import Block, Kind
from obc.structures.transformers.family import FAMILIES
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError


@pytest.fixture(autouse=True)
def _unregister() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


class Mixer(nn.Module):
    """y = W_out (W_a x * W_b x), under names of its own."""

    def __init__(self, width: int = 6, other: int = 6) -> None:
        super().__init__()
        self.left, self.right, self.back = nn.Linear(4, width), nn.Linear(4, other), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.left(x) * self.right(x))


def mixers(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    names = [joined(name, child) for child in ("left", "right", "back")]
    if "mixer" not in kinds or not all(layer in layers.modules for layer in names):
        return
    left, right, back = names
    width = layers.size(back, "in")
    if layers.size(right, "out") != width:
        raise NotPrunableError(f"{right} has {layers.size(right, 'out')} outputs, not {width}")
    one = channels(width, 1)
    yield Block(
        ChannelGroup(left, (Slice(left, "out", one), Slice(right, "out", one), Slice(back, "in", one)), "mixer")
    )


def test_every_file_with_code_registers_a_family_of_its_name() -> None:
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__", "names"}
    assert files <= set(FAMILIES)


def test_the_usual_names_come_first() -> None:
    assert next(iter(FAMILIES)) == "usual"


def test_names_of_a_registered_family_are_found_and_sliced_like_masked() -> None:
    model = Mixer().double()
    assert TransformersStructure(model).groups == ()
    register_family(Family("toy", feed_forwards=(("left", "right", "back"),)))
    structure = TransformersStructure(model)
    (group,) = structure.groups
    assert (group.name, group.size, group.kind) == ("left", 6, "ffn")
    x, gone = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 4])
    masked = model.left(x) * model.right(x)
    masked[:, gone] = 0
    expected = model.back(masked)
    structure.remove({"left": gone})
    torch.testing.assert_close(model(x), expected)


def test_a_registered_kind_is_found_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="got 'mixer'"):
        TransformersStructure(Mixer(), ("mixer",))
    register_family(Family("toy", blocks=mixers, kinds=(Kind("mixer"),)))
    structure = TransformersStructure(Mixer(), ("mixer", "ffn"))
    assert [(group.name, group.kind) for group in structure.groups] == [("left", "mixer")]


def test_names_that_fit_by_accident_are_left_out_with_the_reason() -> None:
    register_family(Family("toy", blocks=mixers, kinds=(Kind("mixer"),)))
    structure = TransformersStructure(Mixer(6, 8), ("mixer",))
    assert structure.groups == ()
    assert structure.left_out == {"": "right has 8 outputs, not 6"}


def test_two_families_of_one_name_are_refused() -> None:
    family = Family("toy")
    register_family(family)
    register_family(family)
    with pytest.raises(ValueError, match="a family 'toy' is registered already"):
        register_family(Family("toy", outputs=("back",)))
