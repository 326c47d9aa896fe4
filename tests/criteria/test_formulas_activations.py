"""Criteria of activations and of Gram matrices against their formulas, unit by unit in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import (
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
from transcribed import ALL, FOUR, transcribes

import obc
from obc import criteria
from obc.criteria import Subject, group_scores
from obc.structures.transformers import TransformersStructure


@transcribes("flap", "flap(standardise=False)", "flap(code=True)", models=ALL)
def test_flap(name: str) -> None:
    subject = make_subject(name)
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(subject).items()}

    def fluctuation(layer_name: str, layer: Any) -> Tensor:
        x, (columns, _) = seen[layer_name], matrix(layer)
        return torch.stack([x[:, j].var(correction=0) * columns[j].pow(2).sum() for j in range(len(columns))])

    raw = by_units(subject, lambda n, m, unit: fluctuation(n, m)[unit].mean())
    check(group_scores(criteria.FLAP(standardise=False), subject), raw)
    for code in (False, True):
        expected = {}
        for group in subject.groups:
            total = torch.zeros(group.size, dtype=torch.float64)
            for layer_name, layer, channels in readers(subject, group):
                values = fluctuation(layer_name, layer)
                mine = (values.square() if code and group.kind == "heads" else values)[channels.flatten()]
                variance = (mine - mine.mean()).square().sum() / (len(mine) - code)
                total += ((mine - mine.mean()) / variance.sqrt()).view_as(channels).mean(1)
                expected[group.name] = total
        check(group_scores(criteria.FLAP(code=code), subject), expected)


@transcribes("wanda_sp", models=ALL)
def test_wanda_sp(name: str) -> None:
    subject = make_subject(name)
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(subject).items()}

    def value(layer_name: str, layer: Any, unit: list[int]) -> float:
        x, (columns, _) = seen[layer_name], matrix(layer)
        return sum(float(x[:, j].pow(2).mean().sqrt() * columns[j].abs().sum()) for j in unit)

    check(group_scores("wanda_sp", subject), by_units(subject, value))


@transcribes("minitron", models=ALL)
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
@transcribes("cfsp", "cfsp(weights=True)", models=("vit", "llama", "mixtral"))
def test_cfsp(name: str, weights: bool) -> None:
    """The released code's three terms |W| / sum |W|, averaged over the axis along which they sum to 1, cancel."""
    subject = make_subject(name)
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(subject).items()}

    def value(layer_name: str, layer: Any, unit: list[int]) -> float:
        absolute = layer.weight.detach().abs()
        share = (absolute / absolute.sum(1, keepdim=True)).mean(0)
        return sum(float(seen[layer_name][:, j].norm() * (share[j] if weights else 1.0)) for j in unit)

    check(group_scores(criteria.CFSP(weights=weights), subject), by_units(subject, value))


@transcribes("obs(greedy=False)", "obs(to='host')", models=ALL)
def test_obs_is_the_error_of_least_squares_on_what_stays(name: str) -> None:
    subject = make_subject(name)
    seen = inputs(subject)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        return removal_error(damped(gram(subject, layer_name, layer, seen)), matrix(layer)[0], unit)

    expected = by_units(subject, value)
    for to in ("device", "host"):
        check(group_scores(criteria.OBS(greedy=False, to=to), subject), expected, 1e-5)  # type: ignore[arg-type]


@transcribes("obs", models=FOUR)
def test_greedy_obs_removes_one_after_another(name: str) -> None:
    """Its next unit is the one whose removal, on top of those gone, adds least to the error of least squares."""
    subject = make_subject(name)
    seen, got = inputs(subject), group_scores("obs", subject)
    assert set(got) == {group.name for group in subject.groups if readers(subject, group)}
    for group in subject.groups:
        layers = [(damped(gram(subject, n, m, seen)), matrix(m)[0], c) for n, m, c in readers(subject, group)]
        gone: list[int] = []
        highest, before = 0.0, 0.0
        for _ in range(group.size if layers else 0):
            errors = {
                u: float(sum(removal_error(g, w, c[[*gone, u]].flatten().tolist()) for g, w, c in layers))
                for u in range(group.size)
                if u not in gone
            }
            unit = min(errors, key=lambda u: (errors[u], u))
            highest, before = max(highest, errors[unit] - before), errors[unit]
            gone.append(unit)
            assert float(got[group.name][unit]) == pytest.approx(highest, rel=1e-4)


def cholesky_error(total: Tensor, columns: Tensor, unit: list[int]) -> Tensor:
    """The sum over the unit's columns of |W_:j|^2 over the squared diagonal of its block's Cholesky factor."""
    lower = torch.linalg.cholesky(total.inverse()[unit][:, unit])
    return torch.stack([columns[j].pow(2).sum() / lower[k, k] ** 2 for k, j in enumerate(unit)]).sum()


@transcribes("obs(heads='cholesky')", models=ALL)
def test_cholesky_diagonals_of_each_head(name: str) -> None:
    subject = make_subject(name)
    seen = inputs(subject)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        return cholesky_error(damped(gram(subject, layer_name, layer, seen)), matrix(layer)[0], unit)

    check(group_scores(criteria.OBS(greedy=False, heads="cholesky"), subject), by_units(subject, value), 1e-5)


@transcribes("slimgpt", "slimgpt(to='host')", models=FOUR)
def test_slimgpt_removes_one_after_another_and_updates_what_stays(name: str) -> None:
    """After each removal the Gram matrix is that of the kept channels, the weights solve least squares on them."""
    subject = make_subject(name)
    seen, expected = inputs(subject), {}
    for group in subject.groups:
        layers = [(damped(gram(subject, n, m, seen)), matrix(m)[0], c) for n, m, c in readers(subject, group)]
        scores = torch.zeros(group.size, dtype=torch.float64)
        left, highest = list(range(group.size)) if layers else [], 0.0
        while left:
            errors = dict.fromkeys(left, 0.0)
            for total, columns, channels in layers:
                gone = channels[[u for u in range(group.size) if u not in left]].flatten().tolist()
                kept = [j for j in range(len(total)) if j not in gone]
                reduced = total[kept][:, kept]
                solved = torch.linalg.solve(reduced, total[kept] @ columns)
                for u in left:
                    errors[u] += float(cholesky_error(reduced, solved, [kept.index(j) for j in channels[u].tolist()]))
            unit = min(left, key=lambda u: errors[u])
            highest = max(highest, errors[unit])
            scores[unit] = highest
            left.remove(unit)
            expected[group.name] = scores
    check(group_scores("slimgpt", subject), expected, 1e-4)
    check(group_scores(criteria.SlimGPT(to="host"), subject), expected, 1e-4)


@transcribes("obs(first_order=True)", models=FOUR)
def test_tyr_keeps_the_first_order_term(name: str) -> None:
    """The sum over the unit's columns j of |(G W^T)_j . W_j|, and half the error."""
    subject = make_subject(name)
    seen = inputs(subject)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        total, columns = gram(subject, layer_name, layer, seen), matrix(layer)[0]
        first = torch.stack([((total @ columns)[j] @ columns[j]).abs() for j in unit]).sum()
        return first + removal_error(damped(total), columns, unit) / 2

    check(group_scores(criteria.OBS(greedy=False, first_order=True), subject), by_units(subject, value), 1e-5)


@transcribes("reconstruction", models=ALL)
def test_reconstruction(name: str) -> None:
    """The sum over consumers of |W x_u|^2 / |y|^2: the layer itself, given the unit's channels alone, and no bias."""
    subject = make_subject(name)
    seen = inputs(subject)
    expected: dict[str, Tensor] = {}
    for group in subject.groups:
        for layer_name, layer, channels in readers(subject, group):
            if "[" in layer_name:  # an expert of those tokens that were routed to it
                x = torch.cat([batch.flatten(0, 1) for batch in seen[layer_name]])
                weight = layer.weight.detach()
                lost = torch.stack([(x[:, unit] @ weight[:, unit].T).square().sum() for unit in channels])
                expected[group.name] = expected.get(group.name, 0) + lost / (x @ weight.T).square().sum()
                continue
            calls: list[tuple[Tensor, Tensor]] = []
            handle = layer.register_forward_hook(lambda m, args, y, calls=calls: calls.append((args[0], y.clone())))
            for batch in subject.batches:
                forward(subject.model, batch)
            handle.remove()
            linear, dim = copy.deepcopy(layer), 1 if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else -1
            linear.bias = None
            energy = sum(float(y.detach().square().sum()) for _, y in calls)
            lost = torch.zeros(group.size, dtype=torch.float64)
            for (x, _), unit in itertools.product(calls, range(group.size)):
                alone = torch.zeros_like(x).index_copy(dim, channels[unit], x.index_select(dim, channels[unit]))
                lost[unit] += linear(alone).square().sum().detach() / energy
            expected[group.name] = expected.get(group.name, 0) + lost
    check(group_scores("reconstruction", subject), expected)
