"""obc.prune: targets are met, plans verify, the paper's protocol is Torch-Pruning's, and what goes wrong is undone."""

from __future__ import annotations

import copy
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import class_loss as loss
from models import randomise
from snapshot import Snapshot
from torch import Tensor, nn
from torch.nn import functional as F

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc  # noqa: E402
from benchmarks.bench_equivalent import resnet56, vgg19  # noqa: E402
from benchmarks.small_vgg import VGG  # noqa: E402
from obc.demo import models as demo_models  # noqa: E402
from obc.integrations.torch_pruning import JacobianImportance, prune_step  # noqa: E402
from obc.model.readable import count  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402

Batch = tuple[Tensor, Tensor]
EXAMPLE = torch.zeros(1, 1, 8, 8)


def batches(count: int = 6, size: int = 8, shape: tuple[int, ...] = (1, 8, 8)) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def losses(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def network(build: Callable[[], nn.Module] = demo_models.ResidualCNN) -> nn.Module:
    torch.manual_seed(0)
    return randomise(build()).eval()


def macs_of(model: nn.Module, example: Tensor = EXAMPLE) -> float:
    return TorchPruningStructure(model, example, check=False).costs("macs").total()


WAYS: dict[str, dict[str, Any]] = {
    "joint": {},
    "independent": {"selection": "independent"},
    "paper": {"selection": "independent", "slices": "all", "per_macs": False, "recalibrate": False},
    "not per MACs": {"per_macs": False},
    "samples": {"rows": "sample"},
    "label-free": {"labels": False},
    "compensated": {"compensate": "seq"},
    "rounded": {"round_to": 4},
    "micro-batches": {"micro_batch": 3},
    "minimum": {"min_units": 12},
    "one step": {"steps": 1},
    "explicit steps": {"steps": [0.9, 0.5]},
}


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("way", WAYS)
def test_prune_meets_the_target_and_its_plan_verifies(way: str) -> None:
    model = network()
    original = copy.deepcopy(model)
    options = {"steps": 3} | WAYS[way]
    loss_fn = {"samples": losses, "label-free": None}.get(way, loss)
    result = obc.prune(model, EXAMPLE, batches(), loss_fn, macs=0.5, progress=False, **options)
    report = result.report
    assert result.model is model
    assert report.macs_before == macs_of(original)
    assert report.macs_after == macs_of(model)
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert 0.4 < report.macs_after / report.macs_before <= 0.5
    assert model(batches(1)[0][0]).shape == (8, 10)
    assert [step.target for step in report.steps][-1] == 0.5
    for name, (before, after) in report.widths.items():
        assert original.get_submodule(name).weight.shape[0] == before
        assert model.get_submodule(name).weight.shape[0] == after
        assert after == before or way != "rounded" or after % 4 == 0
        assert after >= min(before, 12) or way != "minimum"
    if way == "paper":
        result.plan.verify(original.state_dict(), model)
    else:
        assert_sliced(result.plan, original, model, weights=way != "compensated")
    json.dumps(report.as_dict())
    assert f"-> {count(report.macs_after)} (" in str(report)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("way", ["joint", "independent", "not per MACs", "minimum"])
@pytest.mark.parametrize("build", [demo_models.ResidualCNN, demo_models.Transformer])
def test_the_budget_may_be_of_parameters(build: Callable[[], nn.Module], way: str) -> None:
    model = network(build)
    original = copy.deepcopy(model)
    options = {"steps": 3} | WAYS[way]
    report = obc.prune(model, EXAMPLE, batches(), loss, params=0.6, progress=False, **options).report
    before, after = (sum(parameter.numel() for parameter in network.parameters()) for network in (original, model))
    assert (report.budget, report.parameters_before, report.parameters_after) == ("parameters", before, after)
    assert 0.5 < after / before <= 0.6
    assert [step.target for step in report.steps] == pytest.approx([0.6 ** (step / 3) for step in (1, 2, 3)])
    assert all(step.parameters <= step.target for step in report.steps)
    assert report.steps[-1].parameters == after / before
    assert report.steps[-1].macs == report.macs_after / report.macs_before


def assert_sliced(plan: obc.PruningPlan, original: nn.Module, model: nn.Module, weights: bool) -> None:
    """The plan explains the shape of every layer; and, where nothing was compensated, every convolution's values."""
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        before = original.get_submodule(name).weight
        kept = plan.get(name, obc.Kept())
        out = torch.arange(before.shape[0]) if kept.out_channels is None else kept.out_channels
        in_ = torch.arange(before.shape[1]) if kept.in_columns is None else kept.in_columns
        assert before[out][:, in_].shape == layer.weight.shape
        assert not weights or torch.equal(before[out][:, in_], layer.weight)


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "label-free"])
def test_norms_are_recalibrated_after_the_last_step(labels: bool) -> None:
    model = network()
    original = copy.deepcopy(model)
    result = obc.prune(model, EXAMPLE, batches(), loss if labels else None, labels=labels, steps=2, progress=False)
    again = copy.deepcopy(model)
    obc.recalibrate_norms(again, batches(), lambda m, batch: m(batch[0]), original_model=original, plan=result.plan)
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_joint_selection_sees_redundancy() -> None:
    """One of two equal channels may be removed, but not both: a third that costs more alone goes with one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    data = [torch.randn(8, 4) for _ in range(6)]

    def linear_loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) * x[:, :2]).sum()

    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[1].weight[:, 1] = model[1].weight[:, 0]
    scores = obc.score(model, data, linear_loss)["1"].in_channels
    with torch.no_grad():
        model[1].weight[:, 2] *= (1.5 * scores[0] / scores[2]).sqrt()
    kept = {}
    for selection in ("joint", "independent"):
        pruned = copy.deepcopy(model)
        options = {"selection": selection, "shrinkage": 0.0, "steps": 1, "progress": False}
        result = obc.prune(pruned, data[0], data, linear_loss, macs=1 / 3, **options)  # one channel remains
        kept[selection] = result.plan["0"].out_channels.tolist()
    assert kept == {"joint": [1], "independent": [2]}


# --- the paper's protocol -----------------------------------------------------------------------------------------


def by_torch_pruning(
    model: nn.Module, example: Tensor, data: list[Batch], ratio: float, steps: int
) -> tuple[obc.PruningPlan, list[float]]:
    """Torch-Pruning's own pruner with the Jacobian Criterion, scored before each step; and the MACs after each."""
    importance = JacobianImportance()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance,
        global_pruning=True,
        pruning_ratio=ratio,
        iterative_steps=steps,
        ignored_layers=[list(model.modules())[-1]],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    full, plan, shares = macs_of(model, example), obc.PruningPlan(), []
    for _ in range(steps):
        importance.score(model, data, loss, progress=False)
        plan = prune_step(pruner, plan)
        shares.append(macs_of(model, example) / full)
    return plan, shares


SIDE = 16  # pixels of the full-sized networks' images, half of CIFAR's; only widths are compared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shape", "rows"),
    [
        (demo_models.ResidualCNN, (1, 8, 8), 12),
        (VGG, (1, 8, 8), 12),
        (resnet56, (3, SIDE, SIDE), 4),
        (vgg19, (3, 32, 32), 3),
    ],
    ids=["residual", "vgg", "ResNet-56", "VGG-19"],
)
def test_the_papers_protocol_keeps_what_torch_pruning_keeps(
    build: Callable[[], nn.Module], shape: tuple[int, ...], rows: int
) -> None:
    data, example = batches(rows, 2, shape), torch.zeros(1, *shape)
    model = network(build)
    theirs, shares = by_torch_pruning(copy.deepcopy(model), example, data, 0.4, 2)
    result = obc.prune(
        model,
        example,
        data,
        loss,
        macs=shares[-1],
        steps=shares,
        selection="independent",
        slices="all",
        per_macs=False,
        recalibrate=False,
        progress=False,
    )
    assert set(result.plan) == set(theirs)
    for name, kept in theirs.items():
        for side in ("out_channels", "in_channels"):
            one, other = getattr(result.plan[name], side), getattr(kept, side)
            assert (one is None) == (other is None), f"{name}.{side}"
            assert one is None or torch.equal(one, other), f"{name}.{side}"


# --- arguments ----------------------------------------------------------------------------------------------------


def test_batches_may_be_a_generator() -> None:
    one, other = network(), network()
    obc.prune(one, EXAMPLE, batches(), loss, steps=2, progress=False)
    obc.prune(other, EXAMPLE, (batch for batch in batches()), loss, steps=2, progress=False)
    assert_equal(one, other)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name


def test_a_structure_takes_the_place_of_tracing() -> None:
    model = network()
    structure = TorchPruningStructure(model, EXAMPLE, ignored_layers=["stem.0"])
    result = obc.prune(model, None, batches(), loss, macs=0.7, steps=2, structure=structure, progress=False)
    assert set(result.report.widths) == {group.name for group in structure.groups}
    assert result.plan["blocks.0.conv1"].in_channels is None


def test_on_step_sees_every_step() -> None:
    model = network()
    seen: list[tuple[float, int]] = []

    def on_step(result: obc.PruningResult) -> None:
        seen.append((result.report.steps[-1].macs, result.report.macs_after))
        assert_sliced(result.plan, original, result.model, weights=True)

    original = copy.deepcopy(model)
    obc.prune(model, EXAMPLE, batches(), loss, steps=3, on_step=on_step, progress=False)
    assert len(seen) == 3
    assert [share for share, _ in seen] == sorted((share for share, _ in seen), reverse=True)
    assert seen[-1][1] == macs_of(model)


def test_heads_are_removed_as_wholes_and_not_rounded() -> None:
    model = network(demo_models.Transformer)
    heads = {f"layers.{i}.attention.{p}": 4 for i in range(3) for p in ("query", "key", "value")}
    result = obc.prune(
        model, EXAMPLE, batches(), loss, macs=0.4, num_heads=heads, ignored_layers=["embed"], round_to=3, steps=2
    )
    widths = {len(kept.out_channels) for name, kept in result.plan.items() if name in heads}
    assert widths <= {8, 16, 24}
    assert widths & {8, 16}
    assert all(len(result.plan[f"layers.{i}.mlp.0"].out_channels) % 3 == 0 for i in range(3))


def test_the_whole_model_remains_at_one() -> None:
    model = network()
    before = copy.deepcopy(model)
    result = obc.prune(model, EXAMPLE, batches(), loss, macs=1.0, progress=False)
    assert_equal(before, model)
    assert len(result.plan) == 0


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("options", [{"criterion": "taylor"}, {"criterion": "l1"}, {"slices": "all"}], ids=str)
def test_what_has_no_rows_is_selected_independently(options: dict[str, Any]) -> None:
    by_itself, asked = network(), network()
    obc.prune(by_itself, EXAMPLE, batches(), loss, macs=0.7, steps=1, progress=False, **options)
    obc.prune(asked, EXAMPLE, batches(), loss, macs=0.7, steps=1, progress=False, selection="independent", **options)
    assert_equal(by_itself, asked)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "macs zero": ({"macs": 0.0}, r"macs is the share that remains, in \(0, 1\], got 0.0"),
    "macs above": ({"macs": 2}, "got 2"),
    "two budgets": ({"macs": 0.5, "params": 0.5}, "macs=0.5 and params=0.5 are two budgets"),
    "params below": ({"params": -1.0}, r"params is the share that remains, in \(0, 1\], got -1.0"),
    "params unreachable": ({"params": 1e-6}, "params=1e-06 is out of reach: 0.00"),
    "steps of parameters": ({"params": 0.5, "steps": [0.8, 0.4]}, r"shares of parameters that descend to params=0.5"),
    "unreachable": ({"macs": 1e-6}, "out of reach: 0.00"),
    "unreachable by min_units": ({"macs": 0.5, "min_units": 60}, r"out of reach: 0\.[6-9]"),
    "criterion": ({"criterion": "magic"}, "criterion must be one of 'jacobian', .*'random', 'l1'.*got 'magic'"),
    "joint without rows": ({"criterion": "l1", "selection": "joint"}, "leave selection out"),
    "joint of all slices": ({"slices": "all", "selection": "joint"}, "pass slices='gate'"),
    "selection": ({"selection": "both"}, "selection must be 'joint' or 'independent', got 'both'"),
    "compensate": (
        {"compensate": "yes"},
        "compensate must be one of None, 'mean', 'fusion', 'correct', 'ls', 'seq', got 'yes'",
    ),
    "rows": ({"rows": "epoch"}, "rows must be 'batch' or 'sample'"),
    "slices": ({"slices": "some"}, "slices must be 'gate' or 'all'"),
    "ignored": ({"ignored_layers": ["layer9"]}, "no layer is named 'layer9'"),
    "share in words": ({"macs": "half"}, "macs must be a number, got 'half'"),
    "ignored, misspelled": ({"ignored_layers": ["blocs"]}, "no layer is named 'blocs'.*did you mean 'blocks'"),
    "steps": ({"steps": 0}, "steps must be a positive integer, got 0"),
    "more steps than units": ({"steps": 10**9}, "1000000000 steps were asked for, but there are [0-9]+ units"),
    "more shares than units": ({"steps": [1 - step / 2000 for step in range(1, 1001)]}, "1000 steps were asked for"),
    "half a step": ({"steps": 1.5}, "steps must be a positive integer, got 1.5"),
    "steps in words": ({"steps": "8"}, "steps must be a positive integer, got '8'"),
    "ascending steps": ({"steps": [0.4, 0.6]}, "descend to macs=0.5"),
    "round_to": ({"round_to": -2}, "round_to must be a positive integer, got -2"),
    "min_units": ({"min_units": 0}, "min_units must be a positive integer, got 0"),
}


@pytest.mark.sampled(members=10)
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_and_nothing_changes(case: str) -> None:
    options, message = BAD[case]
    model = network()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        obc.prune(model, EXAMPLE, batches(), loss, progress=False, **options)
    before.assert_restored()


def test_there_may_be_as_many_steps_as_units_or_as_by_default() -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))
    data = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def prune(steps: int) -> obc.PruningResult:
        copied = copy.deepcopy(model)
        return obc.prune(
            copied, data[0], data, lambda m, x: m(x).square().mean(), params=0.5, steps=steps, progress=False
        )

    assert len(prune(12).report.steps) == 12
    with pytest.raises(
        ValueError, match=r"13 steps were asked for, but there are 12 units .*pass steps=8, or at most 12"
    ):
        prune(13)


def test_nothing_to_score_on_or_by() -> None:
    model = network()
    with pytest.raises(ValueError, match="batches is empty"):
        obc.prune(model, EXAMPLE, [], loss)
    with pytest.raises(ValueError, match="batches is empty"):
        obc.prune(model, EXAMPLE, iter([]), loss)
    empty = [(images[:0], labels[:0]) for images, labels in batches(3)]
    with pytest.raises(ValueError, match=r"3 of 3 batches are not usable.*batch 0: it has no samples.*leave empty"):
        obc.prune(model, EXAMPLE, empty, loss)
    with pytest.raises(ValueError, match=r"batch 0: loss_fn returned torch\.complex64; return a real number"):
        obc.prune(model, EXAMPLE, batches(), lambda model, batch: loss(model, batch) * 1j)
    with pytest.raises(ValueError, match="batches is missing"):
        obc.prune(model, EXAMPLE)
    with pytest.raises(ValueError, match=r"got function; without example_inputs.*by keyword"):
        obc.prune(model, batches(), loss)
    with pytest.raises(ValueError, match="loss_fn is needed"):
        obc.prune(model, EXAMPLE, batches())
    with pytest.raises(ValueError, match=r"no layer can be pruned.*head.*it is one of ignored_layers"):
        obc.prune(model, EXAMPLE, batches(), loss, ignored_layers=["stem", "blocks"])
    with pytest.raises(ValueError, match=r"only transformers models.*pass example_inputs"):
        obc.prune(model, None, batches(), loss)
    with pytest.raises(obc.PlanError, match="compiled"):
        obc.prune(torch.compile(model), EXAMPLE, batches(), loss)
    nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(obc.PlanError, match="head is parametrised"):
        obc.prune(model, EXAMPLE, batches(), loss)


def test_groups_without_scores_are_left_out() -> None:
    model = network(VGG)
    result = obc.prune(
        model, EXAMPLE, batches(), loss, macs=0.8, criterion="bn_scale", selection="independent", steps=1
    )
    assert "bn_scale" in result.report.left_out["classifier.0"]
    assert result.report.widths["classifier.0"] == (64, 64)


def test_rows_of_zeros_are_refused() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="all rows are zero"):
        obc.prune(model, EXAMPLE, batches(), lambda model, batch: 0.0 * loss(model, batch))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("compensate", [None, "ls"])
def test_an_exception_restores_the_model(error: type[BaseException], compensate: str | None) -> None:
    model = network().train()
    model.stem[0].weight.requires_grad_(False)
    before, values = Snapshot(model), copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    calls = itertools.count()
    # The second step's scores; or the last calls, when compensation has begun to change the model.
    last = 13 if compensate is None else total_calls(compensate) - 1

    def fails(model: nn.Module, batch: Batch) -> Tensor:
        if next(calls) == last:
            raise error("the loss went wrong")
        return loss(model, batch)

    with pytest.raises(error, match="the loss went wrong") as raised:
        obc.prune(model, EXAMPLE, batches(4), fails, steps=2, recalibrate=True, compensate=compensate, progress=False)
    before.assert_restored()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name
    assert any("the model was restored" in note for note in raised.value.__notes__)


def total_calls(compensate: Any) -> int:
    calls = itertools.count()

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        next(calls)
        return loss(model, batch)

    obc.prune(network(), EXAMPLE, batches(4), counted, steps=2, compensate=compensate, progress=False)
    return next(calls)


def test_progress_is_quiet_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    obc.prune(network(), EXAMPLE, batches(2), loss, steps=1)
    assert "prune" not in capfd.readouterr().err.replace("obc.prune:", "")
    obc.prune(network(), EXAMPLE, batches(2), loss, steps=1, progress=True)
    assert "of the MACs" in capfd.readouterr().err


def test_obc_imports_without_torch_pruning() -> None:
    code = (
        "import sys; sys.modules['torch_pruning'] = None; import obc\n"
        "try:\n    obc.prune(__import__('torch').nn.Linear(2, 2), 0, [1], len)\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install torch-pruning" in done.stdout


def test_loss_that_calls_parts_needs_forward_fn() -> None:
    def parts_loss(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model.head(model.blocks(model.stem(images)).mean((2, 3))), labels)

    with pytest.raises(ValueError, match="pass forward_fn as well"):
        obc.prune(network(), EXAMPLE, batches(), parts_loss, progress=False)
    result = obc.prune(
        network(), EXAMPLE, batches(), parts_loss, forward_fn=lambda m, batch: m(batch[0]), steps=1, progress=False
    )
    assert result.report.macs_after <= 0.5 * result.report.macs_before


@pytest.mark.slow
def test_loss_that_calls_forward_needs_no_forward_fn() -> None:
    pruned = [
        obc.prune(network(), EXAMPLE, batches(), loss_fn, steps=1, compensate=True, progress=False).model
        for loss_fn in (loss, lambda model, batch: F.cross_entropy(model.forward(batch[0]), batch[1]))
    ]
    for name, tensor in pruned[0].state_dict().items():
        assert torch.equal(tensor, pruned[1].state_dict()[name]), name


class Shuffling:
    """A data loader that gives its batches in another order each time."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.chance = batches, random.Random(1)

    def __iter__(self) -> Iterator[Any]:
        self.chance.shuffle(order := list(self.batches))
        return iter(order)


def test_every_pass_sees_the_batches_of_the_first() -> None:
    """BatchNorm statistics are compared batch by batch, and targets belong to their inputs."""
    data = [torch.randn(8, 3, 8, 8) * (1 + 3 * place) for place in range(6)]
    found = []
    for batches in (Shuffling(data), list(Shuffling(data))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        obc.prune(model, data[0], batches, lambda m, x: m(x).square().mean(), steps=2, compensate=True, progress=False)
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)
