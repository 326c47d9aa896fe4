"""Shared by the tests of criteria: subjects of every kind, and what the published formulas are made of, in float64."""

from __future__ import annotations

import copy
import itertools
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
from obc.criteria import Subject  # noqa: E402
from obc.model.groups import ChannelGroup  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402

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


def make_subject(name: str) -> Subject:
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


def changed(subject: Subject, **fields: Any) -> Subject:
    """The same subject, these fields aside."""
    return Subject(**{**vars(subject), **fields})


def readers(subject: Subject, group: ChannelGroup) -> list[tuple[str, Any, Tensor]]:
    """(name, layer, channels) of the consumers that are layers, and of every expert's down projection."""
    modules = dict(subject.model.named_modules())
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


def inputs(subject: Subject) -> dict[str, list[Tensor]]:
    """Layer -> its inputs (samples, positions, channels), batch by batch."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in subject.model.named_modules():
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
        for batch in subject.batches:
            forward(subject.model, batch)
    for handle in handles:
        handle.remove()
    return seen


def check(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-6) -> None:
    assert set(got) == set(expected)
    assert expected
    for name, values in expected.items():
        torch.testing.assert_close(got[name].double(), values, rtol=rtol, atol=rtol * float(values.abs().max()))


def by_units(subject: Subject, value: Callable[[str, Any, list[int]], Tensor | float]) -> dict[str, Tensor]:
    """The sum over consumers of value(name, layer, the unit's channels)."""
    found = {}
    for group in subject.groups:
        layers = readers(subject, group)
        if layers:
            units = [
                sum(torch.as_tensor(value(name, layer, channels[u].tolist())) for name, layer, channels in layers)
                for u in range(group.size)
            ]
            found[group.name] = torch.stack(units).double()  # type: ignore[arg-type]
    return found


def gram(subject: Subject, layer_name: str, layer: Any, seen: dict[str, list[Tensor]], centred: bool = False) -> Tensor:
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


def gradients(subject: Subject, functional: Callable[..., Tensor] = loss) -> list[dict[str, Tensor]]:
    names, parameters = zip(*subject.model.named_parameters(), strict=True)
    found = []
    for batch in subject.batches:
        grads = torch.autograd.grad(functional(subject.model, batch), parameters, materialize_grads=True)
        found.append(dict(zip(names, grads, strict=True)))
    return found


def slices_of(subject: Subject, group: ChannelGroup) -> list[tuple[str, Callable[[Tensor, int], Tensor]]]:
    """(parameter, what takes a unit's entries out of a tensor like it) of every slice of a layer with two sides."""
    found = []
    modules = dict(subject.model.named_modules())
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


def unit_rows(subject: Subject, everything: bool, functional: Callable[..., Tensor] = loss) -> dict[str, Tensor]:
    """(N, units) per group: the sum over all slices, or the consumers alone, of w . dL_n/dw with biases and norms."""
    rows = gradients(subject, functional)
    parameters = {key: p.detach() for key, p in subject.model.named_parameters()}
    modules = dict(subject.model.named_modules())
    found = {}
    for group in subject.groups:
        total = torch.zeros(len(rows), group.size, dtype=torch.float64)
        for part in group.slices if everything else group.consumers:
            layer: Any = modules.get(part.module)
            if layer is None:
                continue
            if isinstance(layer, LAYERS):
                ((key, take),) = slices_of(subject, ChannelGroup(group.name, (part,)))
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
