"""Groups of transformers models: their slices, scores and costs."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import oracle
import pytest
import torch
from models import Case
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers_families import FAMILIES, FOUND, double, every_other

import obc
from obc.integrations.transformers import TransformersStructure
from obc.model.groups import ChannelGroup

# How the families call what holds all experts of a layer.
EXPERTS = "mlp.experts"


def layers(case: Case) -> int:
    return int(case.model.config.num_hidden_layers)


def test_every_family_has_an_expectation() -> None:
    assert set(FOUND) == set(FAMILIES)


NO_TRANSFORMERS = {
    "CNN": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "MLP": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    "one layer": lambda: nn.Linear(4, 2),
}


@pytest.mark.parametrize("kinds", [["ffn", "heads", "experts"], ["experts"], ["embedding"]], ids=str)
@pytest.mark.parametrize("network", NO_TRANSFORMERS)
def test_a_model_without_blocks_is_no_empty_list(network: str, kinds: list[str]) -> None:
    model = NO_TRANSFORMERS[network]()
    remedy = "has no block of the transformers library; for another model pass example_inputs to obc.prune"
    with pytest.raises(ValueError, match=f"{type(model).__name__} {remedy}"):
        obc.transformer_groups(model, kinds)


def test_pruning_by_a_structure_without_groups_says_what_to_do() -> None:
    model = NO_TRANSFORMERS["MLP"]()
    structure = TransformersStructure(model)
    said = "no layer can be pruned: TransformersStructure found no groups; without structure="
    with pytest.raises(ValueError, match=said):
        obc.prune(model, None, [torch.zeros(2, 4)], lambda model, batch: model(batch).sum(), structure=structure)


def test_a_transformer_may_lack_a_kind_and_the_error_has_reasons() -> None:
    model = FAMILIES["llama"]().model
    assert obc.transformer_groups(model, ["experts"]) == []
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.self_attn.q_proj)
        nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    with pytest.raises(ValueError, match=r"has no block of the transformers library; model\.layers\.0\..*parametriz"):
        obc.transformer_groups(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_every_family(family: str) -> None:
    case = FAMILIES[family]()
    groups = obc.transformer_groups(case.model)
    assert [(group.kind, group.size) for group in groups] == FOUND[family] * layers(case)
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        assert group.consumers
        for part in group.slices:
            assert part.channels.shape[0] == group.size
            assert part.channels.flatten().unique().numel() == part.channels.numel()


def test_kinds_are_chosen() -> None:
    model = FAMILIES["mixtral"]().model
    assert {group.kind for group in obc.transformer_groups(model, kinds=("heads",))} == {"heads"}
    assert {group.kind for group in obc.transformer_groups(model, kinds=("expert_ffn",))} == {"expert_ffn"}
    assert [group.kind for group in obc.transformer_groups(FAMILIES["bert"]().model, kinds=("embedding",))] == [
        "embedding"
    ]


def test_bare_models_have_groups_too() -> None:
    """Names of modules are relative to the model passed, and don't depend on its head."""
    model = FAMILIES["llama"]().model
    bare = [group.name for group in obc.transformer_groups(model.model)]
    assert [f"model.{name}" for name in bare] == [group.name for group in obc.transformer_groups(model)]


def test_importing_obc_imports_no_transformers() -> None:
    code = "import sys, obc; assert callable(obc.transformer_groups); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_norm_over_inner_channels_is_over_those_that_stay() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc2(self.norm(self.fc1(x).relu()))

    block, x = Block().double(), torch.randn(3, 4, dtype=torch.float64)
    nn.init.normal_(block.norm.weight)
    kept = torch.tensor([0, 2, 3])
    inner = block.fc1(x).relu()[:, kept]
    inner = (inner - inner.mean(1, keepdim=True)) / (inner.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = x + (inner * block.norm.weight[kept]) @ block.fc2.weight[:, kept].T + block.fc2.bias
    structure = TransformersStructure(block, example_inputs=x)
    assert structure.proof is not None
    assert structure.proof.proved == ["fc1"]
    structure.remove({"fc1": torch.tensor([1, 4, 5])})
    torch.testing.assert_close(block(x), expected)


def test_a_feed_forward_block_with_more_than_its_projections_is_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.scale = nn.Linear(4, 6), nn.Linear(6, 4), nn.Parameter(torch.ones(6))

    structure = TransformersStructure(Block())
    assert structure.groups == ()
    assert structure.left_out == {"": "scale of shape (6,) is not understood"}


def test_an_attention_with_more_than_its_projections_is_named() -> None:
    model = FAMILIES["llama"]().model
    model.model.layers[0].self_attn.offsets = nn.Parameter(torch.zeros(4))
    structure = TransformersStructure(model, kinds=("heads",))
    assert [group.name for group in structure.groups] == ["model.layers.1.self_attn.q_proj"]
    assert structure.left_out == {
        "model.layers.0.self_attn": "model.layers.0.self_attn.offsets of shape (4,) is not understood"
    }


def test_latent_attention_that_is_not_understood_is_named() -> None:
    model = FAMILIES["deepseek-v3"]().model
    first, second = (layer.self_attn for layer in model.model.layers)
    first.compressor = nn.Linear(10, 4)
    second.v_head_dim = 4
    structure = TransformersStructure(model, kinds=("heads",))
    assert structure.groups == ()
    assert structure.left_out == {
        "model.layers.0.self_attn": "model.layers.0.self_attn.compressor.weight of shape (4, 10) is not understood",
        "model.layers.1.self_attn": "its widths [40, 44, 20] are not 5 heads of [10, 10, 4] channels",
    }


def test_latent_attention_without_sizes_or_projections_is_named() -> None:
    model = FAMILIES["deepseek-v3"]().model
    first, second = (layer.self_attn for layer in model.model.layers)
    del first.v_head_dim
    second.q_b_proj = None
    assert TransformersStructure(model, kinds=("heads",)).left_out == {
        "model.layers.0.self_attn": "DeepseekV3Attention does not say qk_nope_head_dim, qk_rope_head_dim, v_head_dim",
        "model.layers.1.self_attn": "latent attention without query projection",
    }


def test_packed_weights_are_named() -> None:
    model = FAMILIES["llama"]().model
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(48 * 16, 1, dtype=torch.uint8), requires_grad=False)
    structure = TransformersStructure(model, kinds=("ffn",))
    assert [group.name for group in structure.groups] == ["model.layers.1.mlp.gate_proj"]
    assert structure.left_out == {
        "model.layers.0.mlp": "model.layers.0.mlp.up_proj is a Linear that stores its weight packed, as Parameter "
        "(768, 1) of torch.uint8, so that no channel can be taken out of it; make plain layers of all quantised ones "
        "with obc.dequantize(model), then prune; for the command line, model.save_pretrained(DIR) in Python after "
        "that, and prune DIR"
    }


# --- scores -------------------------------------------------------------------------------------------------------


def expert_rows(case: Case) -> oracle.Rows:
    """Rows of mixtures: whole experts and inner channels from the down projections, and routers."""
    model = copy.deepcopy(case.model).double()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in case.batches:
        model.zero_grad()
        case.loss(model, batch).backward()
        for name, module in model.named_modules():
            if name.endswith(EXPERTS):
                product = module.down_proj.detach() * module.down_proj.grad
                found.setdefault(name, []).append((product.sum((1, 2)), product.sum((0, 1))))
            elif type(module).__name__.endswith("Router"):
                product = module.weight.detach() * module.weight.grad
                found.setdefault(name, []).append((product.sum(1), product.sum(0)))
    return {
        name: (torch.stack([o for o, _ in pairs]), torch.stack([i for _, i in pairs])) for name, pairs in found.items()
    }


def part_rows(rows: oracle.Rows, group: ChannelGroup) -> dict[tuple[str, str], Tensor]:
    """(N, units) of every slice that the oracle has rows of, each unit's channels added up one by one."""
    found = {}
    for part in group.slices:
        if part.module in rows:
            out, in_ = rows[part.module]
            side = out if part.side == "out" else in_
            assert side is not None
            units = [sum(side[:, channel] for channel in unit) for unit in part.channels.tolist()]
            found[part.module, part.side] = torch.stack(units, dim=1)
    return found


def close(got: Tensor, expected: Tensor, scale: float) -> None:
    """Equal to four digits of the group's largest score: scores of queries before a norm are only rounding."""
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("family", FAMILIES)
def test_group_scores_are_sums_of_squares_of_float64_weight_gradients(family: str) -> None:
    case = FAMILIES[family]()
    case.model.set_experts_implementation("eager")  # grouped products take no float64
    groups = obc.transformer_groups(case.model)
    rows = oracle.rows(case.model, case.batches, case.loss) | expert_rows(case)
    scores = obc.score(case.model, case.batches, case.loss, keep_rows=True)
    every, gates = scores.group(groups), scores.group(groups, slices="gate")
    assert every.exact
    scored = 0
    for group in groups:
        parts = part_rows(rows, group)
        assert set(every.parts[group.name]) == set(parts)
        unread = {(part.module, part.side) for part in group.slices} - set(parts)
        assert set(every.unscored[group.name]) == unread
        if parts:
            total = torch.stack([values.square().sum(0) for values in parts.values()]).sum(0)
            scale = float(total.max())
            close(every[group.name], total, scale)
        for part, values in parts.items():
            close(every.parts[group.name][part], values.square().sum(0), scale)
        readers = [values for (module, side), values in parts.items() if side == "in" or EXPERTS in module]
        assert (group.name in gates) == bool(readers)
        if readers:
            scored += 1
            close(gates[group.name], torch.stack(readers).sum(0).square().sum(0), scale)
    assert scored


def test_experts_are_scored_per_sample_too() -> None:
    """No gate sees inside experts: samples go through the model one by one, with one row each."""
    case = FAMILIES["mixtral"]()
    case.model.set_experts_implementation("eager")
    name = "model.layers.0.mlp.experts"
    singles = [batch[index : index + 1] for batch in case.batches for index in range(len(batch))]
    expected = expert_rows(dataclasses.replace(case, batches=singles))[name]
    scores = obc.score(case.model, singles, case.losses, rows="sample")
    assert str(scores.coverage[name]).startswith("weight gradient")
    for got, rows in zip((scores[name].out_channels, scores[name].in_channels), expected, strict=True):
        total = rows.square().sum(0)
        close(got, total, float(total.max()))


def test_without_rows_a_unit_is_the_sum_of_its_channels() -> None:
    case = FAMILIES["llama"]()
    groups = obc.transformer_groups(case.model)
    with_rows = obc.score(case.model, case.batches, case.loss, keep_rows=True).group(groups)
    scores = obc.score(case.model, case.batches, case.loss)
    without = scores.group(groups)
    assert not without.exact
    heads, channels = groups[0], groups[1]
    torch.testing.assert_close(without[channels.name], with_rows[channels.name], rtol=1e-4, atol=0)
    expected = sum(
        (scores[p.module].out_channels if p.side == "out" else scores[p.module].in_channels)[p.channels].sum(1)
        for p in heads.slices
    )
    torch.testing.assert_close(without[heads.name], expected)
    assert not torch.allclose(without[heads.name], with_rows[heads.name], rtol=1e-2)
    gate = scores.group(groups, slices="gate")
    torch.testing.assert_close(gate[channels.name], scores["model.layers.0.mlp.down_proj"].in_channels)


def test_what_the_scorer_can_not_read_is_named() -> None:
    case = FAMILIES["mixtral"]()
    groups = obc.transformer_groups(case.model)
    scores = obc.score(case.model, case.batches, case.loss).group(groups)
    experts = next(group for group in groups if group.kind == "expert_ffn")
    assert scores.unscored[experts.name] == {(experts.name, "out"): "the scorer has no rule for it"}
    assert f"{experts.name} (out)  unscored: the scorer has no rule for it" in repr(scores)
    heads_alone = obc.score(case.model, case.batches, case.loss, modules=lambda name, _: "attn" in name).group(groups)
    with pytest.raises(KeyError, match=r"gate_up_proj \(out\): the scorer has no rule for it"):
        heads_alone[experts.name]
    mamba = FAMILIES["mamba"]()
    found = obc.score(mamba.model, mamba.batches, mamba.loss).group(obc.transformer_groups(mamba.model))
    assert {name.rpartition(".")[2] for reasons in found.unscored.values() for name, _ in reasons} == {"A_log", "D"}


def test_groups_of_another_width_are_refused() -> None:
    case = FAMILIES["llama"]()
    groups = obc.transformer_groups(case.model)
    scores = obc.score(case.model, case.batches, case.loss)
    structure = TransformersStructure(case.model)
    structure.remove({group.name: torch.tensor([0]) for group in structure.groups})
    pruned = obc.score(case.model, case.batches, case.loss)
    with pytest.raises(ValueError, match=r"has channel 31 of .*q_proj.* scores of 16"):
        pruned.group(groups)
    with pytest.raises(ValueError, match="slices must be 'gate' or 'all', got 'some'"):
        scores.group(groups, slices="some")
    with pytest.raises(ValueError, match="two groups are named"):
        scores.group([groups[0], groups[0]])
    with pytest.raises(KeyError, match="no such group"):
        scores.group(groups)["nowhere"]


# --- costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_exact_before_and_after(family: str) -> None:
    model = double(FAMILIES[family]())
    structure = TransformersStructure(model)
    parameters, macs = structure.costs("parameters"), structure.costs("macs")
    assert parameters.total() == sum(parameter.numel() for parameter in model.parameters())
    structure.remove({g.name: every_other(g.size, structure.limits.min_units[g.name]) for g in structure.groups})
    after = structure.costs("parameters")
    assert after.total() == sum(parameter.numel() for parameter in model.parameters())
    assert parameters.total(after.widths) == after.total()
    assert macs.total(after.widths) == structure.costs("macs").total() < macs.total()
    with pytest.raises(ValueError, match="unit must be one of 'macs', 'parameters', 'active_parameters', got 'flops'"):
        structure.costs("flops")


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "opt", "gpt2", "qwen3", "deepseek-v3"])
def test_macs_per_token_are_those_that_torch_counts(family: str) -> None:
    """Half the operations of every matrix product in a forward pass, attention's included, over its tokens.

    Angles of rotary embeddings, once a model, are not counted: some versions of transformers multiply matrices there.
    """
    case = FAMILIES[family]()
    case.model.set_attn_implementation("eager")
    structure = TransformersStructure(case.model, sequence_length=8)
    structure.remove({group.name: torch.tensor([0]) for group in structure.groups})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.model(input_ids=case.batches[0])
    angles = sum(
        sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    counted = (counter.get_total_flops() - angles) / 2 / case.batches[0].numel()
    assert structure.costs("macs").total() == counted


def test_macs_of_experts_are_those_a_token_is_routed_to() -> None:
    case = FAMILIES["mixtral"]()
    structure = TransformersStructure(case.model)
    by_kind = {
        group.kind: float(freed)
        for group, freed in zip(structure.groups, structure.costs("macs").marginal(), strict=True)
    }
    assert by_kind["experts"] == 32  # its row of the router
    assert by_kind["expert_ffn"] == 2 * 3 * 32  # two experts, three products
    copied = copy.deepcopy(case.model)
    assert TransformersStructure(copied).costs("macs").total() == structure.costs("macs").total()
