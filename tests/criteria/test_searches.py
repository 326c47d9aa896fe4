"""Criteria beside those of statistics: pseudo-labels, entropies of blocks, beams, tolerances; and fusion of units."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers_families as families
from formulas import check, forward
from torch import Tensor, nn

import obc
from obc import criteria
from obc.criteria import Subject, group_scores
from obc.model.groups import ChannelGroup, Slice
from obc.model.usable_batches import UsableBatches
from obc.recovery.fusion import fuse_units, transport
from obc.statistics import Blocks
from obc.structures.transformers import TransformersStructure


def test_jbr_leaves_padding_out_and_takes_sample_rows() -> None:
    case = models.llama()
    tokens = case.batches[0][:3, :6]
    mask = torch.arange(6) < torch.tensor([6, 4, 3])[:, None]
    padded = UsableBatches([{"input_ids": tokens.where(mask, 7), "attention_mask": mask.long()}])
    alone = UsableBatches([{"input_ids": tokens[n : n + 1, :length]} for n, length in enumerate((6, 4, 3))])
    groups = tuple(obc.transformer_groups(case.model, ["ffn"]))
    found = []
    for batches in (padded, alone):
        call = lambda model, batch: model(**batch)  # noqa: E731
        one = Subject(case.model, groups, batches, case.loss, call, "gate", "sample", torch.Generator())
        found.append(group_scores("jbr", one))
    check(found[0], {name: scores.double() for name, scores in found[1].items()}, 1e-3)


def test_entropy_spares_the_first_stage_or_the_ends(tmp_path: Path) -> None:
    gains = {"a": -2.0, "b": -1.0, "c": 0.5, "d": -0.2, "e": 0.1}
    sums = {name: obc.statistics.BlockSums(1, 0, 0, 0, 0, 0, 2, 0.0, 2 * gain) for name, gain in gains.items()}
    statistics = obc.Statistics({"blocks": sums}, rows=None, num_batches=2, coverage={})
    falling = criteria.EntropyGain(spare="falling").of_blocks(statistics)
    assert falling == pytest.approx({"a": 1.5, "b": 1.5, "c": 0.5, "d": -0.2, "e": 0.1})
    assert criteria.EntropyGain(spare="ends").of_blocks(statistics) == pytest.approx({**falling, "e": 1.5})
    statistics.save(tmp_path / "file")
    loaded = obc.Statistics.load(tmp_path / "file").blocks["c"]
    assert vars(loaded) == vars(sums["c"])
    with pytest.raises(obc.statistics.StatisticsError, match="entropy_bins"):
        obc.collect(models.llama().model, [torch.zeros(1, 2).long()], statistics=[Blocks(entropy_bins=1)])


def small() -> Subject:
    """Six units: two groups of three channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)).double()
    units = torch.arange(3)[:, None]
    groups = tuple(
        ChannelGroup(a, (Slice(a, "out", units), Slice(b, "in", units))) for a, b in (("0", "2"), ("2", "4"))
    )
    batches = [(torch.randn(5, 4).double(), torch.randn(5, 2).double()) for _ in range(2)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    return Subject(model, groups, UsableBatches(batches), loss, forward, "gate", "batch", torch.Generator())


def test_searches_refuse_what_makes_no_sense() -> None:
    subject = small()
    for make, message in (
        (lambda: criteria.BeamSearch(removals=0), "at least 1"),
        (lambda: criteria.Tolerance(tau=0), "must be positive"),
        (lambda: criteria.EntropyGain(spare="all"), "spare must be"),  # type: ignore[arg-type]
        (
            lambda: group_scores(criteria.Tolerance(tasks=[lambda m, b: -m(b[0]).abs().mean()]), subject),
            "positive losses",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("criterion", ["entropy", "beam", "tolerance"])
def test_whole_blocks_go_by_entropy_and_beam(criterion: str) -> None:
    import transformers

    sizes = dict(families._SIZES) | {"num_hidden_layers": 4}
    model: Any = models.seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval())
    batches = [torch.randint(31, (4, 8)) for _ in range(2)]
    structure = TransformersStructure(model, ["layers"])

    def prune() -> Any:
        return obc.prune(
            model, None, batches, lambda m, b: m(b, labels=b).loss, structure=structure, criterion=criterion,
            blocks=0.75, steps=1, progress=False,
        )  # fmt: skip

    if criterion == "tolerance":
        with pytest.raises(ValueError, match=r"the criterion 'tolerance': .* the groups are of layers"):
            prune()
        return
    prune()
    assert len(model.model.layers) == 3


def cheapest(cost: Tensor) -> float:
    """The least cost of giving every unit to one of those kept, equally many to each: by trying all."""
    kept, units = cost.shape
    each = units // kept
    best = math.inf
    for choice in itertools.product(range(kept), repeat=units):
        if all(choice.count(k) == each for k in range(kept)):
            best = min(best, sum(float(cost[k, u]) for u, k in enumerate(choice)))
    return best


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_transport_is_the_cheapest(p: float) -> None:
    torch.manual_seed(0)
    vectors, kept = torch.randn(6, 5, dtype=torch.float64), torch.tensor([1, 4, 5])
    found = transport(vectors, kept, p)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cost = torch.stack([(unit[k] - unit).abs().pow(p).sum(1).pow(1 / p) for k in kept])
    torch.testing.assert_close(found.sum(0), torch.ones(6).double())
    torch.testing.assert_close(found.sum(1), torch.full((3,), 2.0).double())
    assert float((found * cost).sum()) == pytest.approx(cheapest(cost))


def twins(convolution: bool) -> nn.Sequential:
    """Every hidden unit twice, with output weights of its own."""
    torch.manual_seed(0)
    if convolution:
        model: Any = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 3, 3)).double()
    else:
        model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight[4:], model[0].bias[4:] = model[0].weight[:4], model[0].bias[:4]
    return model


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "conv"])
def test_units_that_are_twins_are_fused_exactly(convolution: bool) -> None:
    model = twins(convolution)
    x = torch.randn(3, 2, 6, 6).double() if convolution else torch.randn(3, 5).double()
    before = model(x)
    result = obc.prune(
        copy.deepcopy(model), x.clone().requires_grad_(), [x], criterion=Half(), labels=False, params=0.55,
        compensate="fusion", per_macs=False,
    )  # fmt: skip
    assert result.report.fusion is not None
    assert result.report.fusion.fused == {"0": (8, 4)}
    assert result.report.as_dict()["fusion"]["fused"] == {"0": (8, 4)}
    torch.testing.assert_close(result.model(x), before)


class Half(criteria.Criterion):
    """The second half goes first."""

    name = "half"

    def score(self, group: ChannelGroup, statistics: Any, model: nn.Module) -> Tensor:
        return torch.arange(group.size, 0, -1).double()


@pytest.mark.parametrize("outputs", ["mean", "sum"])
def test_fusion_multiplies_by_the_transport(outputs: Any) -> None:
    """W1 -> T W1 (or rows of T over their sums), b1 likewise, W2 -> W2 T^T: with the T that costs least."""
    torch.manual_seed(1)
    original: Any = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    pruned, kept = copy.deepcopy(original), torch.tensor([0, 2, 5])
    plan = obc.PruningPlan({"0": obc.Kept(out_channels=kept), "2": obc.Kept(in_channels=kept)})
    plan.apply(pruned)
    units = torch.arange(6)[:, None]
    group = ChannelGroup("0", (Slice("0", "out", units), Slice("2", "in", units)))
    report = fuse_units(pruned, original, plan, [group], outputs=outputs)
    first, second = original[0].weight, original[2].weight
    moved = transport(torch.cat([first, second.T], 1).detach(), kept)
    rows = moved / moved.sum(1, keepdim=True) if outputs == "mean" else moved
    assert report.fused == {"0": (6, 3)}
    torch.testing.assert_close(pruned[0].weight, rows @ first)
    torch.testing.assert_close(pruned[0].bias, rows @ original[0].bias)
    torch.testing.assert_close(pruned[2].weight, second @ moved.T)
    torch.testing.assert_close(pruned[2].bias, original[2].bias)


def test_fusion_of_heads_and_what_it_leaves() -> None:
    case = models.vit()
    model, x = case.model.double(), case.batches[0][0].double()
    unfused = copy.deepcopy(model)
    result = obc.prune(
        model, x.clone().requires_grad_(), [(x, None)], criterion="intra_fusion", labels=False, macs=0.7,
        forward_fn=lambda m, b: m(b[0]), compensate="fusion",
    )  # fmt: skip
    fusion = result.report.fusion
    assert fusion is not None
    assert fusion.fused
    assert result.model(x).logits.shape == unfused(x).logits.shape
    grouped: Any = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=2)).double()
    kept = torch.tensor([0, 2])
    plan = obc.PruningPlan({"0": obc.Kept(out_channels=kept), "1": obc.Kept(in_channels=kept)})
    units = torch.tensor([[0, 2], [1, 3]])
    group = ChannelGroup("0", (Slice("0", "out", units), Slice("1", "in", units)))
    report = fuse_units(copy.deepcopy(grouped), grouped, plan, [group])
    assert report.left == {"0": "a grouped convolution would mix its groups"}
    with pytest.raises(ValueError, match="outputs must be"):
        fuse_units(grouped, grouped, plan, [group], outputs="max")  # type: ignore[arg-type]


def test_files_of_criteria_are_short() -> None:
    """A criterion that needs more asks for a missing primitive."""
    folder = Path(criteria.__file__).parent
    lengths = {path.name: len(path.read_text().splitlines()) for path in folder.glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 150} == {}
