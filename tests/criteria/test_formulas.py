"""Every criterion of statistics against its formula, written out unit by unit in float64 from the published form."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers_families as families
from torch import Tensor, nn

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from models import regression_losses  # noqa: E402
from prunable import RECIPES  # noqa: E402

import obc  # noqa: E402
from obc import criteria  # noqa: E402
from obc.criteria import Subject, group_scores  # noqa: E402
from obc.model.groups import ChannelGroup  # noqa: E402
from obc.model.latency_table import LatencyTable  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402
from obc.structures.transformers import TransformersStructure  # noqa: E402

TRACED = ("chain", "flatten", "grouped", "vit")
NAMES = (*TRACED, "llama", "mixtral")
RIDGE = 1e-2
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def sample_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    output = model(x)
    return regression_losses(getattr(output, "logits", output), target)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return sample_losses(model, batch).mean()


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    return model(batch[0])


def subject(name: str) -> Subject:
    generator = torch.Generator().manual_seed(0)
    if name in TRACED:
        recipe = RECIPES[name]
        model = recipe.model()
        inputs = [recipe.inputs(3, seed) for seed in range(4)]
        groups = TorchPruningStructure(
            model, recipe.inputs(2).requires_grad_(), ignored_layers=recipe.ignored, num_heads=recipe.heads
        ).groups
    else:
        case = families.FAMILIES[name]()
        model, inputs = families.double(case) if name == "mixtral" else copy.deepcopy(case.model).double(), case.batches
        groups = tuple(obc.transformer_groups(model))
    batches = [(x, torch.arange(float(len(x))) + n) for n, x in enumerate(inputs)]
    return Subject(model, groups, batches, loss, forward, "gate", "batch", generator)


def changed(of: Subject, **fields: Any) -> Subject:
    """The same subject, these fields aside."""
    return Subject(**{**vars(of), **fields})


def readers(of: Subject, group: ChannelGroup) -> list[tuple[str, Any, Tensor]]:
    """(name, layer, channels) of the consumers that are layers, and of every expert's down projection."""
    modules = dict(of.model.named_modules())
    found: list[tuple[str, Any, Tensor]] = []
    for part in group.consumers:
        module: Any = modules.get(part.module)
        if part.side == "in" and hasattr(module, "weight"):
            found.append((part.module, module, part.channels))
        elif part.side == "in" and hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Parameter):
            for expert, weight in enumerate(module.down_proj):
                found.append((f"{part.module}[{expert}]", SimpleNamespace(weight=weight, bias=None), part.channels))
    return found


def matrix(layer: Any) -> tuple[Tensor, int]:
    """(in, anything) the layer's weight by in channel, and its convolution's groups."""
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    if type(layer).__name__ == "Conv1D":
        return weight, 1
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1), groups
    if groups == 1:
        return weight.transpose(0, 1).flatten(1), 1
    rows, width = len(weight) // groups, weight.shape[1]
    columns = [weight[g * rows : (g + 1) * rows, c].flatten() for g in range(groups) for c in range(width)]
    return torch.stack(columns), groups


def inputs(of: Subject) -> dict[str, list[Tensor]]:
    """Layer -> its inputs (samples, positions, channels), batch by batch."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in of.model.named_modules():
        if isinstance(module, LAYERS):
            convolution = not isinstance(module, nn.Linear)

            def note(_: Any, args: Any, name: str = name, convolution: bool = convolution) -> None:
                x = args[0].detach()
                x = x.movedim(1, -1) if convolution else x
                seen.setdefault(name, []).append(x.reshape(len(x), -1, x.shape[-1]))

            handles.append(module.register_forward_pre_hook(note))
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):

            def note_experts(m: Any, args: Any, name: str = name) -> None:
                hidden, indices, _ = args
                for expert in range(len(m.down_proj)):
                    gate, up = (hidden[(indices == expert).any(1)] @ m.gate_up_proj[expert].T).chunk(2, 1)
                    seen.setdefault(f"{name}[{expert}]", []).append((m.act_fn(gate) * up).detach()[:, None])

            handles.append(module.register_forward_pre_hook(note_experts))
    with torch.no_grad():
        for batch in of.batches:
            forward(of.model, batch)
    for handle in handles:
        handle.remove()
    return seen


def check(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-6) -> None:
    assert set(got) == set(expected)
    assert expected
    for name, values in expected.items():
        torch.testing.assert_close(got[name].double(), values, rtol=rtol, atol=rtol * float(values.abs().max()))


def by_units(of: Subject, value: Callable[[str, Any, list[int]], Tensor | float]) -> dict[str, Tensor]:
    """The sum over consumers of value(name, layer, the unit's channels)."""
    found = {}
    for group in of.groups:
        layers = readers(of, group)
        if layers:
            units = [
                sum(torch.as_tensor(value(name, layer, channels[u].tolist())) for name, layer, channels in layers)
                for u in range(group.size)
            ]
            found[group.name] = torch.stack(units).double()  # type: ignore[arg-type]
    return found


# --- forward statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_flap(name: str) -> None:
    of = subject(name)
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(of).items()}

    def fluctuation(layer_name: str, layer: Any) -> Tensor:
        x, (columns, _) = seen[layer_name], matrix(layer)
        return torch.stack([x[:, j].var(correction=0) * columns[j].pow(2).sum() for j in range(len(columns))])

    raw = by_units(of, lambda n, m, unit: fluctuation(n, m)[unit].mean())
    check(group_scores(criteria.FLAP(standardise=False), of), raw)
    expected = {}
    for group in of.groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for layer_name, layer, channels in readers(of, group):
            values = fluctuation(layer_name, layer)
            mine = values[channels.flatten()]
            z = (values - mine.mean()) / ((mine - mine.mean()).pow(2).mean().sqrt())
            total += z[channels].mean(1)
            expected[group.name] = total
    check(group_scores("flap", of), expected)


@pytest.mark.parametrize("name", NAMES)
def test_wanda_sp(name: str) -> None:
    of = subject(name)
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(of).items()}

    def value(layer_name: str, layer: Any, unit: list[int]) -> float:
        x, (columns, _) = seen[layer_name], matrix(layer)
        return sum(float(x[:, j].pow(2).mean().sqrt() * columns[j].abs().sum()) for j in unit)

    check(group_scores("wanda_sp", of), by_units(of, value))


@pytest.mark.parametrize("name", NAMES)
def test_minitron(name: str) -> None:
    of = subject(name)
    seen = inputs(of)

    def value(layer_name: str, layer: Any, unit: list[int]) -> float:
        per_channel = [
            math.sqrt(sum(float(s[:, j].abs().mean()) ** 2 for batch in seen[layer_name] for s in batch)) for j in unit
        ]
        return math.sqrt(sum(s * s for s in per_channel))

    check(group_scores("minitron", of), by_units(of, value))


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
    of = Subject(model, tuple(found), batches, loss, forward, "gate", "batch", torch.Generator())
    seen, expected = inputs(of), {}
    for group in found:
        assert group.size == heads // groups
        (name,) = [part.module for part in group.consumers if part.module.endswith(reader)]
        means = torch.stack([sample.abs().mean(0) for batch in seen[name] for sample in batch])
        of_channel = means.square().sum(0).sqrt()
        of_head = [math.hypot(*of_channel[h * size : (h + 1) * size].tolist()) for h in range(heads)]
        each = heads // groups
        units = [math.hypot(*(of_head[g * each + j] for g in range(groups))) for j in range(each)]
        expected[group.name] = torch.tensor(units, dtype=torch.float64)
    scores = group_scores("minitron", of)
    check(scores, expected)
    structure = TransformersStructure(model, [kind])
    structure.remove({name: values.argsort()[: heads // groups // 2] for name, values in scores.items()})
    widths = {module.in_features for name, module in model.named_modules() if name.endswith(reader)}  # type: ignore
    assert widths == {heads * size // 2}
    model(batches[0][0])


@pytest.mark.parametrize("weights", [False, True])
def test_cfsp(weights: bool) -> None:
    """The released code's three terms |W| / sum |W|, averaged over the axis along which they sum to 1, cancel."""
    of = subject("llama")
    seen = {layer: torch.cat([x.flatten(0, 1) for x in batches]) for layer, batches in inputs(of).items()}

    def value(layer_name: str, layer: Any, unit: list[int]) -> float:
        absolute = layer.weight.detach().abs()
        share = (absolute / absolute.sum(1, keepdim=True)).mean(0)
        return sum(float(seen[layer_name][:, j].norm() * (share[j] if weights else 1.0)) for j in unit)

    check(group_scores(criteria.CFSP(weights=weights), of), by_units(of, value))


def gram(of: Subject, layer_name: str, layer: Any, seen: dict[str, list[Tensor]], centred: bool = False) -> Tensor:
    """Of an expert: times its share of the tokens that were routed anywhere in its mixture."""
    x = torch.cat([batch.flatten(0, 1) for batch in seen[layer_name]])
    x = x - x.mean(0) if centred else x
    mixture = layer_name.partition("[")[0]
    together = [batch for name, inputs in seen.items() if name.partition("[")[0] == mixture for batch in inputs]
    total = x.mT @ x / sum(map(len, together) if "[" in layer_name else [len(x)])
    _, groups = matrix(layer)
    block = torch.block_diag(*[torch.ones(len(total) // groups, len(total) // groups)] * groups)
    return total * block


def damped(total: Tensor) -> Tensor:
    return total + RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)


def removal_error(total: Tensor, columns: Tensor, gone: list[int]) -> Tensor:
    """The least of tr((W - V) G (W - V)^T) over V that is zero at the columns that are gone: solved, not by P."""
    kept = [j for j in range(len(total)) if j not in gone]
    if not kept:
        return (columns.mT @ total @ columns).trace()
    change = torch.linalg.solve(total[kept][:, kept], total[kept] @ columns)
    difference = columns.clone()
    difference[kept] -= change
    return (difference.mT @ total @ difference).trace()


@pytest.mark.parametrize("name", NAMES)
def test_obs_is_the_error_of_least_squares_on_what_stays(name: str) -> None:
    of = subject(name)
    seen = inputs(of)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        return removal_error(damped(gram(of, layer_name, layer, seen)), matrix(layer)[0], unit)

    check(group_scores(criteria.OBS(greedy=False), of), by_units(of, value), 1e-5)


@pytest.mark.parametrize("name", ["chain", "llama", "vit"])
def test_greedy_obs_removes_one_after_another(name: str) -> None:
    """Its next unit is the one whose removal, on top of those gone, adds least to the error of least squares."""
    of = subject(name)
    seen, got = inputs(of), group_scores("obs", of)
    for group in of.groups:
        layers = [(damped(gram(of, n, m, seen)), matrix(m)[0], c) for n, m, c in readers(of, group)]
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


def test_slimgpt_takes_cholesky_diagonals_of_each_head() -> None:
    of = subject("llama")
    seen = inputs(of)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        inverse = damped(gram(of, layer_name, layer, seen)).inverse()
        lower = torch.linalg.cholesky(inverse[unit][:, unit])
        columns = matrix(layer)[0]
        return sum(columns[j].pow(2).sum() / lower[place, place] ** 2 for place, j in enumerate(unit))  # type: ignore

    check(group_scores(criteria.OBS(greedy=False, heads="cholesky"), of), by_units(of, value), 1e-5)


def test_tyr_keeps_the_first_order_term() -> None:
    of = subject("chain")
    seen = inputs(of)

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        total, columns = gram(of, layer_name, layer, seen), matrix(layer)[0]
        first = sum((total @ columns)[j] @ columns[j] for j in unit)
        return first.abs() + removal_error(damped(total), columns, unit) / 2  # type: ignore[union-attr]

    check(group_scores(criteria.OBS(greedy=False, first_order=True), of), by_units(of, value), 1e-5)


@pytest.mark.parametrize(("name", "gates"), [*itertools.product(["mixtral", "qwen2-moe"], ["routed", "softmax"])])
def test_experts(name: str, gates: Any) -> None:
    case = families.FAMILIES[name]()
    model = families.double(case)
    groups = obc.transformer_groups(model, ["experts"])
    of = Subject(model, groups, case.batches, case.loss, lambda m, b: m(b), "gate", "batch", torch.Generator())
    calls: dict[str, list[Any]] = {group.name: [] for group in groups}
    reap = group_scores(criteria.REAP(gates), of)
    counts, norms = group_scores("expert_frequency", of), group_scores("expert_norm", of)
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
        mean = [sum(g * f for g, f in of_expert) / max(len(of_expert), 1) for of_expert in values]
        check({"x": reap[group_name]}, {"x": torch.tensor(mean, dtype=torch.float64)}, 1e-5)
        check({"x": counts[group_name]}, {"x": torch.tensor([float(len(v)) for v in values], dtype=torch.float64)})
        total = [sum(f for _, f in of_expert) for of_expert in values]
        check({"x": norms[group_name]}, {"x": torch.tensor(total, dtype=torch.float64)}, 1e-5)


def block_pairs(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Block -> (input, output) of its calls, filled while the model runs."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for index in range(2):
        block = f"model.layers.{index}"
        model.get_submodule(block).register_forward_hook(
            lambda m, args, y, block=block: pairs.setdefault(block, []).append(
                (args[0].detach(), (y[0] if isinstance(y, tuple) else y).detach())
            )
        )
    return pairs


def test_blocks() -> None:
    of = subject("llama")
    pairs = block_pairs(of.model)
    influence, distance = criteria.BlockInfluence(), criteria.AngularDistance()
    for criterion, tokens in ((influence, slice(None)), (distance, slice(-1, None))):
        pairs.clear()
        got = criterion.of_blocks(obc.collect(of.model, of.batches, statistics=criterion.needs, forward_fn=forward))
        for block, found in pairs.items():
            cosines = torch.cat([torch.cosine_similarity(x, y, -1)[:, tokens].flatten() for x, y in found])
            expected = 1 - cosines.mean() if criterion is influence else (cosines.arccos() / math.pi).mean()
            assert got[block] == pytest.approx(float(expected), rel=1e-6)


# --- gradients -----------------------------------------------------------------------------------------------------


def gradients(of: Subject, functional: Callable[..., Tensor] = loss) -> list[dict[str, Tensor]]:
    names, parameters = zip(*of.model.named_parameters(), strict=True)
    found = []
    for batch in of.batches:
        grads = torch.autograd.grad(functional(of.model, batch), parameters, materialize_grads=True)
        found.append(dict(zip(names, grads, strict=True)))
    return found


def slices_of(of: Subject, group: ChannelGroup) -> list[tuple[str, Callable[[Tensor, int], Tensor]]]:
    """(parameter, what takes a unit's entries out of a tensor like it) of every slice of a layer with two sides."""
    found = []
    modules = dict(of.model.named_modules())
    for part in group.slices:
        layer: Any = modules.get(part.module)
        if isinstance(layer, LAYERS):
            groups = getattr(layer, "groups", 1)

            transposed = isinstance(layer, nn.ConvTranspose2d)  # of these models one in a single group

            def take(
                t: Tensor, u: int, part: Any = part, groups: int = groups, transposed: bool = transposed
            ) -> Tensor:
                channels = part.channels[u].tolist()
                if transposed:
                    return t[:, channels].flatten() if part.side == "out" else t[channels].flatten()
                if part.side == "out":
                    return t[channels].flatten()
                width, rows = t.shape[1], len(t) // groups
                picked = [t[c // width * rows : (c // width + 1) * rows, c % width].flatten() for c in channels]
                return torch.cat(picked)

            found.append((f"{part.module}.weight", take))
    return found


@pytest.mark.parametrize("name", ["chain", "grouped", "llama"])
@pytest.mark.parametrize(("form", "second"), [*itertools.product(["element", "vector"], [False, True])])
def test_llm_pruner(name: str, form: Any, second: bool) -> None:
    of = subject(name)
    rows = gradients(of)
    weights = {key: p.detach() for key, p in of.model.named_parameters()}
    expected = {}
    for group in of.groups:
        for key, take in slices_of(of, group):
            w = weights[key]
            first = w * sum(row[key] for row in rows)
            fisher = sum(row[key] ** 2 for row in rows) / len(rows)
            salience = first - w * fisher * w / 2 if second else first
            per_unit = [take(salience, u) for u in range(group.size)]
            values = torch.stack([s.abs().sum() if form == "element" else s.sum().abs() for s in per_unit])
            expected[group.name] = expected.get(group.name, 0) + values
    check(group_scores(criteria.LLMPruner(form, second), of), expected, 2e-5)


@pytest.mark.parametrize("over", ["sequence", "vocabulary"])
def test_nirvana(over: Any) -> None:
    of = subject("llama")

    def functional(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0]).logits
        return logits.max(dim=1).values.mean() if over == "sequence" else logits.max(dim=-1).values.mean()

    rows = gradients(of, functional)
    weights = {key: p.detach() for key, p in of.model.named_parameters()}
    expected = {}
    for group in of.groups:
        for key, take in slices_of(of, group):
            product = (weights[key] * sum(row[key] for row in rows)).abs()
            values = torch.stack([take(product, u).sum() for u in range(group.size)])
            expected[group.name] = expected.get(group.name, 0) + values
    check(group_scores(criteria.Nirvana(over), of), expected, 2e-5)


def unit_rows(of: Subject, everything: bool, functional: Callable[..., Tensor] = loss) -> dict[str, Tensor]:
    """(N, units) per group: the sum over all slices, or the consumers alone, of w . dL_n/dw with biases and norms."""
    rows = gradients(of, functional)
    parameters = {key: p.detach() for key, p in of.model.named_parameters()}
    modules = dict(of.model.named_modules())
    found = {}
    for group in of.groups:
        total = torch.zeros(len(rows), group.size, dtype=torch.float64)
        for part in group.slices if everything else group.consumers:
            layer: Any = modules.get(part.module)
            if layer is None:
                continue
            if isinstance(layer, LAYERS):
                ((key, take),) = slices_of(of, ChannelGroup(group.name, (part,)))
                for n, u in itertools.product(range(len(rows)), range(group.size)):
                    total[n, u] += take(parameters[key] * rows[n][key], u).sum()
            keys = [] if part.side == "in" else ["bias"]
            if not isinstance(layer, LAYERS):
                keys = ["weight", "bias"]
            for key in (f"{part.module}.{k}" for k in keys if f"{part.module}.{k}" in parameters):
                for n, u in itertools.product(range(len(rows)), range(group.size)):
                    total[n, u] += (parameters[key] * rows[n][key])[part.channels[u]].sum()
        found[group.name] = total
    return found


@pytest.mark.parametrize("name", ["chain", "flatten", "vit", "llama"])
def test_nvit(name: str) -> None:
    of = subject(name)
    factors = {"heads": 1 / 6, "channels": 1.0, "ffn": 1.0}
    rows = unit_rows(of, everything=True)
    kinds = {group.name: group.kind for group in of.groups}
    first = of.groups[0].name
    expected = {key: (r * factors[kinds[key]]).square().mean(0) for key, r in rows.items()}
    expected[first] = expected[first] - 0.5 * 3.0  # milliseconds a unit
    seconds = {group.name: {0: 1.0, group.size: 1.0} for group in of.groups}
    seconds[first] = {0: 0.0, of.groups[0].size: 0.003 * of.groups[0].size}
    criterion = criteria.NViT(criteria.NViT.CODE_WEIGHTS, latency=LatencyTable(seconds), eta=0.5)
    check(group_scores(criterion, of), expected, 1e-4)


def test_gaprune() -> None:
    of = subject("llama")
    general = [(batch[0].flip(0), batch[1] + 2) for batch in of.batches]
    got = group_scores(criteria.GAPrune(general, beta=0.7), of)
    dom, gen = unit_rows(of, False), unit_rows(Subject(**{**vars(of), "batches": general}), False)
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
    of = subject(name)
    if name == "llama":
        of.model.set_attn_implementation("eager")  # the fused attention has no second derivative
    modules = dict(of.model.named_modules())
    names, parameters = zip(*of.model.named_parameters(), strict=True)
    products: dict[str, Tensor] = {}
    for batch in of.batches:
        grads = torch.autograd.grad(loss(of.model, batch), parameters, create_graph=True)
        along = sum((g * p.detach()).sum() for g, p in zip(grads, parameters, strict=True))
        for key, hw, p in zip(names, torch.autograd.grad(along, parameters), parameters, strict=True):  # type: ignore
            products[key] = products.get(key, 0) + (p * hw).detach() / len(list(of.batches))
    expected = {}
    for group in of.groups:
        parts = []
        for part in group.slices:
            if part.module not in modules:
                continue
            taken = slices_of(of, ChannelGroup(group.name, (part,)))
            values = torch.zeros(group.size, dtype=torch.float64)
            for key, take in taken:
                values += torch.stack([take(products[key], u).sum() for u in range(group.size)])
            own = ["bias"] if taken and part.side == "out" else [] if taken else ["weight", "bias"]
            for key in (f"{part.module}.{k}" for k in own if f"{part.module}.{k}" in products):
                values += torch.stack([products[key][part.channels[u]].sum() for u in range(group.size)])
            parts.append(values)
        expected[group.name] = torch.stack(parts).mean(0).abs()
    check(group_scores(criteria.FastOBA(epsilon=1e-2, relative=False), of), expected, 2e-3)


@pytest.mark.parametrize("name", ["chain", "vit", "llama"])
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_compensated_jacobian(name: str, rows: Any) -> None:
    """e_u by regressing the unit's channels on all others, position by position; then e . dL/dx."""
    of = subject(name)
    if rows == "sample":
        of = Subject(**{**vars(of), "rows": "sample", "loss_fn": sample_losses})
    seen = inputs(of)
    taps: dict[str, Tensor] = {}

    def tap(layer: str) -> Callable[..., Any]:
        def hook(m: Any, args: Any) -> Any:
            taps[layer] = args[0].detach().requires_grad_()
            return (taps[layer],)

        return hook

    expected: dict[str, Tensor] = {}
    for group in of.groups:
        for layer_name, layer, channels in readers(of, group):
            centred = layer.bias is not None
            total = damped(gram(of, layer_name, layer, seen, centred))
            mean = torch.cat([b.flatten(0, 1) for b in seen[layer_name]]).mean(0) if centred else 0.0
            handle = layer.register_forward_pre_hook(tap(layer_name))
            for index, batch in enumerate(of.batches):
                of.loss_fn(of.model, batch).sum().backward()
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
    of.model.zero_grad()
    totals: dict[str, Tensor] = {}
    for key, r in expected.items():
        squares = r.square().sum(0) if rows == "sample" else r.sum(0).square()
        totals[key.partition("/")[0]] = totals.get(key.partition("/")[0], 0) + squares
    check(group_scores("compensated_jacobian", of), totals, 1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 1000])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_rows_of_tokens(name: str, tokens: int) -> None:
    """x . dL/dx position by position, added up by hand; all tokens of a sample make its row."""
    of = subject(name)
    found = criteria.TokenJacobian(tokens).measure_rows(of)
    for group in of.groups:
        expected: list[Tensor] = []
        for batch in of.batches:
            total: Any = 0
            for _, layer, channels in readers(of, group):
                taps: list[Tensor] = []
                handle = layer.register_forward_pre_hook(
                    lambda m, args, taps=taps: taps.append(args[0].detach().requires_grad_()) or (taps[-1],)
                )
                of.loss_fn(of.model, batch).backward()
                handle.remove()
                product = (taps[0].detach() * taps[0].grad)[..., channels].sum(-1)  # (samples, tokens, units)
                total = total + torch.stack([part.sum(0) for sample in product for part in sample.split(tokens)])
            expected.append(total)
        torch.testing.assert_close(found[group.name].double(), torch.cat(expected), rtol=1e-9, atol=1e-12)
    of.model.zero_grad()
    samples = changed(of, rows="sample", loss_fn=lambda model, batch: sample_losses(model, batch) / len(batch[0]))
    whole = {name: values.double() for name, values in group_scores("jacobian", samples).items()}
    check(criteria.TokenJacobian(1000).measure(of), whole, 1e-5)


def test_rows_of_tokens_need_the_same_positions() -> None:
    with pytest.raises(ValueError, match="rows of tokens need layers that see the same positions"):
        criteria.TokenJacobian(2).measure_rows(subject("chain"))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        criteria.TokenJacobian(0)


@pytest.mark.parametrize("name", ["chain", "vit", "llama"])
def test_kfac(name: str) -> None:
    of = subject(name)
    seen = inputs(of)
    squares: dict[str, list[Tensor]] = {}

    def value(layer_name: str, layer: Any, unit: list[int]) -> Tensor:
        inverse = damped(gram(of, layer_name, layer, seen, layer.bias is not None)).inverse()
        block = inverse[unit][:, unit].inverse()
        g = torch.cat(squares[layer_name])
        return sum(block[place, place] * g[:, j].pow(2).mean() for place, j in enumerate(unit))  # type: ignore

    for group in of.groups:
        for layer_name, layer, _ in readers(of, group):
            taps: list[Tensor] = []
            handle = layer.register_forward_pre_hook(
                lambda m, args, taps=taps: taps.append(args[0].detach().requires_grad_()) or (taps[-1],)
            )
            for batch in of.batches:
                loss(of.model, batch).backward()
            handle.remove()
            dim = 1 if isinstance(layer, nn.Conv2d) else -1
            squares[layer_name] = [t.grad.movedim(dim, -1).flatten(0, -2) for t in taps]
    of.model.zero_grad()
    check(group_scores("kfac", of), by_units(of, value), 1e-5)


@pytest.mark.parametrize(("name", "metric"), [("vit", "loss"), ("vit", "kl"), ("vit", "mse"), ("chain", "mse")])
def test_masked_evaluation(name: str, metric: Any) -> None:
    """Each unit is zeroed in its consumers' weights, one by one."""
    of = subject(name)
    dense = [getattr(forward(of.model, batch), "logits", None) for batch in of.batches]
    dense = [d if d is not None else forward(of.model, b) for d, b in zip(dense, of.batches, strict=True)]

    def measured() -> float:
        values = []
        for batch, before in zip(of.batches, dense, strict=True):
            output = forward(of.model, batch)
            output = getattr(output, "logits", output)
            if metric == "loss":
                values.append(loss(of.model, batch))
            elif metric == "mse":
                values.append((output - before).pow(2).mean())
            else:
                p, q = before.softmax(-1), output.softmax(-1)
                values.append((p * (p / q).log()).sum(-1).mean())
        return float(torch.stack(values).mean())

    expected = {}
    with torch.no_grad():
        base = measured()
        for group in of.groups:
            scores = []
            for u in range(group.size):
                before = {n: layer.weight.clone() for n, layer, _ in readers(of, group)}
                for _, layer, channels in readers(of, group):
                    layer.weight[:, channels[u]] = 0
                scores.append(measured() - base)
                for n, layer, _ in readers(of, group):
                    layer.weight.copy_(before[n])
            expected[group.name] = torch.tensor(scores, dtype=torch.float64)
    check(group_scores(criteria.MaskedEvaluation(metric), of), expected, 1e-8)


def test_greedy_masked_evaluation_measures_again_after_each_round() -> None:
    of = subject("vit")
    of = Subject(**{**vars(of), "groups": of.groups[:1], "batches": of.batches[:1]})
    total = sum(group.size for group in of.groups)
    single = group_scores(criteria.MaskedEvaluation("mse"), of)
    greedy = group_scores(criteria.MaskedEvaluation("mse", rounds=total), of)
    first = min((float(s), name, u) for name, scores in single.items() for u, s in enumerate(scores))
    values = sorted((float(s), name, u) for name, scores in greedy.items() for u, s in enumerate(scores))
    assert values[0] == pytest.approx(first)
    assert values[-1][0] > max(float(s.max()) for s in single.values()), "all gone costs more than any one"
