"""Criteria of gradients and rows against their formulas, unit by unit in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import (
    LAYERS,
    MIXTURES,
    RIDGE,
    by_units,
    changed,
    check,
    damped,
    expert_name,
    gradients,
    gram,
    inputs,
    logits,
    loss,
    make_subject,
    part_rows,
    products,
    readers,
    removal_error,
    sample_losses,
    separated,
    sums,
    unit_rows,
    values_of,
    weighted,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transcribed import ALL, transcribes

from obc import criteria
from obc.criteria import Subject, group_scores
from obc.model.groups import ChannelGroup, Slice
from obc.model.latency_table import LatencyTable
from obc.model.usable_batches import UsableBatches

Part = Callable[[Tensor], Tensor]


def over_slices(subject: Subject, tensors: dict[str, Tensor], value: Part, mean: bool = False) -> dict[str, Tensor]:
    """The sum or the mean over a group's slices of value(a unit's entries of the tensors)."""
    found = {}
    for group in subject.groups:
        parts = [
            torch.stack([value(take(tensors[key], u)) for u in range(group.size)])
            for _, key, take in weighted(subject, group)
        ]
        if parts:
            found[group.name] = torch.stack(parts).mean(0) if mean else torch.stack(parts).sum(0)
    return found


@transcribes("taylor", models=ALL)
def test_taylor(name: str) -> None:
    """The mean over slices of sum |w g|, g the sum of the batches' gradients."""
    subject = make_subject(name)
    rows = products(subject)
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    expected = over_slices(subject, total, lambda unit: unit.abs().sum(), mean=True)  # type: ignore[arg-type]
    check(group_scores("taylor", subject), expected, 2e-5)


@transcribes("fisher", models=ALL)
def test_fisher(name: str) -> None:
    """The sum over slices and batches of sum (w g_n)^2."""
    subject = make_subject(name)
    rows = products(subject)
    squares = {key: torch.stack([row[key].square() for row in rows]).sum(0) for key in rows[0]}
    check(group_scores("fisher", subject), over_slices(subject, squares, torch.sum), 2e-5)


@pytest.mark.parametrize(("form", "second"), [*itertools.product(["element", "vector"], [False, True])])
@transcribes(
    "llm_pruner_element",
    "llm_pruner_vector",
    "llm_pruner_element(second_order=True)",
    "llm_pruner_vector(second_order=True)",
    models=ALL,
)
def test_llm_pruner(name: str, form: Any, second: bool) -> None:
    subject = make_subject(name)
    rows, weights = gradients(subject), values_of(subject)
    salience = {}
    for key, w in weights.items():
        fisher = torch.stack([row[key].square() for row in rows]).mean(0)
        salience[key] = w * sum(row[key] for row in rows) - (w * fisher * w / 2 if second else 0)
    value: Part = (lambda unit: unit.abs().sum()) if form == "element" else (lambda unit: unit.sum().abs())
    check(group_scores(criteria.LLMPruner(form, second), subject), over_slices(subject, salience, value), 2e-5)


@pytest.mark.parametrize("maximum_over", ["sequence", "vocabulary"])
@transcribes("nirvana", "nirvana(over='vocabulary')", models=ALL)
def test_nirvana(name: str, maximum_over: Any) -> None:
    """f is the mean of the maximum over the sequence, or over the classes, which is all that models of images have."""
    subject = make_subject(name)

    def functional(model: nn.Module, batch: Any) -> Tensor:
        output = logits(model, batch)
        return output.max(dim=1 if output.dim() == 3 and maximum_over == "sequence" else -1).values.mean()

    rows = products(subject, functional)
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    expected = over_slices(subject, total, lambda unit: unit.abs().sum())  # type: ignore[arg-type]
    check(group_scores(criteria.Nirvana(maximum_over), subject), expected, 2e-5)


@transcribes("jacobian", "jacobian(slices='all')", models=ALL)
def test_jacobian(name: str) -> None:
    """Of the gate the consumers' rows are added up before they are squared, else every slice is squared by itself."""
    subject = make_subject(name)
    rows = products(subject)
    gate, everything = {}, {}
    for group in subject.groups:
        gate[group.name] = torch.stack(part_rows(subject, rows, group.consumers)).sum(0).square().sum(0)
        everything[group.name] = torch.stack(part_rows(subject, rows, group.slices)).square().sum((0, 1))
    check(group_scores("jacobian", subject), gate, 2e-5)
    check(group_scores(criteria.Jacobian("all"), changed(subject, slices="all")), everything, 2e-5)


@transcribes("nvit", models=ALL)
def test_nvit(name: str) -> None:
    subject = make_subject(name)
    rows = unit_rows(subject, everything=True)
    check(group_scores("nvit", subject), {key: r.square().mean(0) for key, r in rows.items()}, 1e-4)
    kinds = {group.name: group.kind for group in subject.groups}
    first = subject.groups[0].name
    expected = {key: (r / (6 if kinds[key] == "heads" else 1)).square().mean(0) for key, r in rows.items()}
    expected[first] = expected[first] - 0.5 * 3.0  # milliseconds a unit
    seconds = {group.name: {0: 1.0, group.size: 1.0} for group in subject.groups}
    seconds[first] = {0: 0.0, subject.groups[0].size: 0.003 * subject.groups[0].size}
    criterion = criteria.NViT(criteria.NViT.CODE_WEIGHTS, latency=LatencyTable(seconds), eta=0.5)
    check(group_scores(criterion, subject), expected, 1e-4)


@pytest.mark.parametrize("micro_batch", [None, 2])
@transcribes("jbr", models=ALL)
def test_jbr_is_the_jacobian_criterion_on_the_first_models_predictions(name: str, micro_batch: int | None) -> None:
    subject = make_subject(name)
    subject = changed(subject, batches=UsableBatches(list(subject.batches)), micro_batch=micro_batch)
    criterion = criteria.JBR()
    labels = [logits(subject.model, batch).argmax(-1) for batch in subject.batches]
    place = {id(batch): n for n, batch in enumerate(subject.batches.all)}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        chances = logits(model, batch).log_softmax(-1)
        return -chances.gather(-1, labels[place[id(batch)]].unsqueeze(-1)).mean()

    for _ in range(2):  # the second time the weights are others, and the labels stay
        rows = unit_rows(changed(subject, loss_fn=loss), everything=False, functional=loss)
        check(group_scores(criterion, subject), {key: r.square().sum(0) for key, r in rows.items()}, 1e-4)
        with torch.no_grad():
            for parameter in subject.model.parameters():
                parameter.mul_(1.3)


def general_batches(subject: Subject) -> list[Any]:
    return [(x.flip(0).roll(1, -1), target + 2) for x, target in subject.batches]


def mean_channels(subject: Subject, group: ChannelGroup) -> Tensor:
    """(units, channels of a unit in all consumers) the mean over batches of each channel's w . dL_n/dw."""
    rows, parts = products(subject), []
    for part in group.consumers:
        alone = Slice(part.module, part.side, part.channels.reshape(-1, 1))
        parts.append(torch.stack(part_rows(subject, rows, [alone])).sum(0).mean(0).view_as(part.channels))
    return torch.cat(parts, 1)


@transcribes("gaprune", models=ALL)
def test_gaprune(name: str) -> None:
    subject = make_subject(name)
    other = changed(subject, batches=general_batches(subject))
    dom, gen = unit_rows(subject, False), unit_rows(other, False)
    expected = {}
    for group in subject.groups:
        importance = dom[group.name].square().sum(0) - 0.7 * gen[group.name].square().sum(0)
        a, b = mean_channels(subject, group), mean_channels(other, group)
        cosine = torch.stack([x @ y / (x @ x * (y @ y)).sqrt() for x, y in zip(a, b, strict=True)])
        cosine = cosine.nan_to_num()  # of units behind a ReLU that let nothing through
        expected[group.name] = importance * (1 + 0.2 * cosine).clamp(0.8, 1.2)
    check(group_scores(criteria.GAPrune(other.batches, beta=0.7), subject), expected, 1e-4)


@transcribes("gaprune(code=True)", models=(*ALL, "qwen2-moe", "deepseek-v3", "gpt-oss"))
def test_gaprune_of_single_weights(name: str) -> None:
    """softplus((F_dom - beta F_gen) |w| clip(1 + 0.2 a) + magnitude sqrt|w|), standardised, through a sigmoid."""
    subject = make_subject(name)
    separate, general, epsilon = separated(subject), general_batches(subject), 1e-8
    both, importance = [gradients(separate), gradients(changed(separate, batches=general))], {}
    for key, w in values_of(separate).items():
        fishers = [torch.stack([row[key] ** 2 for row in rows]).mean(0) + epsilon for rows in both]
        means = [torch.stack([row[key] for row in rows]).mean(0) for rows in both]
        product = torch.ones(()).double()
        for mean in means:
            product = product * mean.flatten(1 if w.dim() > 1 else 0) / (mean.norm() + epsilon)
        if product.dim() != 2:
            continue
        padded = F.pad(product, (1, 1, 1, 1))
        shifted = [padded[i : i + len(product), j : j + product.shape[1]] for i in range(3) for j in range(3)]
        a = (torch.stack(shifted).sum(0) / 9).view_as(w)
        raw = (fishers[0] - 0.7 * fishers[1]) * w.abs() * (1 + 0.2 * a).clamp(0.8, 1.2)
        raw = (1 + (raw + 0.3 * (w.abs() + epsilon).sqrt()).exp()).log()
        deviation = ((raw - raw.mean()).square().sum() / (raw.numel() - 1)).sqrt()
        importance[key] = 1 / (1 + (-(raw - raw.mean()) / deviation).exp())
    expected = {}
    for group in subject.groups:
        taken = weighted(separate, group)
        if taken and group.kind != "experts":
            units = [torch.cat([take(importance[key], u) for _, key, take in taken]) for u in range(group.size)]
            expected[group.name] = torch.stack([unit.mean() for unit in units])
    criterion = criteria.GAPrune(general, beta=0.7, code=True, magnitude=0.3)
    check(group_scores(criterion, subject), expected, 1e-5)


@transcribes("fastoba", "fastoba(relative=False)", models=("grouped", "traced-vit", "vit", "llama", "mixtral"))
def test_fastoba_is_a_hessian_vector_product(name: str) -> None:
    """Sum over i of w_i (Hw)_i by double backward, with w all parameters; for smooth models."""
    subject = make_subject(name)
    if hasattr(subject.model, "set_attn_implementation"):
        subject.model.set_attn_implementation("eager")  # the fused attention has no second derivative
    names, parameters = zip(*subject.model.named_parameters(), strict=True)
    batches = list(subject.batches)
    second = dict.fromkeys(names, torch.zeros(()).double())
    for batch in batches:
        grads = torch.autograd.grad(loss(subject.model, batch), parameters, create_graph=True, allow_unused=True)
        along = sum((g * p.detach()).sum() for g, p in zip(grads, parameters, strict=True) if g is not None)
        found = torch.autograd.grad(along, parameters, materialize_grads=True)  # type: ignore[arg-type]
        for key, hw, p in zip(names, found, parameters, strict=True):
            second[key] = second[key] + (p * hw).detach() / len(batches)
    raw, relative = {}, {}
    for group in subject.groups:
        parts = [values for part in group.slices if (values := sums(subject, second, part)) is not None]
        raw[group.name] = torch.stack(parts).mean(0).abs()
        relative[group.name] = raw[group.name] / raw[group.name].mean()
    check(group_scores(criteria.FastOBA(epsilon=1e-3, relative=False), subject), raw, 2e-3)
    check(group_scores(criteria.FastOBA(epsilon=1e-3), subject), relative, 2e-3)


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("rows", ["batch", "sample"])
@transcribes(
    "compensated_jacobian",
    "compensated_jacobian(to='host')",
    models=("chain", "traced-vit", "vit", "llama", *MIXTURES, "gpt-oss"),
)
def test_compensated_jacobian(name: str, rows: Any) -> None:
    """e_u by regressing the unit's channels on all others, position by position; then e . dL/dx."""
    subject = make_subject(name)
    if rows == "sample":
        subject = Subject(**{**vars(subject), "rows": "sample", "loss_fn": sample_losses})
    seen, separate = inputs(subject), separated(subject)
    taps: dict[str, Tensor] = {}

    def tap(layer: str) -> Callable[..., Any]:
        def hook(m: Any, args: Any) -> Any:
            taps[layer] = args[0].detach().requires_grad_()
            return (taps[layer],)

        return hook

    expected: dict[str, Tensor] = {}
    for group in subject.groups:
        for layer_name, layer, channels in readers(separate, group):
            centred = takes_means(layer_name, layer)
            total = damped(gram(subject, layer_name, layer, seen, centred))
            mean = torch.cat([b.flatten(0, 1) for b in seen[layer_name]]).mean(0) if centred else 0.0
            handle = layer.register_forward_pre_hook(tap(layer_name))
            for index, batch in enumerate(subject.batches):
                subject.loss_fn(separate.model, batch).sum().backward()
                x, grad = taps[layer_name].detach(), taps[layer_name].grad
                if isinstance(layer, nn.Conv2d):
                    x, grad = x.movedim(1, -1), grad.movedim(1, -1)
                shape = (len(batch[0]), -1, x.shape[-1])
                x, grad = x.reshape(shape) - mean, grad.reshape(shape)
                for u, unit in enumerate(channels.tolist()):
                    rest = [j for j in range(x.shape[-1]) if j not in unit]
                    prediction = torch.linalg.solve(total[rest][:, rest], total[rest][:, unit])
                    residual = x[..., unit] - x[..., rest] @ prediction
                    r = (residual * grad[..., unit]).sum((1, 2))
                    key = f"{group.name}/{index}"
                    expected.setdefault(key, torch.zeros(len(x), group.size, dtype=torch.float64))[:, u] += r
            handle.remove()
    totals: dict[str, Tensor] = {}
    for key, r in expected.items():
        squares = r.square().sum(0) if rows == "sample" else r.sum(0).square()
        totals[key.partition("/")[0]] = totals.get(key.partition("/")[0], 0) + squares
    check(group_scores("compensated_jacobian", subject), totals, 1e-5)
    check(group_scores(criteria.CompensatedJacobian(to="host"), subject), totals, 1e-5)


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("tokens", [1, 3, 1000])
@transcribes("token_jacobian", models=("traced-vit", "vit", "llama", *MIXTURES, "gpt-oss"))
def test_rows_of_tokens(name: str, tokens: int) -> None:
    """x . dL/dx position by position, added up by hand; all tokens of a sample make its row."""
    subject = make_subject(name)
    separate = separated(subject)
    found = criteria.TokenJacobian(tokens).measure_rows(subject)
    readable = [group for group in subject.groups if readers(separate, group)]
    assert set(found) == {group.name for group in readable}
    for group in readable:
        expected: list[Tensor] = []
        for batch in subject.batches:
            total: Any = 0
            for _, layer, channels in readers(separate, group):
                taps: list[Tensor] = []
                handle = layer.register_forward_pre_hook(
                    lambda m, args, taps=taps: taps.append(args[0].detach().requires_grad_()) or (taps[-1],)
                )
                subject.loss_fn(separate.model, batch).backward()
                handle.remove()
                product = (taps[0].detach() * taps[0].grad)[..., channels].sum(-1)
                product = product.reshape(len(batch[0]), -1, len(channels))  # (samples, tokens, units)
                total = total + torch.stack([part.sum(0) for sample in product for part in sample.split(tokens)])
            expected.append(total)
        torch.testing.assert_close(found[group.name].double(), torch.cat(expected), rtol=1e-9, atol=1e-12)
    size = len(subject.batches[0][0])  # a batch is a mean; models of experts run sample by sample
    samples = changed(subject, rows="sample", loss_fn=lambda model, batch: sample_losses(model, batch) / size)
    whole = {name: v.double() for name, v in group_scores("jacobian", samples).items() if name in found}
    check(criteria.TokenJacobian(1000).measure(subject), whole, 1e-5)


def test_rows_of_tokens_need_the_same_positions() -> None:
    with pytest.raises(ValueError, match="rows of tokens need layers that see the same positions"):
        criteria.TokenJacobian(2).measure_rows(make_subject("chain"))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        criteria.TokenJacobian(0)


@transcribes("kfac", "kfac(to='host')", models=("chain", "traced-vit", "vit", "llama", *MIXTURES, "gpt-oss"))
def test_kfac(name: str) -> None:
    """The mean of g^2 is over a layer's positions, of an expert over the tokens that it gets."""
    subject = make_subject(name)
    seen, separate = inputs(subject), separated(subject)
    squares: dict[str, list[Tensor]] = {}

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        inverse = damped(gram(subject, layer_name, layer, seen, layer.bias is not None)).inverse()
        block = inverse[unit][:, unit].inverse()
        g, count = torch.cat(squares[layer_name]), sum(x[..., 0].numel() for x in seen[layer_name])
        return sum(block[place, place] * g[:, j].pow(2).sum() / count for place, j in enumerate(unit))  # type: ignore

    for group in subject.groups:
        for layer_name, layer, _ in readers(separate, group):
            taps: list[Tensor] = []
            handle = layer.register_forward_pre_hook(
                lambda m, args, taps=taps: taps.append(args[0].detach().requires_grad_()) or (taps[-1],)
            )
            for batch in subject.batches:
                loss(separate.model, batch).backward()
            handle.remove()
            dim = 1 if isinstance(layer, nn.Conv2d) else -1
            squares[layer_name] = [t.grad.movedim(dim, -1).flatten(0, -2) for t in taps]
    expected = by_units(separate, value)
    check(group_scores("kfac", subject), expected, 1e-5)
    check(group_scores(criteria.KFAC(to="host"), subject), expected, 1e-5)


@transcribes(
    "kfac_obs",
    "kfac_obs(factors=False)",
    "kfac_obs(centred=True)",
    "kfac_obs(centred=False)",
    models=("chain", "grouped", "vit", "llama", *MIXTURES, "gpt-oss"),
)
def test_kfac_obs_removes_what_costs_the_loss_least_after_least_squares(name: str) -> None:
    """tr(F (W - V) G (W - V)^T) of the best V without the units: its next unit adds least to it.

    Times the factor by which single units cost more if positions are added before the square.
    """
    subject = make_subject(name)
    if name == "vit":
        subject = changed(subject, rows="sample", loss_fn=sample_losses)
    separate = separated(subject)
    seen, metrics = inputs(subject), output_metrics(separate)
    together = group_scores("compensated_jacobian", subject)
    count = sum(len(batch[0]) for batch in subject.batches) if subject.rows == "sample" else len(subject.batches)
    for centred in (None, True, False):
        apart = group_scores(criteria.KFACOBS(RIDGE, centred, factors=False), subject)
        got = group_scores(criteria.KFACOBS(RIDGE), subject) if centred is None else {}
        for group in subject.groups:
            if not (read := readers(separate, group)):
                assert group.name not in apart
                continue
            layers = []
            for layer_name, layer, channels in read:
                without_mean = takes_means(layer_name, layer) if centred is None else centred
                total = damped(gram(subject, layer_name, layer, seen, without_mean, share=False))
                layers.append((total, in_metric(layer, metrics[layer_name]), channels))
            gone: list[int] = []
            highest, before = 0.0, 0.0
            for _ in range(min(group.size, 4)):
                errors = {
                    u: float(sum(removal_error(g, w, c[[*gone, u]].flatten().tolist()) for g, w, c in layers))
                    for u in range(group.size)
                    if u not in gone
                }
                if not gone:
                    factor = float(together[group.name].sum()) / count / sum(errors.values())
                unit = min(errors, key=lambda u: (errors[u], u))
                highest, before = max(highest, errors[unit] - before), errors[unit]
                gone.append(unit)
                assert float(apart[group.name][unit]) == pytest.approx(highest, rel=1e-4)
                if got:
                    assert float(got[group.name][unit]) == pytest.approx(factor * highest, rel=1e-4)


def test_kfac_obs_takes_a_larger_ridge_where_there_are_few_positions() -> None:
    subject = make_subject("chain")
    seen, got = inputs(subject), group_scores("kfac_obs", subject)
    for group in subject.groups:
        ((name, _, _),) = readers(subject, group)
        count = sum(x[..., 0].numel() for x in seen[name])
        ridge = 0.01 + 10 * seen[name][0].shape[-1] / count
        expected = group_scores(criteria.KFACOBS(ridge), changed(subject, groups=[group]))
        torch.testing.assert_close(got[group.name], expected[group.name])


def takes_means(name: str, layer: Any) -> bool:
    """Whether a bias takes the mean of what goes, or a BatchNorm: of the "chain" the one behind its second layer."""
    return layer.bias is not None or name == "features.3"


def output_metrics(subject: Subject) -> dict[str, Tensor]:
    """Layer -> the mean over rows of the sum over positions of g g^T, g = dL/dy, by hooks on whole backward passes."""
    sums: dict[str, Tensor] = {}

    def note(name: str, convolution: bool) -> Callable[..., Tensor]:
        def read(grad: Tensor) -> None:
            g = (grad.movedim(1, -1) if convolution else grad).flatten(0, -2)
            key = expert_name(name)
            sums[key] = sums.get(key, 0) + g.mT @ g

        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            output = output.clone()  # what follows may change it in place
            output.register_hook(read)
            return output

        return hook

    handles = [
        module.register_forward_hook(note(name, not isinstance(module, nn.Linear)))
        for name, module in subject.model.named_modules()
        if isinstance(module, LAYERS)
    ]
    for batch in subject.batches:
        subject.loss_fn(subject.model, batch).sum().backward()
    for handle in handles:
        handle.remove()
    subject.model.zero_grad()
    count = sum(len(batch[0]) for batch in subject.batches) if subject.rows == "sample" else len(subject.batches)
    return {name: total / count for name, total in sums.items()}


def in_metric(layer: Any, metric: Tensor) -> Tensor:
    """(in, anything) columns whose squared length is that of the weight's in F: by its Cholesky factor."""
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    transposed, size, found = isinstance(layer, nn.ConvTranspose2d), len(metric) // groups, []
    for group, part in enumerate(weight.chunk(groups)):
        block = slice(group * size, (group + 1) * size)
        own = metric[block, block]
        factor = torch.linalg.cholesky(own + 1e-12 * own.diagonal().mean() * torch.eye(size, dtype=own.dtype))
        by_input = part if transposed else part.transpose(0, 1)
        found += [(factor.mT @ values.reshape(size, -1)).flatten() for values in by_input]
    return torch.stack(found)
