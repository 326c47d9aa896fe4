"""Copies of structures: of the model with it, pruned apart from the original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from obc.structures.traced import TorchPruningStructure
from obc.structures.transformers import TransformersStructure


def traced() -> tuple[Any, Any]:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(6 * 16, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    return TorchPruningStructure(model, x), x


def by_blocks() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = models.llama().model.eval()
    return TransformersStructure(model), torch.arange(8)[None]


def saved_and_loaded(structure: Any) -> Any:
    return pickle.loads(pickle.dumps(structure))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        returned = model(x)
    return returned if isinstance(returned, Tensor) else returned.logits


def parameters(structure: Any) -> int:
    return sum(parameter.numel() for parameter in structure.model.parameters())


def kept(structure: Any) -> dict[str, str]:
    return {name: repr(one) for name, one in structure.plan.items()}


@pytest.mark.parametrize(
    ("make", "copied"),
    [(traced, copy.deepcopy), (by_blocks, copy.deepcopy), (by_blocks, saved_and_loaded)],
    ids=["traced", "transformers", "transformers-saved"],
)
def test_a_copy_is_pruned_apart_from_the_original(
    make: Callable[[], tuple[Any, Any]], copied: Callable[[Any], Any]
) -> None:
    structure, x = make()
    first, second = structure.groups[:2]
    structure.remove({first.name: torch.tensor([0])})
    other, before = copied(structure), output(structure.model, x)
    size, cost = parameters(structure), structure.costs("parameters")

    other.remove({second.name: torch.tensor([1])})

    assert torch.equal(output(structure.model, x), before)
    assert (parameters(structure), kept(structure) == kept(other)) == (size, False)
    widths = cost.widths - torch.tensor([name == second.name for name in cost.names]).double()
    assert other.costs("parameters").total() == cost.total(widths) == parameters(other) < size
    structure.remove({second.name: torch.tensor([1])})
    assert torch.equal(output(structure.model, x), output(other.model, x))
    assert kept(structure) == kept(other)


def test_a_structure_that_cannot_be_saved_says_what_to_save() -> None:
    with pytest.raises(TypeError, match=r"can't be saved; save its model and its plan"):
        pickle.dumps(traced()[0])
