"""Shared by the tests of criteria: subjects of every kind, and what the published formulas are made of, in float64."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers_families as families
from torch import Tensor, nn

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from models import randomise, regression_losses  # noqa: E402
from prunable import RECIPES  # noqa: E402

import obc  # noqa: E402
from obc.criteria import Subject  # noqa: E402
from obc.model.groups import ChannelGroup, Slice  # noqa: E402
from obc.structures.traced import TorchPruningStructure  # noqa: E402

TRACED = {"chain": "chain", "flatten": "flatten", "grouped": "grouped", "resnet": "resnet", "traced-vit": "vit"}
TRANSFORMERS = {
    "llama": "Llama",
    "mixtral": "Mixtral",
    "qwen2-moe": "Qwen2Moe",
    "deepseek-v3": "DeepseekV3",
    "gpt-oss": "GptOss",
}
SIZES = families._SIZES | {"hidden_size": 16, "intermediate_size": 12, "initializer_range": 0.2}
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2-moe": {
        "moe_intermediate_size": 10,
        "shared_expert_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek-v3": {
        "moe_intermediate_size": 10,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    },
    "gpt-oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
MIXTURES = ("mixtral", "qwen2-moe", "deepseek-v3")
RIDGE = 1e-2
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def sample_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return regression_losses(logits(model, (x, target)), target)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return sample_losses(model, batch).mean()


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    return model(batch[0])


def logits(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = forward(model, batch)
    return getattr(output, "logits", output)


def image_transformer() -> nn.Module:
    import transformers

    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "initializer_range")}
    config = transformers.ViTConfig(
        **sizes, image_size=8, patch_size=4, num_hidden_layers=2, num_attention_heads=4, num_labels=5
    )
    return transformers.ViTForImageClassification(config)


def language_model(name: str) -> nn.Module:
    import transformers

    kind = TRANSFORMERS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | EXPERTS.get(name, {})))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@cache
def _built(name: str) -> tuple[nn.Module, tuple[ChannelGroup, ...], list[Tensor]]:
    """(model, groups, inputs); whoever changes the model copies it."""
    if name in TRACED:
        recipe = RECIPES[TRACED[name]]
        model = recipe.model()
        groups = TorchPruningStructure(
            model, recipe.inputs(2).requires_grad_(), ignored_layers=recipe.ignored, num_heads=recipe.heads
        ).groups
        return model, tuple(groups), [recipe.inputs(3, seed) for seed in range(4)]
    torch.manual_seed(0)
    model = randomise(image_transformer() if name == "vit" else language_model(name)).double().eval()
    if name in EXPERTS:
        model.set_experts_implementation("eager")  # type: ignore[operator]  # grouped products take no float64
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        found = [torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    else:
        found = [torch.randint(0, 31, (3, 7), generator=generator) for _ in range(3)]
    return model, tuple(obc.transformer_groups(model)), found


def make_subject(name: str, kinds: Sequence[str] | None = None) -> Subject:
    """A tiny model in float64 with its groups, of these kinds, and its batches."""
    model, groups, inputs = _built(name)
    model = copy.deepcopy(model)
    if kinds is not None:
        groups = tuple(obc.transformer_groups(model, kinds))
    batches: Any = [(x, torch.arange(float(len(x))) + n) for n, x in enumerate(inputs)]
    return Subject(model, groups, batches, loss, forward, "gate", "batch", torch.Generator().manual_seed(0))


def changed(subject: Subject, **fields: Any) -> Subject:
    """The same subject, these fields aside."""
    return Subject(**{**vars(subject), **fields})


class SeparateExperts(nn.Module):
    """The experts of a mixture as layers of their own, each of which computes every token; gates of zero drop most."""

    def __init__(self, fused: Any, samples: int) -> None:
        super().__init__()
        self.samples, self.act_fn = samples, getattr(fused, "act_fn", None)
        self.gate, self.up, self.down = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for e in range(len(fused.down_proj)):
            gate_up, down = fused.gate_up_proj.detach()[e], fused.down_proj.detach()[e]
            biases = [None, None, None]
            if fused.is_transposed:  # gpt-oss interleaves gates and up projections
                gate_up, down = gate_up.T, down.T
                bias = fused.gate_up_proj_bias.detach()[e]
                biases = [bias[::2], bias[1::2], fused.down_proj_bias.detach()[e]]
                gate, up = gate_up[::2], gate_up[1::2]
            else:
                gate, up = gate_up.chunk(2)
            for layers, weight, bias in zip((self.gate, self.up, self.down), (gate, up, down), biases, strict=True):
                layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, dtype=weight.dtype)
                layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
                layers.append(layer)

    def inner(self, e: int, x: Tensor) -> Tensor:
        gate, up = self.gate[e](x), self.up[e](x)
        if self.act_fn is not None:
            return self.act_fn(gate) * up
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        x, total = hidden.unflatten(0, (self.samples, -1)), torch.zeros_like(hidden)
        for e, down in enumerate(self.down):
            gates = (weights * (indices == e)).sum(1, keepdim=True)
            total = total + gates * down(self.inner(e, x)).flatten(0, 1)
        return total


def separated(subject: Subject) -> Subject:
    """The same on a copy of the model in which every expert is a module of its own."""
    model = copy.deepcopy(subject.model)
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "down_proj", None), nn.Parameter):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, SeparateExperts(module, len(subject.batches[0][0])))
    return changed(subject, model=model)


def expert_name(name: str) -> str:
    """A separate expert's layer, as the statistics of fused ones name it."""
    return re.sub(r"\.down\.(\d+)$", r"[\1]", name)


def readers(subject: Subject, group: ChannelGroup) -> list[tuple[str, Any, Tensor]]:
    """(name, layer, channels) of the consumers that are layers, and of every expert's down projection."""
    modules = dict(subject.model.named_modules())
    found: list[tuple[str, Any, Tensor]] = []
    for part in group.consumers:
        module: Any = modules.get(part.module)
        if part.side == "in" and hasattr(module, "weight"):
            found.append((part.module, module, part.channels))
        elif part.side == "in" and isinstance(module, SeparateExperts):
            found += [(f"{part.module}[{e}]", layer, part.channels) for e, layer in enumerate(module.down)]
        elif part.side == "in" and isinstance(getattr(module, "down_proj", None), nn.Parameter):
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
                    x = SeparateExperts(m, 1).inner(expert, hidden[(indices == expert).any(1)])
                    seen.setdefault(f"{name}[{expert}]", []).append(x.detach()[:, None])

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


def gram(
    subject: Subject,
    layer_name: str,
    layer: Any,
    seen: dict[str, list[Tensor]],
    centred: bool = False,
    share: bool = True,
) -> Tensor:
    """The second moment; for an expert, with ``share``, times its share of the tokens routed in its mixture."""
    x = torch.cat([batch.flatten(0, 1) for batch in seen[layer_name]])
    x = x - x.mean(0) if centred else x
    mixture = layer_name.partition("[")[0]
    together = [batch for name, inputs in seen.items() if name.partition("[")[0] == mixture for batch in inputs]
    total = x.mT @ x / sum(map(len, together) if share and "[" in layer_name else [len(x)])
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


def block_pairs(model: nn.Module, blocks: Sequence[str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Block -> (input, output) of its calls, filled while the model runs."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {block: [] for block in blocks}
    for block in blocks:
        model.get_submodule(block).register_forward_hook(
            lambda m, args, y, block=block: pairs[block].append(
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


Take = Callable[[Tensor, int], Tensor]


def entries(subject: Subject, part: Slice, experts: bool = True) -> tuple[str, Take] | None:
    """The weight that loses entries with one slice of a layer, and what takes a unit's out of a tensor like it.

    Of experts a unit takes its rows of all gate and up projections, and its column of all down projections.
    """
    layer: Any = dict(subject.model.named_modules()).get(part.module)
    if experts and layer is None and part.module.endswith("experts.gate_up_proj"):
        return part.module, lambda t, u: torch.cat([one[part.channels[u]].flatten() for one in t])
    if experts and part.side == "in" and isinstance(getattr(layer, "down_proj", None), nn.Parameter):
        return f"{part.module}.down_proj", lambda t, u: torch.cat(
            [t[e][:, int(part.channels[u])] for e in range(len(t))]
        )
    if not isinstance(layer, LAYERS):
        return None
    groups, transposed = getattr(layer, "groups", 1), isinstance(layer, nn.ConvTranspose2d)  # the latter in one group

    def take(t: Tensor, u: int) -> Tensor:
        channels = part.channels[u].tolist()
        if (part.side == "out") != transposed:
            return t[channels].flatten()
        if groups == 1:
            return t[:, channels].flatten()
        width, rows = t.shape[1], len(t) // groups
        picked = [t[c // width * rows : (c // width + 1) * rows, c % width].flatten() for c in channels]
        return torch.cat(picked)

    return f"{part.module}.weight", take


def read_entries(subject: Subject, part: Slice) -> list[tuple[str, Take]]:
    """Of everything whose rows are read, biases, norms, routers and experts too, as :func:`entries` has it.

    An expert's output is linear in its down projection, and its router's logit in a row of the router.
    """
    layer: Any = dict(subject.model.named_modules()).get(part.module)
    if layer is None:
        return []
    if isinstance(getattr(layer, "down_proj", None), nn.Parameter):
        dims = (0,) if part.side == "out" else (2,)
        return [(f"{part.module}.down_proj", lambda t, u: t.index_select(dims[0], part.channels[u]).flatten())]
    found = entries(subject, part, experts=False)
    own = ["weight", "bias"] if found is None else ["bias"] if part.side == "out" else []
    parameters = dict(layer.named_parameters(recurse=False))
    plain = [(f"{part.module}.{key}", lambda t, u: t[part.channels[u]].flatten()) for key in own if key in parameters]
    return [*([] if found is None else [found]), *plain]


def weighted(subject: Subject, group: ChannelGroup) -> list[tuple[Slice, str, Take]]:
    """(slice, parameter, what takes a unit's entries) of the group's slices of layers with two sides."""
    modules = dict(subject.model.named_modules())
    for name in {part.module.removesuffix(".gate_up_proj") for part in group.slices}:
        if isinstance(separate := modules.get(name), SeparateExperts):
            return of_separate(name, separate, group)
    if group.kind == "experts":  # test_whole_experts.py has them as layers of their own
        router = [(part, f"{part.module}.weight") for part in group.slices[:-1] if part.module in modules]
        tensors = [(group.slices[-1], f"{group.name}.{key}") for key in ("gate_up_proj", "down_proj")]
        return [(part, key, lambda t, u: t[u].flatten()) for part, key in (*router, *tensors)]
    parts = [(part, entries(subject, part)) for part in group.slices]
    return [(part, *found) for part, found in parts if found is not None]


def of_separate(name: str, separate: SeparateExperts, group: ChannelGroup) -> list[tuple[Slice, str, Take]]:
    """Inner channel u of every expert: a row of its gate and of its up projection, and a column of its down one."""
    found: list[tuple[Slice, str, Take]] = []
    for e in range(len(separate.down)):
        found += [(group.slices[0], f"{name}.{key}.{e}.weight", lambda t, u: t[u]) for key in ("gate", "up")]
        found.append((group.slices[-1], f"{name}.down.{e}.weight", lambda t, u: t[:, u]))
    return found


def values_of(subject: Subject) -> dict[str, Tensor]:
    return {key: parameter.detach() for key, parameter in subject.model.named_parameters()}


def products(subject: Subject, functional: Callable[..., Tensor] = loss) -> list[dict[str, Tensor]]:
    """Parameter -> w * dL_n/dw, batch by batch."""
    weights = values_of(subject)
    return [{key: weights[key] * g for key, g in row.items()} for row in gradients(subject, functional)]


def sums(subject: Subject, tensors: Mapping[str, Tensor], part: Slice) -> Tensor | None:
    """(units,) what of the tensors goes with each unit of a slice whose rows are read, added up."""
    taken = read_entries(subject, part)
    if not taken:
        return None
    units = range(len(part.channels))
    return torch.stack([torch.stack([take(tensors[key], u).sum() for key, take in taken]).sum() for u in units])


def part_rows(subject: Subject, rows: Sequence[Mapping[str, Tensor]], parts: Sequence[Slice]) -> list[Tensor]:
    """(N, units) w . dL_n/dw of every slice that has rows; ``rows`` are :func:`products`."""
    found = [[sums(subject, row, part) for row in rows] for part in parts]
    return [torch.stack(values) for values in found if values[0] is not None]  # type: ignore[arg-type]


def unit_rows(subject: Subject, everything: bool, functional: Callable[..., Tensor] = loss) -> dict[str, Tensor]:
    """(N, units) per group: the sum over all slices, or the consumers alone, of w . dL_n/dw."""
    rows = products(subject, functional)
    found = {
        group.name: part_rows(subject, rows, group.slices if everything else group.consumers)
        for group in subject.groups
    }
    return {name: torch.stack(parts).sum(0) for name, parts in found.items() if parts}
