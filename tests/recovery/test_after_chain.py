"""Layers and norms behind a chain of modules: corrected from the chain's end as from the model's start."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import obc
from obc.recovery import correct
from obc.recovery.after_chain import called_after, skipped


class Inverted(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.deep, self.norm2 = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner, bias=False), nn.BatchNorm2d(inner)
        self.project, self.norm3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm1(self.expand(x)))
        return x + self.norm3(self.project(F.relu6(self.norm2(self.deep(y)))))


class Classifier(nn.Module):
    """A stem, blocks, a head of a convolution and two layers.

    ``reads``: "last" only the last block's output goes on, "all" the first one's too, "shape" the first one's shape.
    """

    def __init__(self, reads: str = "last") -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList(Inverted(6, 18) for _ in range(2))
        self.head, self.head_norm = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.hidden, self.out = nn.Linear(12, 16), nn.Linear(16, 5)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.blocks[0](F.relu(self.norm(self.stem(x))))
        x = F.relu(self.blocks[1](x))
        x = x + 0.1 * first if self.reads == "all" else x * (first.shape[1] / 6) if self.reads == "shape" else x
        x = F.relu6(self.head_norm(self.head(x))).mean((2, 3))
        return self.out(F.relu(self.hidden(x)))


def classifier(reads: str) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(reads).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data *= 3.0
    return model.eval()


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 7, 7, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("spared", [(), ("stem",), ("stem", "blocks.0.project", "head")])
@pytest.mark.parametrize("reads", ["last", "all", "shape"])
def test_it_is_as_from_the_start(monkeypatch: pytest.MonkeyPatch, reads: str, spared: tuple[str, ...]) -> None:
    model, batches = classifier(reads), images(6)
    options: dict[str, Any] = {
        "macs": 0.75,
        "steps": 1,
        "labels": False,
        "ignored_layers": spared,
        "criterion": "l2",
        "recalibrate": False,
    }
    result = obc.prune(copy.deepcopy(model), batches[0][:1], batches, lambda m, x: m(x), **options)
    ways, found = [copy.deepcopy(result.model) for _ in range(2)], []
    reports = [obc.compensate(ways[0], model, result.plan, batches, mode="correct")]
    with monkeypatch.context() as patched:
        patched.setattr(correct, "called_after", lambda *_: found.append(True) or set())
        reports.append(obc.compensate(ways[1], model, result.plan, batches, mode="correct"))
    assert found, "the models have a chain"
    assert_close(ways[0].state_dict(), ways[1].state_dict(), rtol=1e-9, atol=1e-10)
    assert reports[0].final_error == pytest.approx(reports[1].final_error, rel=1e-8)
    assert reports[0].final_error < reports[0].naive_error


@pytest.mark.parametrize("reads", ["last", "all", "shape"])
def test_modules_behind_a_chain_are_known_where_nothing_else_reads_it(reads: str) -> None:
    model, (batch,) = classifier(reads), images(1)
    found = called_after(model, ["blocks.0", "blocks.1"], lambda: model(batch))
    assert found == (set() if reads == "all" else {"head", "head_norm", "hidden", "out"})
    assert "forward" not in model.blocks[0].__dict__


def test_skipped_modules_run_again_after_an_error() -> None:
    model, (batch,) = classifier("last"), images(1)
    wanted = model(batch)
    model.blocks[0].forward = lambda x: Inverted.forward(model.blocks[0], x)  # a forward of its own
    own = model.blocks[0].forward
    with pytest.raises(RuntimeError), skipped(model, ["blocks.0", "blocks.1"], torch.zeros(1)):
        model(batch)
    assert model.blocks[0].forward is own
    assert_close(model(batch), wanted)
