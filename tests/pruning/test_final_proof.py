"""obc.prune compares the pruned model with the masked unpruned one; layers that share a parameter go on sharing it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import class_loss as loss
from models import labelled_images, randomise
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.model.costs import Costs
from obc.model.groups import ChannelGroup, Slice
from obc.model.kept import PlanError
from obc.structures.proof import ProofError
from obc.structures.traced import TorchPruningStructure


class Net(nn.Module):
    def __init__(self, flips: bool = False) -> None:
        super().__init__()
        self.flips = flips
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 10, 3, padding=1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.b(x.flip(1) if self.flips else x))
        return self.head(x.mean((2, 3)))


def net(flips: bool = False) -> Net:
    torch.manual_seed(0)
    found = randomise(Net(flips)).eval()
    assert isinstance(found, Net)
    return found


def data() -> list[tuple[Tensor, Tensor]]:
    return labelled_images(6, 12)


class Unproved:
    """A structure that can't be tried on a copy, and believes what tracing says."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._inner = TorchPruningStructure(model, x, check=False)
        self.model = model

    @property
    def plan(self) -> obc.PruningPlan:
        return self._inner.plan

    @property
    def groups(self) -> Any:
        return self._inner.groups

    def costs(self, unit: Any) -> Costs:
        return self._inner.costs(unit)

    def remove(self, units: Any) -> None:
        self._inner.remove(units)


@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 2, "compensate": "ls"}, {"recalibrate": False}], ids=str)
def test_the_report_says_what_was_proved(options: dict[str, Any]) -> None:
    model = net()
    report = obc.prune(model, data()[0][0], data(), loss, macs=0.5, progress=False, **options).report
    assert report.proof is not None
    assert report.proof.proved == ["a", "b"]
    assert report.error is not None
    assert report.tolerance is not None
    assert report.error < 1e-5 < report.tolerance < 1e-2
    assert not report.unproved
    assert "proved: the pruned model equals the masked one" in str(report)
    assert report.as_dict()["proof"]["proved"] == ["a", "b"]


def test_a_wrong_structure_is_found_out_at_the_end_and_undone() -> None:
    model = net(flips=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ProofError, match="what b reads differs by") as raised:
        obc.prune(model, None, data(), loss, macs=0.5, progress=False, structure=Unproved(model, data()[0][0]))
    assert "ignored_layers" in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.a.out_channels == 12
    obc.prune(
        model, None, data(), loss, macs=0.5, progress=False, structure=Unproved(model, data()[0][0]), verify=False
    )
    assert model.a.out_channels < 12


def test_without_the_comparison_the_report_says_so() -> None:
    model = net()
    structure = Unproved(model, data()[0][0])
    report = obc.prune(model, None, data(), loss, macs=0.5, progress=False, structure=structure, verify=False).report
    assert report.error is None
    assert "not proved: the pruned model was not compared" in str(report)
    assert set(report.unproved) == {"a", "b"}
    assert "has no twin and leave_out" in report.unproved["a"]


def test_a_group_in_another_order_than_traced_is_pruned_in_its_own() -> None:
    model = net(flips=True)
    report = obc.prune(model, data()[0][0], data(), loss, macs=0.5, progress=False).report
    assert report.proof is not None
    assert report.proof.probed == ["a"]
    assert report.widths["a"][1] < 12
    assert report.error is not None
    assert "order found by running the model: a" in str(report)


def test_a_wrong_group_is_left_out_and_the_others_are_pruned() -> None:
    class Picked(Net):
        """Channels are taken from places that are written down."""

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.a(x)))[:, [3, 1, 11, 0, 7, 2, 10, 5, 4, 9, 6, 8]]
            return self.head(F.relu(self.b(x)).mean((2, 3)))

    torch.manual_seed(0)
    result = obc.prune(Picked().eval(), data()[0][0], data(), loss, macs=0.8, progress=False)
    assert "a" in result.report.left_out
    assert result.report.widths["b"][1] < 10


def test_a_model_that_is_another_every_time_is_said_not_to_be_proved() -> None:
    class Restless(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Restless.calls += 1
            return super().forward(x + Restless.calls % 7)

    torch.manual_seed(0)
    report = obc.prune(Restless(), data()[0][0], data(), loss, macs=0.8, progress=False).report
    assert "something else at every call" in report.unproved["a"]
    assert "same twice" in report.unproved["the whole model"]
    assert report.error is None


def test_a_loss_that_calls_parts_of_the_model_is_proved_by_its_value() -> None:
    def parts_loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(
            model.head(F.relu(model.b(F.relu(model.norm(model.a(batch[0]))))).mean((2, 3))), batch[1]
        )

    model = net()
    report = obc.prune(model, data()[0][0], data(), parts_loss, macs=0.5, progress=False, recalibrate=False).report
    assert report.error is not None
    assert not report.unproved


# --- parameters that layers share ---------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight; whether their outputs are added, so that they are pruned equally."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.added = added
        self.a, self.b, self.c = (nn.Conv2d(width, 12, 3, padding=1) for width in (3, 12, 12))
        self.d, self.e = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        one, other = F.relu(self.b(x)), F.relu(self.c(F.avg_pool2d(x, 3, 1, 1)))
        x = F.relu(self.d(one + other)) if self.added else F.relu(self.d(one) + self.e(other))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("steps", [1, 3])
def test_layers_that_share_a_weight_share_the_pruned_one(steps: int) -> None:
    torch.manual_seed(0)
    model = Tied(added=True).eval()
    report = obc.prune(model, data()[0][0], data(), loss, macs=0.5, progress=False, steps=steps).report
    assert model.b.weight is model.c.weight
    assert model.b.out_channels < 12
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert not any("the structure counts" in warning for warning in report.warnings)
    assert report.error is not None


def test_layers_that_share_a_weight_and_would_lose_different_channels_are_left_out() -> None:
    torch.manual_seed(0)
    model = Tied(added=False).eval()
    report = obc.prune(model, data()[0][0], data(), loss, macs=0.8, progress=False).report
    for group in ("b", "c"):
        assert "b.weight" in report.left_out[group]
        assert "c.weight" in report.left_out[group]
    assert model.b.weight is model.c.weight
    assert report.widths["a"][1] < 12


def test_removing_one_of_two_layers_that_share_a_weight_raises() -> None:
    torch.manual_seed(0)
    structure = TorchPruningStructure(Tied(added=False).eval(), data()[0][0], check=False)
    with pytest.raises(PlanError, match=r"b\.weight and c\.weight share one parameter"):
        structure.remove({"b": torch.tensor([3])})


def test_an_embedding_that_is_the_head_too_stays_one() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.head(x + self.down(F.gelu(self.up(x))))

    torch.manual_seed(0)
    model = Language().eval()
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    structure = TorchPruningStructure(model, tokens)
    structure.remove({group.name: torch.tensor([1, 4]) for group in structure.groups})
    assert model.head.weight is model.embed.weight
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert structure.costs("parameters").total() == parameters


def test_a_structure_that_counts_other_parameters_is_named() -> None:
    class Miscounting(Unproved):
        def costs(self, unit: Any) -> Costs:
            found = super().costs(unit)
            if unit == "macs":
                return found
            return Costs(
                found.names, found.widths, constant=found.constant + 7, linear=found.linear, quadratic=found.quadratic
            )

    model = net()
    structure = Miscounting(model, data()[0][0])
    report = obc.prune(model, None, data(), loss, macs=0.5, progress=False, structure=structure).report
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters_after == counted
    assert f"the structure counts {counted + 7} parameters, the model has {counted}" in report.warnings


def test_a_group_that_nobody_is_known_to_read_is_named() -> None:
    class Unread(Unproved):
        @property
        def groups(self) -> Any:
            return tuple(
                ChannelGroup(group.name, tuple(part for part in group.slices if part.side == "out"), group.kind)
                for group in super().groups
            )

    model = net()
    assert isinstance(Unread(model, data()[0][0]).groups[0].slices[0], Slice)
    report = obc.prune(
        model,
        None,
        data(),
        loss,
        macs=0.8,
        progress=False,
        structure=Unread(model, data()[0][0]),
        slices="all",
        selection="independent",
    ).report
    assert "no layer that reads it is known" in report.unproved["the whole model"]


def test_a_first_batch_that_is_not_finite_proves_nothing_and_harms_nothing() -> None:
    batches = data()
    batches[0] = (torch.full_like(batches[0][0], torch.nan), batches[0][1])
    model = net()
    report = obc.prune(model, batches[1][0], batches, loss, macs=0.6, progress=False).report
    assert report.error is not None
    assert not report.unproved
    assert set(report.widths) == {"a", "b"}


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    class Infinite(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x), torch.full((len(x), 1), torch.inf)], 1)

    torch.manual_seed(0)
    structure = TorchPruningStructure(Infinite(), data()[0][0])
    assert structure.proof is not None
    assert "not finite" in structure.proof.unproved["a"]
    assert [group.name for group in structure.groups] == ["a", "b"]
