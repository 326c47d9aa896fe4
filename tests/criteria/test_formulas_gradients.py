"""Criteria of gradients and rows against their formulas, unit by unit in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import (
    by_units,
    changed,
    check,
    damped,
    gradients,
    gram,
    inputs,
    loss,
    make_subject,
    readers,
    sample_losses,
    slices_of,
    unit_rows,
)
from torch import Tensor, nn

from obc import criteria
from obc.criteria import Subject, group_scores
from obc.model.groups import ChannelGroup
from obc.model.latency_table import LatencyTable


@pytest.mark.parametrize("name", ["chain", "grouped", "vit", "llama", "mixtral"])
@pytest.mark.parametrize(("form", "second"), [*itertools.product(["element", "vector"], [False, True])])
def test_llm_pruner(name: str, form: Any, second: bool) -> None:
    subject = make_subject(name)
    rows = gradients(subject)
    weights = {key: p.detach() for key, p in subject.model.named_parameters()}
    expected = {}
    for group in subject.groups:
        for key, take in slices_of(subject, group):
            w = weights[key]
            first = w * sum(row[key] for row in rows)
            fisher = sum(row[key] ** 2 for row in rows) / len(rows)
            salience = first - w * fisher * w / 2 if second else first
            per_unit = [take(salience, u) for u in range(group.size)]
            values = torch.stack([s.abs().sum() if form == "element" else s.sum().abs() for s in per_unit])
            expected[group.name] = expected.get(group.name, 0) + values
    check(group_scores(criteria.LLMPruner(form, second), subject), expected, 2e-5)


@pytest.mark.parametrize("maximum_over", ["sequence", "vocabulary"])
def test_nirvana(maximum_over: Any) -> None:
    subject = make_subject("llama")

    def functional(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0]).logits
        return logits.max(dim=1).values.mean() if maximum_over == "sequence" else logits.max(dim=-1).values.mean()

    rows = gradients(subject, functional)
    weights = {key: p.detach() for key, p in subject.model.named_parameters()}
    expected = {}
    for group in subject.groups:
        for key, take in slices_of(subject, group):
            product = (weights[key] * sum(row[key] for row in rows)).abs()
            values = torch.stack([take(product, u).sum() for u in range(group.size)])
            expected[group.name] = expected.get(group.name, 0) + values
    check(group_scores(criteria.Nirvana(maximum_over), subject), expected, 2e-5)


@pytest.mark.parametrize("name", ["chain", "flatten", "vit", "llama"])
def test_nvit(name: str) -> None:
    subject = make_subject(name)
    factors = {"heads": 1 / 6, "channels": 1.0, "ffn": 1.0}
    rows = unit_rows(subject, everything=True)
    kinds = {group.name: group.kind for group in subject.groups}
    first = subject.groups[0].name
    expected = {key: (r * factors[kinds[key]]).square().mean(0) for key, r in rows.items()}
    expected[first] = expected[first] - 0.5 * 3.0  # milliseconds a unit
    seconds = {group.name: {0: 1.0, group.size: 1.0} for group in subject.groups}
    seconds[first] = {0: 0.0, subject.groups[0].size: 0.003 * subject.groups[0].size}
    criterion = criteria.NViT(criteria.NViT.CODE_WEIGHTS, latency=LatencyTable(seconds), eta=0.5)
    check(group_scores(criterion, subject), expected, 1e-4)


def test_gaprune() -> None:
    subject = make_subject("llama")
    general = [(batch[0].flip(0), batch[1] + 2) for batch in subject.batches]
    got = group_scores(criteria.GAPrune(general, beta=0.7), subject)
    dom, gen = unit_rows(subject, False), unit_rows(Subject(**{**vars(subject), "batches": general}), False)
    for name, scores in got.items():
        importance = dom[name].square().sum(0) - 0.7 * gen[name].square().sum(0)
        ratio = scores / importance
        assert bool(((ratio > 0.8 - 1e-3) & (ratio < 1.2 + 1e-3)).all())
        if "gate_proj" in name:  # one channel a unit: the cosine of two numbers is the sign of their product
            signs = (dom[name].mean(0) * gen[name].mean(0)).sign()
            check({"x": scores}, {"x": importance * (1 + 0.2 * signs)}, 1e-3)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_fastoba_is_a_hessian_vector_product(name: str) -> None:
    """By double backward: sum over i of w_i (Hw)_i, with w all parameters; of smooth models."""
    subject = make_subject(name)
    if name == "llama":
        subject.model.set_attn_implementation("eager")  # the fused attention has no second derivative
    modules = dict(subject.model.named_modules())
    names, parameters = zip(*subject.model.named_parameters(), strict=True)
    products: dict[str, Tensor] = {}
    for batch in subject.batches:
        grads = torch.autograd.grad(loss(subject.model, batch), parameters, create_graph=True)
        along = sum((g * p.detach()).sum() for g, p in zip(grads, parameters, strict=True))
        for key, hw, p in zip(names, torch.autograd.grad(along, parameters), parameters, strict=True):  # type: ignore
            products[key] = products.get(key, 0) + (p * hw).detach() / len(list(subject.batches))
    expected = {}
    for group in subject.groups:
        parts = []
        for part in group.slices:
            if part.module not in modules:
                continue
            taken = slices_of(subject, ChannelGroup(group.name, (part,)))
            values = torch.zeros(group.size, dtype=torch.float64)
            for key, take in taken:
                values += torch.stack([take(products[key], u).sum() for u in range(group.size)])
            own = ["bias"] if taken and part.side == "out" else [] if taken else ["weight", "bias"]
            for key in (f"{part.module}.{k}" for k in own if f"{part.module}.{k}" in products):
                values += torch.stack([products[key][part.channels[u]].sum() for u in range(group.size)])
            parts.append(values)
        expected[group.name] = torch.stack(parts).mean(0).abs()
    check(group_scores(criteria.FastOBA(epsilon=1e-2, relative=False), subject), expected, 2e-3)


@pytest.mark.parametrize("name", ["chain", "vit", "llama"])
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_compensated_jacobian(name: str, rows: Any) -> None:
    """e_u by regressing the unit's channels on all others, position by position; then e . dL/dx."""
    subject = make_subject(name)
    if rows == "sample":
        subject = Subject(**{**vars(subject), "rows": "sample", "loss_fn": sample_losses})
    seen = inputs(subject)
    taps: dict[str, Tensor] = {}

    def tap(layer: str) -> Callable[..., Any]:
        def hook(m: Any, args: Any) -> Any:
            taps[layer] = args[0].detach().requires_grad_()
            return (taps[layer],)

        return hook

    expected: dict[str, Tensor] = {}
    for group in subject.groups:
        for layer_name, layer, channels in readers(subject, group):
            centred = layer.bias is not None
            total = damped(gram(subject, layer_name, layer, seen, centred))
            mean = torch.cat([b.flatten(0, 1) for b in seen[layer_name]]).mean(0) if centred else 0.0
            handle = layer.register_forward_pre_hook(tap(layer_name))
            for index, batch in enumerate(subject.batches):
                subject.loss_fn(subject.model, batch).sum().backward()
                x, grad = taps[layer_name].detach(), taps[layer_name].grad
                if isinstance(layer, nn.Conv2d):
                    x, grad = x.movedim(1, -1), grad.movedim(1, -1)
                x, grad = x.reshape(len(x), -1, x.shape[-1]) - mean, grad.reshape(len(x), -1, x.shape[-1])
                for u, unit in enumerate(channels.tolist()):
                    rest = [j for j in range(x.shape[-1]) if j not in unit]
                    prediction = torch.linalg.solve(total[rest][:, rest], total[rest][:, unit])
                    residual = x[..., unit] - x[..., rest] @ prediction
                    r = (residual * grad[..., unit]).sum((1, 2))
                    key = f"{group.name}/{index}"
                    expected.setdefault(key, torch.zeros(len(x), group.size, dtype=torch.float64))[:, u] += r
            handle.remove()
    subject.model.zero_grad()
    totals: dict[str, Tensor] = {}
    for key, r in expected.items():
        squares = r.square().sum(0) if rows == "sample" else r.sum(0).square()
        totals[key.partition("/")[0]] = totals.get(key.partition("/")[0], 0) + squares
    check(group_scores("compensated_jacobian", subject), totals, 1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 1000])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_rows_of_tokens(name: str, tokens: int) -> None:
    """x . dL/dx position by position, added up by hand; all tokens of a sample make its row."""
    subject = make_subject(name)
    found = criteria.TokenJacobian(tokens).measure_rows(subject)
    for group in subject.groups:
        expected: list[Tensor] = []
        for batch in subject.batches:
            total: Any = 0
            for _, layer, channels in readers(subject, group):
                taps: list[Tensor] = []
                handle = layer.register_forward_pre_hook(
                    lambda m, args, taps=taps: taps.append(args[0].detach().requires_grad_()) or (taps[-1],)
                )
                subject.loss_fn(subject.model, batch).backward()
                handle.remove()
                product = (taps[0].detach() * taps[0].grad)[..., channels].sum(-1)  # (samples, tokens, units)
                total = total + torch.stack([part.sum(0) for sample in product for part in sample.split(tokens)])
            expected.append(total)
        torch.testing.assert_close(found[group.name].double(), torch.cat(expected), rtol=1e-9, atol=1e-12)
    subject.model.zero_grad()
    samples = changed(subject, rows="sample", loss_fn=lambda model, batch: sample_losses(model, batch) / len(batch[0]))
    whole = {name: values.double() for name, values in group_scores("jacobian", samples).items()}
    check(criteria.TokenJacobian(1000).measure(subject), whole, 1e-5)


def test_rows_of_tokens_need_the_same_positions() -> None:
    with pytest.raises(ValueError, match="rows of tokens need layers that see the same positions"):
        criteria.TokenJacobian(2).measure_rows(make_subject("chain"))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        criteria.TokenJacobian(0)


@pytest.mark.parametrize("name", ["chain", "vit", "llama"])
def test_kfac(name: str) -> None:
    subject = make_subject(name)
    seen = inputs(subject)
    squares: dict[str, list[Tensor]] = {}

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        inverse = damped(gram(subject, layer_name, layer, seen, layer.bias is not None)).inverse()
        block = inverse[unit][:, unit].inverse()
        g = torch.cat(squares[layer_name])
        return sum(block[place, place] * g[:, j].pow(2).mean() for place, j in enumerate(unit))  # type: ignore

    for group in subject.groups:
        for layer_name, layer, _ in readers(subject, group):
            taps: list[Tensor] = []
            handle = layer.register_forward_pre_hook(
                lambda m, args, taps=taps: taps.append(args[0].detach().requires_grad_()) or (taps[-1],)
            )
            for batch in subject.batches:
                loss(subject.model, batch).backward()
            handle.remove()
            dim = 1 if isinstance(layer, nn.Conv2d) else -1
            squares[layer_name] = [t.grad.movedim(dim, -1).flatten(0, -2) for t in taps]
    subject.model.zero_grad()
    check(group_scores("kfac", subject), by_units(subject, value), 1e-5)
