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
from formulas import block_pairs, changed, check, forward, make_subject, unit_rows
from torch import Tensor, nn

import obc
from obc import criteria
from obc.criteria import Subject, group_scores
from obc.model.groups import ChannelGroup, Slice
from obc.model.usable_batches import UsableBatches
from obc.recovery.fusion import fuse_units, transport
from obc.statistics import Blocks
from obc.statistics.blocks import entropy
from obc.structures.transformers import TransformersStructure


@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_jbr_is_the_jacobian_criterion_on_the_first_models_predictions(name: str, micro_batch: int | None) -> None:
    subject = make_subject(name)
    subject = changed(subject, batches=UsableBatches(list(subject.batches)), micro_batch=micro_batch)
    criterion = criteria.JBR()
    for turn in range(2):  # the second time the weights are others, and the labels stay
        if turn == 0:
            labels = [logits(subject.model, batch).argmax(-1) for batch in subject.batches]
        else:
            with torch.no_grad():
                for parameter in subject.model.parameters():
                    parameter.mul_(1.3)
        place = {id(batch): n for n, batch in enumerate(subject.batches.all)}

        def loss(model: nn.Module, batch: Any) -> Tensor:
            chances = logits(model, batch).log_softmax(-1)
            return -chances.gather(-1, labels[place[id(batch)]].unsqueeze(-1)).mean()  # noqa: B023

        rows = {
            group: r.square().sum(0)
            for group, r in unit_rows(changed(subject, loss_fn=loss), everything=False, functional=loss).items()
        }
        got = group_scores(criterion, subject)
        check(got, {key: values for key, values in rows.items() if key in got}, 1e-4)


def logits(model: nn.Module, batch: Any) -> Tensor:
    output = forward(model, batch)
    return getattr(output, "logits", output)


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


def binned(values: Tensor, bins: int) -> float:
    """-sum p log p of one dimension, bin by bin, from the published description."""
    low, high = float(values.min()), float(values.max())
    edges = [low + (high - low) * b / bins for b in range(bins + 1)]
    shares = [
        sum(edges[b] <= v and (v < edges[b + 1] or b == bins - 1) for v in values.tolist()) / len(values)
        for b in range(bins)
    ]
    return -sum(p * math.log(p) for p in shares if p > 0)


def test_entropy_is_that_of_histograms() -> None:
    torch.manual_seed(0)
    states = torch.randn(40, 3, dtype=torch.float64)
    for bins in (2, 7):
        assert float(entropy(states, bins)) == pytest.approx(sum(binned(d, bins) for d in states.T), rel=1e-12)
    assert float(entropy(torch.ones(5, 2), 4)) == 0.0


def test_entropy_gain_of_blocks() -> None:
    subject = make_subject("llama")
    pairs = block_pairs(subject.model)
    criterion = criteria.EntropyGain(bins=5, spare=None)
    statistics = obc.collect(subject.model, subject.batches, statistics=criterion.needs, forward_fn=forward)
    got = criterion.of_blocks(statistics)
    for block, found in pairs.items():
        gains = [
            sum(binned(d, 5) for d in y.flatten(0, 1).T) - sum(binned(d, 5) for d in x.flatten(0, 1).T)
            for x, y in found
        ]
        assert got[block] == pytest.approx(sum(gains) / len(gains), rel=1e-6)
    group = ChannelGroup(
        "model.layers.1", (Slice("model.layers.1", "out", torch.zeros(1, 1, dtype=torch.int64)),), "layers"
    )
    scores = criterion.score(group, statistics, subject.model)
    assert scores is not None
    assert float(scores) == pytest.approx(got["model.layers.1"])


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


def with_zeros(subject: Subject, units: Any) -> nn.Module:
    """The model with the columns of these (group, unit) at zero."""
    model: Any = copy.deepcopy(subject.model)
    with torch.no_grad():
        for name, unit in units:
            model[int(name) + 2].weight[:, unit] = 0
    return model


def distance(subject: Subject, units: Any, batches: Any) -> float:
    model = with_zeros(subject, units)
    return sum(float((model(x) - subject.model(x)).square().mean()) for x, _ in batches) / len(batches)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("width", [1, 2, 100])
def test_beam_search_is_a_beam_search(width: int, null: bool) -> None:
    """Sets are grown one unit at a time, the best ``width`` of each size survive; all sets for a wide beam."""
    subject = small()
    batches: Any = list(subject.batches)
    empty = [(torch.zeros(1, 4).double(), torch.zeros(1, 2).double())]

    def measured(units: Any) -> float:
        return distance(subject, units, batches) + (distance(subject, units, empty) if null else 0.0)

    everything = [(group, unit) for group in ("0", "2") for unit in range(3)]
    beam: list[list[tuple[str, int]]] = [[]]
    for _ in range(3):
        sets = {
            frozenset([*path, unit]): [*path, unit]
            for path in reversed(beam)
            for unit in everything
            if unit not in path
        }
        beam = sorted(sets.values(), key=measured)[:width]
    best = beam[0]
    got = group_scores(criteria.BeamSearch(removals=3, width=width, null=empty if null else None), subject)
    order = sorted(everything, key=lambda unit: float(got[unit[0]][unit[1]]))
    assert set(order[:3]) == set(best)
    highest = max(float(got[group][unit]) for group, unit in best)
    assert highest >= measured(best) * (1 - 1e-9)
    if width == 100:
        assert measured(best) == pytest.approx(min(map(measured, itertools.combinations(everything, 3))))
    for group, unit in set(everything) - set(best):
        expected = max(highest, measured([*best, (group, unit)]))
        assert float(got[group][unit]) == pytest.approx(expected)


def test_tolerance_masks_shares_until_a_task_loses_too_much() -> None:
    subject = small()
    batches: Any = list(subject.batches)

    def other(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).abs().mean() + 0.1

    tasks = [subject.loss_fn, other]

    def losses(units: Any) -> list[float]:
        model = with_zeros(subject, units)
        with torch.no_grad():
            return [sum(float(task(model, batch)) for batch in batches) / len(batches) for task in tasks]

    base = losses([])
    ranks = {
        name: sorted(
            range(3),
            key=lambda u, name=name: float(
                subject.model.get_submodule(name).weight[u].pow(2).sum()  # type: ignore[union-attr, operator, index]
                + subject.model.get_submodule(str(int(name) + 2)).weight[:, u].pow(2).sum()  # type: ignore
            ),
        )
        for name in ("0", "2")
    }
    for tau, decay in ((0.05, 0.5), (0.5, 0.9), (100.0, 1.0)):
        criterion = criteria.Tolerance(tau, decay, tasks=tasks, order=["2", "0"])
        got, masked, tolerance, within, outside = group_scores(criterion, subject), [], tau, {}, []
        for name in ("2", "0"):
            highest, accepted = 0.0, 0
            for count in range(1, 3):  # shares of 1/20 of three units: one, then two
                tried = [*masked, *((name, unit) for unit in ranks[name][:count])]
                ratio = max(a / b for a, b in zip(losses(tried), base, strict=True)) - 1
                if ratio > tolerance:
                    break
                highest, accepted = max(highest, ratio), count
                within[name, ranks[name][count - 1]] = highest
            masked += [(name, unit) for unit in ranks[name][:accepted]]
            outside += [(name, unit) for unit in ranks[name][accepted:]]
            tolerance *= decay
        for (name, unit), value in within.items():
            assert float(got[name][unit]) == pytest.approx(value, abs=1e-12)
        most = max(within.values(), default=0.0)
        assert all(float(got[name][unit]) >= most + 1 for name, unit in outside)


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
        with pytest.raises(ValueError, match="the criterion 'tolerance' scores no group of this model"):
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
