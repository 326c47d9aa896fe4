"""Slicing transformers models against the original with the removed units masked out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import Case
from torch import Tensor, nn
from transformers_families import FAMILIES, deepseek_v2, deepseek_v3, double, every_other, language_model, output

from obc.integrations.transformers import TransformersStructure, load_pruned, save_pruned
from obc.model.groups import ChannelGroup
from obc.structures.masking import masked_copy

# float64 sums of other lengths: the order of additions differs.
TOLERANCE = 1e-10


def mask(model: nn.Module, group: ChannelGroup, units: Tensor) -> None:
    """Take the units' contributions out of ``model``: columns that read them become zero, experts are never chosen."""
    if group.kind == "experts":
        router = next(part.module for part in group.slices if part.side == "out")
        mask_experts(model.get_submodule(router), units)
        return
    for part in group.consumers:
        channels = part.channels[units].flatten()
        module = model.get_submodule(part.module)
        if group.kind == "expert_ffn":
            module.down_proj.data.index_fill_(2, channels, 0.0)
            continue
        dim = 0 if type(module).__name__ == "Conv1D" else 1
        module.weight.data.index_fill_(dim, channels, 0.0)


def mask_experts(router: Any, removed: Tensor) -> None:
    """Routing as the library defines it, with minus infinity for the logits of the removed experts."""

    kept = [expert for expert in range(len(router.weight)) if expert not in removed]
    deepseek = type(router).__name__.startswith("Deepseek")

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = hidden_states.reshape(-1, self.hidden_dim), self.weight[kept]
        if deepseek:  # in float32, where products of other sizes round otherwise: only those of the kept experts
            hidden, weight = hidden.float(), weight.float()
        logits = hidden.new_full((len(hidden), len(self.weight)), -torch.inf)
        logits[:, kept] = F.linear(hidden, weight)
        values, indices = logits.float().softmax(-1).topk(self.top_k, dim=-1)  # in float32, as the library does
        if deepseek:
            values = values * self.routed_scaling_factor
        elif getattr(self, "norm_topk_prob", True):
            values = values / values.sum(-1, keepdim=True)
        return logits, values, indices

    router.forward = MethodType(forward, router)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_original_without_the_contributions_of_what_went(family: str) -> None:
    case = FAMILIES[family]()
    model = double(case)
    masked = copy.deepcopy(model)
    original = copy.deepcopy(model.state_dict())
    structure = TransformersStructure(model)
    assert structure.groups
    assert not structure.left_out
    units = {g.name: every_other(g.size, structure.limits.min_units[g.name]) for g in structure.groups}
    for group in structure.groups:
        mask(masked, group, units[group.name])
    before = output(case, model)
    structure.remove(units)
    structure.plan.verify(original, model)
    after = output(case, model)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, output(case, masked), rtol=0, atol=TOLERANCE)


def test_experts_of_deepseek_v3_lose_channels() -> None:
    case = deepseek_v3(dense=1)
    model = double(case)
    masked = copy.deepcopy(model)
    structure = TransformersStructure(model, ["heads", "ffn", "expert_ffn"])
    kinds = [(group.kind, group.size) for group in structure.groups]
    assert kinds == [("heads", 4), ("ffn", 48), ("heads", 4), ("expert_ffn", 16), ("ffn", 16)]
    units = {group.name: every_other(group.size) for group in structure.groups}
    for group in structure.groups:
        mask(masked, group, units[group.name])
    structure.remove(units)
    torch.testing.assert_close(output(case, model), output(case, masked), rtol=0, atol=TOLERANCE)


def minimax_m2() -> Case:
    """MiniMax-M2 keeps the correction bias beside the router."""
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return language_model("MiniMaxM2", **sizes, **experts, num_attention_heads=4, num_key_value_heads=2)


def gpt_oss() -> Case:
    """gpt-oss: transposed weights, gates and up projections in turn, biases of experts and of the router."""
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2}
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2}
    return language_model("GptOss", **sizes, **experts, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("made", [lambda: deepseek_v3(dense=1), minimax_m2, gpt_oss], ids=["v3", "minimax", "gpt-oss"])
def test_whole_experts_go_with_their_biases(made: Callable[[], Case], tmp_path: Path) -> None:
    """A removed expert is never chosen: its logit and its correction bias are minus infinity in the masked model.

    Routers compute in float32; another expert would change outputs by about their own size.
    """
    case = made()
    model: Any = double(case)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name:
                tensor.copy_(torch.randn_like(tensor))  # so large that a logit of minus infinity is not enough
    before = dict(model.state_dict())
    structure = TransformersStructure(model, ["experts", "expert_ffn"])
    gone = {group.name: torch.tensor([0, 2]) for group in structure.groups}
    gone = {name: units[:1] if structure.blocks[name].group.size < 5 else units for name, units in gone.items()}
    assert "experts" in [group.kind for group in structure.groups]
    masked = masked_copy(model, structure.groups, gone)
    structure.remove(gone)
    structure.plan.verify(before, model)
    torch.testing.assert_close(output(case, model), output(case, masked), rtol=0, atol=1e-5)
    save_pruned(model, structure.plan, tmp_path)
    loaded: Any = load_pruned(tmp_path).double()
    loaded.set_experts_implementation("eager")
    torch.testing.assert_close(output(case, loaded), output(case, model), rtol=0, atol=1e-5)


def test_experts_stay_where_it_is_not_known_how_their_router_chooses() -> None:
    for groups, chosen, why in ((2, None, "how many of them, it does not say"), (3, 1, "don't divide 4 experts")):
        case = minimax_m2()
        block: Any = case.model.get_submodule("model.layers.0.mlp")
        block.num_group, block.topk_group = groups, chosen
        structure = TransformersStructure(case.model, kinds=("experts",))
        (reason,) = structure.left_out.values()
        assert reason.startswith(
            f"the router model.layers.0.mlp.gate first chooses among {groups} groups of experts (num_group), "
        )
        assert why in reason


_GROUPED = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2}


def grouped(version: int, **routing: Any) -> Case:
    """DeepSeek with 3 groups of 4 experts, of which a token is sent to 3 in 2 groups."""
    given = _GROUPED | routing
    if version == 2:
        return deepseek_v2(**given, topk_method="group_limited_greedy")
    return deepseek_v3(dense=1, **given)


@pytest.mark.parametrize("version", [2, 3])
def test_routers_that_choose_among_groups_lose_experts_of_every_group(version: int, tmp_path: Path) -> None:
    """A unit is the k-th expert of every group; the masked model never chooses those removed."""
    case = grouped(version)
    model: Any = double(case)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if "correction_bias" in name:
                tensor.copy_(torch.randn_like(tensor))
    structure = TransformersStructure(model, ["experts"])
    assert [group.size for group in structure.groups] == [4] * len(structure.groups)
    gone = {group.name: torch.tensor([1, 2]) for group in structure.groups}
    channels = structure.groups[-1].slices[-1].channels
    assert channels.tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    routers = [module for module in model.modules() if hasattr(module, "topk_group") and hasattr(module, "weight")]
    rows = [router.weight.detach().clone() for router in routers]
    masked = masked_copy(model, structure.groups, gone)
    structure.remove(gone)
    for router, before in zip(routers, rows, strict=True):
        assert torch.equal(router.weight, before[[0, 3, 4, 7, 8, 11]])
    assert (model.config.n_group, model.config.topk_group, model.config.num_experts_per_tok) == (3, 2, 3)
    assert model.config.n_routed_experts == 6
    torch.testing.assert_close(output(case, model), output(case, masked), rtol=0, atol=1e-5)
    save_pruned(model, structure.plan, tmp_path)
    loaded: Any = load_pruned(tmp_path).double()
    loaded.set_experts_implementation("eager")
    torch.testing.assert_close(output(case, loaded), output(case, model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "routing", "least"),
    [(2, {}, 2), (3, {}, 2), (2, {"num_experts_per_tok": 2}, 1), (3, {"topk_group": 1}, 3), (3, {"n_group": 1}, 3)],
)
def test_as_many_experts_stay_in_every_group_as_the_router_needs(
    version: int, routing: dict[str, Any], least: int
) -> None:
    structure = TransformersStructure(grouped(version, **routing).model, ["experts"])
    assert set(structure.limits.min_units.values()) == {least}


def kin() -> dict[str, tuple[Any, Any, set[str]]]:
    """Class, config and kinds of groups of models that nothing above was written for."""
    import transformers as t

    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "vocab_size": 31}
    bart |= {
        f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("ffn_dim", 48), ("attention_heads", 4))
    }
    latent = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    latent |= {"num_key_value_heads": 4}
    t5 = {"vocab_size": 31, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return {
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config(**sizes, head_dim=8), {"heads", "ffn"}),
        "starcoder2": (t.Starcoder2ForCausalLM, t.Starcoder2Config(**sizes), {"heads", "ffn"}),
        "glm": (t.GlmForCausalLM, t.GlmConfig(**sizes, head_dim=8), {"heads", "ffn"}),
        "gptj": (
            t.GPTJForCausalLM,
            t.GPTJConfig(vocab_size=31, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
            {"heads", "ffn"},
        ),
        "distilbert": (
            t.DistilBertForSequenceClassification,
            t.DistilBertConfig(vocab_size=31, dim=32, hidden_dim=48, n_layers=1, n_heads=4),
            {"heads", "ffn"},
        ),
        "bart": (t.BartForConditionalGeneration, t.BartConfig(**bart), {"heads", "ffn"}),
        "minicpm3": (t.MiniCPM3ForCausalLM, t.MiniCPM3Config(**sizes | latent), {"heads", "ffn"}),
        "t5": (t.T5ForConditionalGeneration, t.T5Config(**t5, decoder_start_token_id=0), {"heads", "ffn"}),
    }


@pytest.mark.parametrize("name", ["gemma2", "starcoder2", "glm", "gptj", "distilbert", "bart", "t5", "minicpm3"])
def test_their_kin_are_sliced_alike(name: str) -> None:
    """Blocks found in other models of the library are sliced exactly; those not understood are left alone."""
    model_class, config, kinds = kin()[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).double().eval()
    masked = copy.deepcopy(model)
    batch = {"input_ids": torch.arange(3, 19).reshape(2, 8)}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    structure = TransformersStructure(model)
    assert {group.kind for group in structure.groups} == kinds
    units = {group.name: every_other(group.size) for group in structure.groups}
    for group in structure.groups:
        mask(masked, group, units[group.name])
    structure.remove(units)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, masked(**batch).logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mamba", "mixtral", "phi3"])
def test_steps_compose(family: str) -> None:
    """Two steps keep the same, in terms of the unpruned model, as one step that removes the same."""
    case = FAMILIES[family]()
    twice, once = double(case), double(case)
    original = copy.deepcopy(twice.state_dict())
    structure, direct = TransformersStructure(twice), TransformersStructure(once)
    wide = [group.name for group in structure.groups if group.size >= 4 and structure.limits.min_units[group.name] == 1]
    assert wide
    structure.remove({name: torch.tensor([0]) for name in wide})
    structure.remove({name: torch.tensor([1]) for name in wide})
    direct.remove({name: torch.tensor([0, 2]) for name in wide})
    structure.plan.verify(original, twice)
    torch.testing.assert_close(output(case, twice), output(case, once), rtol=0, atol=0)
    for one, other in zip(structure.groups, direct.groups, strict=True):
        assert all(torch.equal(a.channels, b.channels) for a, b in zip(one.slices, other.slices, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_query_heads_inside_their_groups(family: str) -> None:
    case = FAMILIES[family]()
    model = double(case)
    masked = copy.deepcopy(model)
    structure = TransformersStructure(model, kinds=("query_heads",))
    assert [group.size for group in structure.groups] == [2, 2]
    units = {group.name: torch.tensor([index]) for index, group in enumerate(structure.groups)}
    for group in structure.groups:
        mask(masked, group, units[group.name])
    structure.remove(units)
    torch.testing.assert_close(output(case, model), output(case, masked), rtol=0, atol=TOLERANCE)
    assert model.config.num_attention_heads == 2
    assert model.config.num_key_value_heads == 2


def test_heads_then_query_heads() -> None:
    case = FAMILIES["llama"]()
    model = double(case)
    masked = copy.deepcopy(model)
    for kinds in (("heads",), ("query_heads",)):
        structure = TransformersStructure(model, kinds=kinds)
        structure.remove({group.name: torch.tensor([1]) for group in structure.groups})
    for layer in masked.model.layers:  # heads 0 and 1 share keys and values, and of these head 0 stays
        layer.self_attn.o_proj.weight.data[:, 8:] = 0
    torch.testing.assert_close(output(case, model), output(case, masked), rtol=0, atol=TOLERANCE)


def test_embedding_width_is_the_model_of_fewer_features() -> None:
    """Norms are over what remains, so that the oracle is a model built with the smaller width from sliced weights."""
    case = FAMILIES["llama"]()
    model = double(case)
    structure = TransformersStructure(model, kinds=("embedding",))
    (group,) = structure.groups
    removed = torch.arange(0, 32, 4)
    kept = torch.tensor([channel for channel in range(32) if channel not in removed])
    config = copy.deepcopy(model.config)
    config.hidden_size, config.head_dim = 24, 8
    expected = type(model)(config).double().eval()
    reads = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor[:, kept] if any(layer in name for layer in reads) else tensor[kept]
    expected.load_state_dict(state)
    original = copy.deepcopy(model.state_dict())
    structure.remove({group.name: removed})
    structure.plan.verify(original, model)
    torch.testing.assert_close(output(case, model), output(case, expected), rtol=0, atol=TOLERANCE)
    assert model.config.hidden_size == 24


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert", "vit", "opt", "deepseek-v3"])
def test_embedding_width_runs_and_verifies(family: str) -> None:
    case = FAMILIES[family]()
    model = double(case)
    original = copy.deepcopy(model.state_dict())
    structure = TransformersStructure(model, kinds=("embedding",))
    (group,) = structure.groups
    total = structure.costs("parameters").total
    structure.remove({group.name: torch.tensor([1, 5])})
    structure.plan.verify(original, model)
    assert output(case, model).isfinite().all()
    assert sum(parameter.numel() for parameter in model.parameters()) == total(torch.tensor([group.size - 2]))


def test_tied_parameters_stay_tied() -> None:
    model = FAMILIES["llama-tied"]().model
    structure = TransformersStructure(model, kinds=("embedding",))
    structure.remove({structure.groups[0].name: torch.tensor([3])})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (31, 15)


def test_frozen_parameters_stay_frozen_and_modes_stay() -> None:
    model = FAMILIES["llama"]().model.train()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    structure = TransformersStructure(model)
    structure.remove({group.name: torch.tensor([0]) for group in structure.groups})
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == frozen
    assert all(module.training for module in model.modules())


def test_modules_count_what_they_have() -> None:
    model = FAMILIES["bert"]().model
    structure = TransformersStructure(model)
    structure.remove({group.name: torch.tensor([0]) for group in structure.groups})
    attention = model.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (3, 24, 8)
    assert (attention.query.out_features, attention.query.in_features) == (24, 32)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 47


def test_routers_keep_as_many_experts_as_they_choose() -> None:
    structure = TransformersStructure(FAMILIES["mixtral"]().model)
    group = next(group for group in structure.groups if group.kind == "experts")
    with pytest.raises(ValueError, match=r"3 of the 4 units of .* 2 must stay"):
        structure.remove({group.name: torch.tensor([0, 1, 2])})
    assert group.size == 4


def test_errors_name_what_was_wrong() -> None:
    structure = TransformersStructure(FAMILIES["llama"]().model)
    name = structure.groups[0].name
    with pytest.raises(KeyError, match="no group is named 'mlp'"):
        structure.remove({"mlp": torch.tensor([0])})
    with pytest.raises(IndexError, match="units 0 to 1, got 2 to 2"):
        structure.remove({name: torch.tensor([2])})
    with pytest.raises(ValueError, match="2 of the 2 units"):
        structure.remove({name: torch.tensor([0, 1])})
    with pytest.raises(ValueError, match=r"kinds are .*got 'neurons'"):
        TransformersStructure(structure.model, kinds=("neurons",))
    with pytest.raises(ValueError, match="by one kind, then by the other"):
        TransformersStructure(structure.model, kinds=("heads", "query_heads"))
    with pytest.raises(ValueError, match="no layer"):
        TransformersStructure(structure.model, ignored_layers=("model.layers.9",))
    assert len(structure.plan) == 0


def test_a_wrong_unit_leaves_everything_as_it_was() -> None:
    model = FAMILIES["llama"]().model
    structure = TransformersStructure(model)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    first, second, *_ = (group.name for group in structure.groups)
    with pytest.raises(IndexError):
        structure.remove({first: torch.tensor([0]), second: torch.tensor([48])})
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


def test_ignored_layers_are_left_alone() -> None:
    model = FAMILIES["llama"]().model
    structure = TransformersStructure(model, ignored_layers=("model.layers.0", model.model.layers[1].mlp))
    assert [group.name for group in structure.groups] == ["model.layers.1.self_attn.q_proj"]


def test_a_try_finds_models_that_do_not_run_pruned() -> None:
    class Stubborn(nn.Module):
        """Knows its width by heart."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).reshape(-1, 6))

    model = Stubborn()
    stubborn = TransformersStructure(model, example_inputs=torch.randn(2, 4))
    assert not stubborn.groups
    assert "does not run without 3 of the 6 units" in stubborn.left_out["fc1"]
    assert model.fc1.out_features == 6
    llama = models.llama()
    structure = TransformersStructure(llama.model, example_inputs={"input_ids": llama.batches[0]})
    assert structure.groups[1].size == 48
    assert not structure.left_out
    assert structure.proof is not None
    assert structure.proof.proved == [group.name for group in structure.groups]
    assert len(structure.plan) == 0


def test_what_is_not_understood_is_named() -> None:
    case = language_model("Bloom", vocab_size=31, hidden_size=32, n_layer=1, n_head=4)
    structure = TransformersStructure(case.model)
    assert [group.kind for group in structure.groups] == ["ffn"]
    (reason,) = structure.left_out.values()
    assert "a slope of its own (ALiBi)" in reason
