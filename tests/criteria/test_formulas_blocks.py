"""Criteria of experts and of whole blocks, and measured losses, against their formulas in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import transformers_families as families
from formulas import block_pairs, check, forward, loss, make_subject, readers

import obc
from obc import criteria
from obc.criteria import Subject, group_scores


@pytest.mark.parametrize(("name", "gates"), [*itertools.product(["mixtral", "qwen2-moe"], ["routed", "softmax"])])
def test_experts(name: str, gates: Any) -> None:
    case = families.FAMILIES[name]()
    model = families.double(case)
    groups = obc.transformer_groups(model, ["experts"])
    subject = Subject(model, groups, case.batches, case.loss, lambda m, b: m(b), "gate", "batch", torch.Generator())
    calls: dict[str, list[Any]] = {group.name: [] for group in groups}
    reap = group_scores(criteria.REAP(gates), subject)
    counts, norms = group_scores("expert_frequency", subject), group_scores("expert_norm", subject)
    for group_name, seen in calls.items():
        model.get_submodule(group_name).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args))
    with torch.no_grad():
        for batch in case.batches:
            model(batch)
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


def test_blocks() -> None:
    subject = make_subject("llama")
    pairs = block_pairs(subject.model)
    influence, distance = criteria.BlockInfluence(), criteria.AngularDistance()
    for criterion, tokens in ((influence, slice(None)), (distance, slice(-1, None))):
        pairs.clear()
        got = criterion.of_blocks(
            obc.collect(subject.model, subject.batches, statistics=criterion.needs, forward_fn=forward)
        )
        for block, found in pairs.items():
            cosines = torch.cat([torch.cosine_similarity(x, y, -1)[:, tokens].flatten() for x, y in found])
            expected = 1 - cosines.mean() if criterion is influence else (cosines.arccos() / math.pi).mean()
            assert got[block] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("name", "metric"), [("vit", "loss"), ("vit", "kl"), ("vit", "mse"), ("chain", "mse")])
def test_masked_evaluation(name: str, metric: Any) -> None:
    """Each unit is zeroed in its consumers' weights, one by one."""
    subject = make_subject(name)
    dense = [getattr(forward(subject.model, batch), "logits", None) for batch in subject.batches]
    dense = [d if d is not None else forward(subject.model, b) for d, b in zip(dense, subject.batches, strict=True)]

    def measured() -> float:
        values = []
        for batch, before in zip(subject.batches, dense, strict=True):
            output = forward(subject.model, batch)
            output = getattr(output, "logits", output)
            if metric == "loss":
                values.append(loss(subject.model, batch))
            elif metric == "mse":
                values.append((output - before).pow(2).mean())
            else:
                p, q = before.softmax(-1), output.softmax(-1)
                values.append((p * (p / q).log()).sum(-1).mean())
        return float(torch.stack(values).mean())

    expected = {}
    with torch.no_grad():
        base = measured()
        for group in subject.groups:
            scores = []
            for u in range(group.size):
                before = {n: layer.weight.clone() for n, layer, _ in readers(subject, group)}
                for _, layer, channels in readers(subject, group):
                    layer.weight[:, channels[u]] = 0
                scores.append(measured() - base)
                for n, layer, _ in readers(subject, group):
                    layer.weight.copy_(before[n])
            expected[group.name] = torch.tensor(scores, dtype=torch.float64)
    check(group_scores(criteria.MaskedEvaluation(metric), subject), expected, 1e-8)


def test_greedy_masked_evaluation_measures_again_after_each_round() -> None:
    subject = make_subject("vit")
    subject = Subject(**{**vars(subject), "groups": subject.groups[:1], "batches": subject.batches[:1]})
    total = sum(group.size for group in subject.groups)
    single = group_scores(criteria.MaskedEvaluation("mse"), subject)
    greedy = group_scores(criteria.MaskedEvaluation("mse", rounds=total), subject)
    first = min((float(s), name, u) for name, scores in single.items() for u, s in enumerate(scores))
    values = sorted((float(s), name, u) for name, scores in greedy.items() for u, s in enumerate(scores))
    assert values[0] == pytest.approx(first)
    assert values[-1][0] > max(float(s.max()) for s in single.values()), "all gone costs more than any one"
