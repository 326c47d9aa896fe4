"""Heads of attentions that have more than projections, or fuse them: orders, sinks, gates, norms over all heads.

The truth is masking in float64, by hand: the output projection reads zero of a head; a norm over all heads is computed
from the heads that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "use_cache": False,
}
SHARED = SIZES | {"num_key_value_heads": 2}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 2,
}


@dataclass(frozen=True)
class Case:
    """A model and its heads.

    Attributes:
        name: of its classes.
        config: of the model.
        output: the end of the names of output projections.
        width: channels of the output projection's input that a unit has.
        kind: of the groups.
        stretches: number of parts of the output projection's input; a unit has ``width`` channels in each.
    """

    name: str
    config: dict[str, Any]
    output: str
    width: int = 8
    kind: str = "heads"
    stretches: int = 1

    def build(self) -> Any:
        return self.of(getattr(transformers, f"{self.name}Config")(**self.config))

    def of(self, config: Any) -> Any:
        names = {"CTRL": "CTRLLMHeadModel", "ModernBert": "ModernBertForMaskedLM"}
        model = getattr(transformers, names.get(self.name, f"{self.name}ForCausalLM"))(config)
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.2)
        model = model.double().eval()
        model.set_experts_implementation("eager")
        return model

    def channels(self, size: int, units: Tensor) -> Tensor:
        """The channels of the units in the output projection's input."""
        all_channels = torch.arange(self.stretches * size * self.width).reshape(self.stretches, size, self.width)
        return all_channels[:, units].flatten()


MIXTURE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
FALCON = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"ffn_hidden_size": 48}
CASES = {
    "falcon, by head": Case("Falcon", FALCON | {"multi_query": False}, "self_attention.dense"),
    "falcon, one key": Case("Falcon", FALCON | {"multi_query": True}, "self_attention.dense", kind="query_heads"),
    "falcon, new": Case(
        "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "self_attention.dense", 16
    ),
    "falcon, new, one key": Case(
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1},
        "self_attention.dense",
        kind="query_heads",
    ),
    "gpt-neox": Case("GPTNeoX", SIZES, "attention.dense"),
    "gpt-neox-japanese": Case("GPTNeoXJapanese", SIZES | {"intermediate_multiple_size": 2}, "attention.dense"),
    "persimmon": Case("Persimmon", SIZES, "self_attn.dense"),
    "modernbert": Case("ModernBert", SIZES, "attn.Wo"),
    "modernbert-decoder": Case("ModernBertDecoder", SIZES, "attn.Wo"),
    "ctrl": Case("CTRL", {"vocab_size": 37, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4}, "attention.dense"),
    "gpt-oss, sinks": Case("GptOss", SHARED | {"head_dim": 8, "num_local_experts": 4}, "self_attn.o_proj", 16),
    "flint, sinks": Case("Flint", SHARED | {"head_dim": 8}, "self_attn.o_proj", 16),
    "afmoe, gates of channels": Case("Afmoe", SHARED | {"head_dim": 8, "num_dense_layers": 2}, "self_attn.o_proj", 16),
    "beam, gates with a bias a head": Case("Beam", SHARED | {"head_dim": 8}, "self_attn.o_proj", 16),
    "qwen3-next, gates among queries": Case(
        "Qwen3Next",
        SHARED | MIXTURE | {"head_dim": 8, "layer_types": ["full_attention"] * 2, "num_experts": 4},
        "self_attn.o_proj",
        16,
    ),
    "deepseek-v3.2, an indexer": Case(
        "DeepseekV32", LATENT | MIXTURE | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}, "o_proj", 5
    ),
}


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 37, (2, 9), generator=torch.Generator().manual_seed(0))}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("name", CASES)
def test_a_head_is_what_the_output_projection_reads(name: str, tmp_path: Any) -> None:
    case = CASES[name]
    model = case.build()
    masked = copy.deepcopy(model)
    structure = TransformersStructure(model)
    groups = {group.name: group for group in structure.groups if group.kind == case.kind}
    readers = [layer for layer_name, layer in masked.named_modules() if layer_name.endswith(case.output)]
    assert len(groups) == len(readers) > 0
    units = {name: torch.tensor([1, 2] if group.size == 4 else [1]) for name, group in groups.items()}
    for reader, (group_name, group) in zip(readers, groups.items(), strict=True):
        reader.weight.data[:, case.channels(group.size, units[group_name])] = 0
    structure.remove(units)
    expected = logits(masked)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)  # rotary angles are float32
    save_pruned(model, structure.plan, tmp_path)
    loaded: Any = load_pruned(tmp_path, type(model)).double()
    loaded.set_experts_implementation("eager")
    torch.testing.assert_close(logits(loaded), logits(model))


NORMED = {
    "olmo2": Case("Olmo2", SHARED, "o_proj", 16),
    "olmo3": Case("Olmo3", SHARED, "o_proj", 16),
    "olmoe": Case("Olmoe", SHARED | {"num_experts": 4, "num_experts_per_tok": 2}, "o_proj", 16),
    "flex-olmo": Case("FlexOlmo", SHARED | {"num_experts": 4, "num_experts_per_tok": 2}, "o_proj", 16),
    "minimax-m2": Case(
        "MiniMaxM2", SHARED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "o_proj", 16
    ),
    "bitnet": Case("BitNet", SHARED, "o_proj", 16),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_norm_over_all_heads_is_over_those_that_stay(name: str) -> None:
    case = NORMED[name]
    model = case.build()
    masked = copy.deepcopy(model)
    structure = TransformersStructure(model, kinds=("heads",))
    assert len(structure.groups) == 2
    for layer in masked.model.layers:
        layer.self_attn.o_proj.weight.data[:, :16] = 0
        for child, lost in (("q_norm", 16), ("k_norm", 8), ("attn_sub_norm", 16)):
            if (norm := getattr(layer.self_attn, child, None)) is not None:
                norm.forward = _over_the_rest(norm, lost)
    structure.remove({group.name: torch.tensor([0]) for group in structure.groups})
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-6, atol=1e-6)


def _over_the_rest(norm: nn.Module, lost: int) -> Callable[[Tensor], Tensor]:
    """A root mean square norm over all channels but the first ``lost``."""
    eps = vars(norm).get("variance_epsilon", vars(norm).get("eps"))
    weight: Any = norm.weight

    def normed(x: Tensor) -> Tensor:
        rest = x[..., lost:]
        rest = rest / (rest.square().mean(-1, keepdim=True) + eps).sqrt() * weight[lost:]
        return torch.cat([torch.zeros_like(x[..., :lost]), rest], -1)

    return normed


@pytest.mark.parametrize("name", ["Bloom", "Falcon", "Mpt"])
def test_heads_with_slopes_that_depend_on_their_number_stay(name: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 37, "n_layer": 1, "n_layers": 1, "num_hidden_layers": 1, "hidden_size": 32}
    sizes |= {"n_head": 4, "n_heads": 4, "num_attention_heads": 4, "d_model": 32, "alibi": True}
    config = getattr(transformers, f"{name}Config")(**sizes)
    structure = TransformersStructure(getattr(transformers, f"{name}ForCausalLM")(config))
    assert {group.kind for group in structure.groups} == {"ffn"}
    (reason,) = structure.left_out.values()
    assert reason == "each head has a slope of its own (ALiBi), which the model computes from the number of heads"


def test_a_config_that_differs_between_layers_is_no_error(tmp_path: Any) -> None:
    sizes = SHARED | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    sizes |= {"vocab_size_per_layer_input": 37, "hidden_size_per_layer_input": 8}
    model = Case("Gemma4", {}, "").of(transformers.Gemma4TextConfig(**sizes, per_layer_config={1: {"head_dim": 16}}))
    structure = TransformersStructure(model, example_inputs=inputs())
    assert [(group.kind, group.size) for group in structure.groups] == [("heads", 2), ("ffn", 48)] * 2
    structure.remove({group.name: torch.tensor([0]) for group in structure.groups if group.kind == "heads"})
    if structure.config_refused is None:  # where the installed version says widths layer by layer
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
        torch.testing.assert_close(logits(loaded), logits(model))


T5 = {"vocab_size": 37, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
RELATIVE = {
    # of the encoder, of the decoder, of its attention to the encoder
    "T5ForConditionalGeneration": (T5 | {"decoder_start_token_id": 0}, 3),
    "UMT5ForConditionalGeneration": (T5 | {"decoder_start_token_id": 0}, 5),
    "MPNetForMaskedLM": (SIZES, 1),
    "CpmAntForCausalLM": (SIZES | {"dim_head": 8, "dim_ff": 48}, 1),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_heads_with_biases_for_relative_positions_go_from_all_that_share_them(name: str) -> None:
    values, count = RELATIVE[name]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**values)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    masked, batch = copy.deepcopy(model), inputs()
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    structure = TransformersStructure(model, kinds=("heads",))
    assert [group.size for group in structure.groups] == [4] * count
    for group in structure.groups:
        for part in group.consumers:
            masked.get_submodule(part.module).weight.data[:, 8:24] = 0  # heads 1 and 2
    structure.remove({group.name: torch.tensor([1, 2]) for group in structure.groups})
    assert (structure.config_refused is None) == ("MPNet" not in name)  # whose head size follows from their number
    counts = [getattr(module, "n_heads", 2) for module in model.modules()]
    assert set(counts) <= {2, *(4,) * (name == "MPNetForMaskedLM")}  # its encoder counts heads, and does not use that
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, masked(**batch).logits)


@pytest.mark.parametrize(("name", "reason"), [("TrOCR", "the width of the residual stream"), ("BigBird", "is short")])
def test_heads_of_classes_that_run_with_all_of_them_only_stay(name: str, reason: str) -> None:
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    sizes |= {key: value for key, value in SIZES.items() if key in ("hidden_size", "num_attention_heads", "vocab_size")}
    config = getattr(transformers, f"{name}Config")(**sizes, num_hidden_layers=1)
    structure = TransformersStructure(getattr(transformers, f"{name}ForCausalLM")(config))
    assert {group.kind for group in structure.groups} == {"ffn"}
    assert structure.left_out
    assert all(reason in why for why in structure.left_out.values())


def test_blocks_whose_modules_share_their_parameters_are_one() -> None:
    model = Case("Llama", SHARED, "").build()
    first, second = model.model.layers
    for child in ("gate_proj", "up_proj", "down_proj"):
        getattr(second.mlp, child).weight = getattr(first.mlp, child).weight
    masked = copy.deepcopy(model)
    structure = TransformersStructure(model, kinds=("ffn",), example_inputs=inputs())
    assert structure.proof is not None
    assert structure.proof.proved == ["model.layers.0.mlp.gate_proj"]
    assert structure.costs("parameters").total() == sum(parameter.numel() for parameter in model.parameters())
    masked.model.layers[0].mlp.down_proj.weight.data[:, 7:20] = 0  # the other layer's too
    structure.remove({"model.layers.0.mlp.gate_proj": torch.arange(7, 20)})
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight
    assert second.mlp.up_proj.out_features == second.mlp.intermediate_size == 35
    torch.testing.assert_close(logits(model), logits(masked))
