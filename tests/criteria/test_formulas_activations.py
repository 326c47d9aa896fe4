"""Criteria of activations and of Gram matrices against their formulas, unit by unit in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import (
    NAMES,
    by_units,
    check,
    damped,
    forward,
    gram,
    inputs,
    loss,
    make_subject,
    matrix,
    readers,
    removal_error,
)
from torch import Tensor, nn

import obc
from obc import criteria
from obc.criteria import Subject, group_scores
from obc.structures.transformers import TransformersStructure


@pytest.mark.parametrize("name", NAMES)
def test_flap(name: str) -> None:
    subject = make_subject(name)
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(subject).items()}

    def fluctuation(layer_name: str, layer: Any) -> Tensor:
        x, (columns, _) = seen[layer_name], matrix(layer)
        return torch.stack([x[:, j].var(correction=0) * columns[j].pow(2).sum() for j in range(len(columns))])

    raw = by_units(subject, lambda n, m, unit: fluctuation(n, m)[unit].mean())
    check(group_scores(criteria.FLAP(standardise=False), subject), raw)
    expected = {}
    for group in subject.groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for layer_name, layer, channels in readers(subject, group):
            values = fluctuation(layer_name, layer)
            mine = values[channels.flatten()]
            z = (values - mine.mean()) / ((mine - mine.mean()).pow(2).mean().sqrt())
            total += z[channels].mean(1)
            expected[group.name] = total
    check(group_scores("flap", subject), expected)


@pytest.mark.parametrize("name", NAMES)
def test_wanda_sp(name: str) -> None:
    subject = make_subject(name)
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(subject).items()}

    def value(layer_name: str, layer: Any, unit: list[int]) -> float:
        x, (columns, _) = seen[layer_name], matrix(layer)
        return sum(float(x[:, j].pow(2).mean().sqrt() * columns[j].abs().sum()) for j in unit)

    check(group_scores("wanda_sp", subject), by_units(subject, value))


@pytest.mark.parametrize("name", NAMES)
def test_minitron(name: str) -> None:
    subject = make_subject(name)
    seen = inputs(subject)

    def value(layer_name: str, layer: Any, unit: list[int]) -> float:
        per_channel = [
            math.sqrt(sum(float(s[:, j].abs().mean()) ** 2 for batch in seen[layer_name] for s in batch)) for j in unit
        ]
        return math.sqrt(sum(s * s for s in per_channel))

    check(group_scores("minitron", subject), by_units(subject, value))


def small_mamba2(heads: int, groups: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=31,
        hidden_size=8,
        expand=4,
        num_heads=heads,
        head_dim=32 // heads,
        n_groups=groups,
        state_size=4,
        num_hidden_layers=2,
        chunk_size=4,
    )
    torch.manual_seed(0)
    return transformers.Mamba2ForCausalLM(config).double().eval()


def small_grouped_query(heads: int, groups: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(
    ("kind", "make", "reader"),
    [("mixer_heads", small_mamba2, "out_proj"), ("query_heads", small_grouped_query, "o_proj")],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_minitron_of_heads_in_groups(kind: str, make: Callable[..., nn.Module], reader: str, groups: int) -> None:
    """A unit is one head of every group: |s over its channels|_2, and groups keep equal numbers."""
    heads, size = 8, 4
    model = make(heads, groups)
    found = obc.transformer_groups(model, [kind])
    batches = [(torch.arange(n, n + 12).reshape(2, 6) % 31, torch.zeros(2)) for n in range(2)]
    subject = Subject(model, tuple(found), batches, loss, forward, "gate", "batch", torch.Generator())
    seen, expected = inputs(subject), {}
    for group in found:
        assert group.size == heads // groups
        (name,) = [part.module for part in group.consumers if part.module.endswith(reader)]
        means = torch.stack([sample.abs().mean(0) for batch in seen[name] for sample in batch])
        channel_norms = means.square().sum(0).sqrt()
        head_norms = [math.hypot(*channel_norms[h * size : (h + 1) * size].tolist()) for h in range(heads)]
        each = heads // groups
        units = [math.hypot(*(head_norms[g * each + j] for g in range(groups))) for j in range(each)]
        expected[group.name] = torch.tensor(units, dtype=torch.float64)
    scores = group_scores("minitron", subject)
    check(scores, expected)
    structure = TransformersStructure(model, [kind])
    structure.remove({name: values.argsort()[: heads // groups // 2] for name, values in scores.items()})
    widths = {module.in_features for name, module in model.named_modules() if name.endswith(reader)}  # type: ignore
    assert widths == {heads * size // 2}
    model(batches[0][0])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_cfsp(name: str, weights: bool) -> None:
    """The released code's three terms |W| / sum |W|, averaged over the axis along which they sum to 1, cancel."""
    subject = make_subject(name)
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(subject).items()}

    def value(layer_name: str, layer: Any, unit: list[int]) -> float:
        absolute = layer.weight.detach().abs()
        share = (absolute / absolute.sum(1, keepdim=True)).mean(0)
        return sum(float(seen[layer_name][:, j].norm() * (share[j] if weights else 1.0)) for j in unit)

    check(group_scores(criteria.CFSP(weights=weights), subject), by_units(subject, value))


@pytest.mark.parametrize("name", NAMES)
def test_obs_is_the_error_of_least_squares_on_what_stays(name: str) -> None:
    subject = make_subject(name)
    seen = inputs(subject)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        return removal_error(damped(gram(subject, layer_name, layer, seen)), matrix(layer)[0], unit)

    check(group_scores(criteria.OBS(greedy=False), subject), by_units(subject, value), 1e-5)


@pytest.mark.parametrize("name", ["chain", "llama", "vit"])
def test_greedy_obs_removes_one_after_another(name: str) -> None:
    """Its next unit is the one whose removal, on top of those gone, adds least to the error of least squares."""
    subject = make_subject(name)
    seen, got = inputs(subject), group_scores("obs", subject)
    for group in subject.groups:
        layers = [(damped(gram(subject, n, m, seen)), matrix(m)[0], c) for n, m, c in readers(subject, group)]
        gone: list[int] = []
        highest, before = 0.0, 0.0
        for _ in range(min(group.size, 8)):
            errors = {
                u: float(sum(removal_error(g, w, c[[*gone, u]].flatten().tolist()) for g, w, c in layers))
                for u in range(group.size)
                if u not in gone
            }
            unit = min(errors, key=lambda u: (errors[u], u))
            highest, before = max(highest, errors[unit] - before), errors[unit]
            gone.append(unit)
            assert float(got[group.name][unit]) == pytest.approx(highest, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_slimgpt_takes_cholesky_diagonals_of_each_head(name: str) -> None:
    subject = make_subject(name)
    seen = inputs(subject)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        inverse = damped(gram(subject, layer_name, layer, seen)).inverse()
        lower = torch.linalg.cholesky(inverse[unit][:, unit])
        columns = matrix(layer)[0]
        return sum(columns[j].pow(2).sum() / lower[place, place] ** 2 for place, j in enumerate(unit))  # type: ignore

    check(group_scores(criteria.OBS(greedy=False, heads="cholesky"), subject), by_units(subject, value), 1e-5)


def test_tyr_keeps_the_first_order_term() -> None:
    subject = make_subject("chain")
    seen = inputs(subject)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        total, columns = gram(subject, layer_name, layer, seen), matrix(layer)[0]
        first = sum((total @ columns)[j] @ columns[j] for j in unit)
        return first.abs() + removal_error(damped(total), columns, unit) / 2  # type: ignore[union-attr]

    check(group_scores(criteria.OBS(greedy=False, first_order=True), subject), by_units(subject, value), 1e-5)
