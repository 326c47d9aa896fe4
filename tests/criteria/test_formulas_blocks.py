"""Criteria of experts and of whole blocks, and measured losses, against their formulas in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from formulas import block_pairs, check, forward, make_subject
from torch import Tensor
from transcribed import transcribes

import obc
from obc import criteria
from obc.criteria import Subject, group_scores
from obc.statistics.blocks import entropy

BLOCKS = {"vit": "vit.layers", "llama": "model.layers", "mixtral": "model.layers"}


@torch.no_grad()
@pytest.mark.parametrize("gates", ["routed", "softmax"])
@transcribes(
    *(
        f"{name}{switch}"
        for name in ("reap", "expert_frequency", "expert_norm")
        for switch in ("", "(gates='softmax')")
    ),
    models=("mixtral", "qwen2-moe"),
)
def test_experts(name: str, gates: Any) -> None:
    subject = make_subject(name, ["experts"])
    model, groups = subject.model, subject.groups
    calls: dict[str, list[Any]] = {group.name: [] for group in groups}
    reap = group_scores(criteria.REAP(gates), subject)
    counts = group_scores(criteria.ExpertFrequency(gates), subject)
    norms = group_scores(criteria.ExpertNorm(gates), subject)
    assert set(reap) == set(counts) == set(norms) == set(calls)
    for group_name, seen in calls.items():
        model.get_submodule(group_name).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args))
    for batch in subject.batches:
        forward(model, batch)
    for group_name, seen in calls.items():
        experts: Any = model.get_submodule(group_name)
        router: Any = model.get_submodule(group_name.removesuffix("experts") + "gate")
        values: list[list[tuple[float, float]]] = [[] for _ in experts.down_proj]
        for hidden, indices, weights in seen:
            for token, slot in itertools.product(range(len(hidden)), range(indices.shape[1])):
                e = int(indices[token, slot])
                gate, up = (experts.gate_up_proj[e] @ hidden[token]).chunk(2)
                norm = float((experts.down_proj[e] @ (experts.act_fn(gate) * up)).norm())
                g = weights[token, slot] if gates == "routed" else (router.weight @ hidden[token]).softmax(0)[e]
                values[e].append((float(g), norm))
        mean = [sum(g * f for g, f in expert_values) / max(len(expert_values), 1) for expert_values in values]
        check({"x": reap[group_name]}, {"x": torch.tensor(mean, dtype=torch.float64)}, 1e-5)
        check({"x": counts[group_name]}, {"x": torch.tensor([float(len(v)) for v in values], dtype=torch.float64)})
        total = [sum(f for _, f in expert_values) for expert_values in values]
        check({"x": norms[group_name]}, {"x": torch.tensor(total, dtype=torch.float64)}, 1e-5)


def pairs_of(name: str, subject: Subject) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Block -> (input, output) of every batch."""
    pairs = block_pairs(subject.model, [f"{BLOCKS[name]}.{place}" for place in range(2)])
    with torch.no_grad():
        for batch in subject.batches:
            forward(subject.model, batch)
    return pairs


def check_blocks(subject: Subject, criterion: Any, expected: dict[str, float]) -> None:
    """Scores of all blocks, and of the groups: of blocks that may go."""
    statistics = obc.collect(subject.model, subject.batches, statistics=criterion.needs, forward_fn=forward)
    assert criterion.of_blocks(statistics) == pytest.approx(expected, rel=1e-6)
    names = [group.name for group in subject.groups]
    check(group_scores(criterion, subject), {name: torch.tensor([expected[name]]).double() for name in names})


@pytest.mark.parametrize("tokens", ["all", "last"])
@transcribes(
    "block_influence",
    "block_influence(tokens='last')",
    "angular_distance",
    "angular_distance(tokens='all')",
    models=tuple(BLOCKS),
)
def test_blocks(name: str, tokens: Any) -> None:
    """1 - E cos(x, y), and E arccos(cos(x, y)) / pi, over all tokens or the last of each sample."""
    subject = make_subject(name, ["layers"])
    influences, distances = {}, {}
    for block, found in pairs_of(name, subject).items():
        cosines = []
        for x, y in found:
            for sample, place in itertools.product(range(len(x)), range(x.shape[1])):
                if tokens == "all" or place == x.shape[1] - 1:
                    a, b = x[sample, place], y[sample, place]
                    cosines.append(float(a @ b) / math.hypot(*a.tolist()) / math.hypot(*b.tolist()))
        influences[block] = 1 - sum(cosines) / len(cosines)
        distances[block] = sum(math.acos(cosine) / math.pi for cosine in cosines) / len(cosines)
    check_blocks(subject, criteria.BlockInfluence(tokens), influences)
    check_blocks(subject, criteria.AngularDistance(tokens), distances)


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


@pytest.mark.parametrize("spare", [None, "falling", "ends"])
@transcribes("entropy", "entropy(spare='ends')", "entropy(spare=None)", models=tuple(BLOCKS))
def test_entropy_gain_of_blocks(name: str, spare: Any) -> None:
    """The mean over calls of H(y) - H(x), sums over dimensions; one nat above all where a block is spared."""
    subject = make_subject(name, ["layers"])
    gains = {}
    for block, found in pairs_of(name, subject).items():
        calls = [
            sum(binned(d, 5) for d in y.flatten(0, 1).T) - sum(binned(d, 5) for d in x.flatten(0, 1).T)
            for x, y in found
        ]
        gains[block] = sum(calls) / len(calls)
    blocks, spared = list(gains), set()
    if spare == "falling":
        spared = set(itertools.takewhile(lambda block: gains[block] <= 0, blocks))
    elif spare == "ends":
        spared = {*blocks[:2], blocks[-1]}
    most = max(gains.values())
    expected = {block: most + 1 if block in spared else gain for block, gain in gains.items()}
    check_blocks(subject, criteria.EntropyGain(bins=5, spare=spare), expected)
