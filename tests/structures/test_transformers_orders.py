"""Attentions whose fused projection has another order, blocks that hold more than their projections, wrapped layers.

The truth is masking in float64: the output projection reads zero of a head, the second projection of a channel.
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

import obc  # noqa: E402
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned  # noqa: E402

LANGUAGE: dict[str, Any] = {"vocab_size": 37, "n_embd": 32, "n_layer": 2, "n_positions": 40}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 4,
}


def initialised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return model.double().eval()


def language(name: str, **config: Any) -> nn.Module:
    made = getattr(transformers, f"{name}Config")(**LANGUAGE, **config)
    return initialised(transformers.AutoModelForCausalLM.from_config(made))


def segformer() -> nn.Module:
    sizes = {"hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1]}
    sizes |= {"num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return initialised(
        transformers.SegformerForImageClassification(transformers.SegformerConfig(**sizes, num_labels=4))
    )


def beit(**config: Any) -> nn.Module:
    return initialised(transformers.BeitForImageClassification(transformers.BeitConfig(**VISION, **config)))


def masked(name: str, **config: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 37, "max_position_embeddings": 32}
    made = getattr(transformers, f"{name}Config")(**sizes | config)
    return initialised(transformers.AutoModelForMaskedLM.from_config(made))


def funnel() -> nn.Module:
    sizes = {"vocab_size": 37, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}
    return initialised(transformers.FunnelForMaskedLM(transformers.FunnelConfig(block_sizes=[1, 1], **sizes)))


def deberta(**config: Any) -> nn.Module:
    return masked("DebertaV2", relative_attention=True, **config)


@dataclass
class Case:
    """A model, its inputs, and where units of one kind are read: the consumer and its channels per unit."""

    build: Callable[[], nn.Module]
    kind: str
    reader: str
    width: int
    units: tuple[int, ...] = (1,)
    size: int = 16

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.size == 0:
            return {"input_ids": torch.randint(0, 37, (2, 9), generator=generator)}
        return {"pixel_values": torch.randn(2, 3, self.size, self.size, dtype=torch.float64, generator=generator)}


def codegen(heads: int) -> nn.Module:
    return language("CodeGen", n_ctx=40, n_head=heads, rotary_dim=4)


# transformers 5.17 divides by a constant number of blocks.
COUNTS_BLOCKS = hasattr(codegen(4).transformer.h[0].attn, "mp_num")

CASES = {
    **(
        {"codegen, a head a block": Case(lambda: codegen(4), "heads", "attn.out_proj", 8, (1, 2), 0)}
        if COUNTS_BLOCKS
        else {}
    ),
    "codegen, heads in blocks": Case(lambda: codegen(8), "heads", "attn.out_proj", 4, (1,), 0),
    "gpt-bigcode, by head": Case(
        lambda: language("GPTBigCode", n_head=4, multi_query=False), "heads", "attn.c_proj", 8, (0, 2), 0
    ),
    "gpt-bigcode, one key": Case(
        lambda: language("GPTBigCode", n_head=4, multi_query=True), "query_heads", "attn.c_proj", 8, (1,), 0
    ),
    "segformer": Case(segformer, "ffn", "mlp.fc2", 1, (0, 3, 7), 32),
    "beit, tables of layers": Case(
        lambda: beit(use_relative_position_bias=True), "heads", "attention.o_proj", 4, (1, 3)
    ),
    "deberta, both positions": Case(
        lambda: deberta(pos_att_type=["p2c", "c2p"]), "heads", "attention.output.dense", 8, (0, 2), 0
    ),
    "deberta, keys' positions": Case(
        lambda: deberta(pos_att_type=["c2p"]), "heads", "attention.output.dense", 8, (1,), 0
    ),
    "deberta, one projection": Case(
        lambda: deberta(pos_att_type=["p2c", "c2p"], share_att_key=True), "heads", "attention.output.dense", 8, (1,), 0
    ),
    "deberta, first version": Case(
        lambda: masked("Deberta", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "heads",
        "attention.output.dense",
        8,
        (0, 2),
        0,
    ),
    "albert": Case(lambda: masked("Albert", embedding_size=8), "heads", "attention.dense", 8, (0, 2), 0),
    "funnel": Case(funnel, "heads", "attention.post_proj", 8, (0, 2), 0),
    "beit, no table": Case(beit, "heads", "attention.o_proj", 4, (0,)),
}


def columns(case: Case, size: int) -> list[int]:
    """Channels of the reader: in CodeGen's blocks of several heads a unit is one head of each of four."""
    if case.kind == "heads" and size * case.width < 32 and case.size == 0:
        return [
            block * size * case.width + unit * case.width + i
            for block in range(4)
            for unit in case.units
            for i in range(case.width)
        ]
    return [unit * case.width + i for unit in case.units for i in range(case.width)]


@pytest.mark.parametrize("name", CASES)
def test_a_unit_is_what_its_reader_reads(name: str) -> None:
    case = CASES[name]
    model = case.build()
    masked = copy.deepcopy(model)
    structure = TransformersStructure(model)
    groups = [group for group in structure.groups if group.kind == case.kind]
    assert groups
    for group in groups:
        block = group.name.split(f".{case.reader.split('.')[0]}.")[0]
        reader: Any = masked.get_submodule(f"{block}.{case.reader}")
        reader.weight.data[:, columns(case, group.size)] = 0
    structure.remove({group.name: torch.tensor(case.units) for group in groups})
    inputs = case.inputs()
    torch.testing.assert_close(model(**inputs).logits, masked(**inputs).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*[*CASES][:1], "segformer", "beit, tables of layers", "deberta, both positions"])
def test_they_are_saved_and_loaded(name: str, tmp_path: Any) -> None:
    case = CASES[name]
    model = case.build()
    structure = TransformersStructure(model)
    structure.remove({group.name: torch.tensor([1]) for group in structure.groups if group.size > 1})
    save_pruned(model, structure.plan, tmp_path)
    loaded = load_pruned(tmp_path).double()
    inputs = case.inputs()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(("heads", "size"), [(4, 0), (8, 2), (16, 4)])
def test_a_constant_number_of_blocks_stays(heads: int, size: int) -> None:
    """As in transformers 5.17: every block keeps as many heads as the others, and no block is removed."""
    model: Any = codegen(heads)
    for block in model.transformer.h:
        vars(block.attn).pop("mp_num", None)
    structure = TransformersStructure(model)
    assert [group.size for group in structure.groups if group.kind == "heads"] == [size] * 2 * bool(size)
    reasons = [reason for name, reason in structure.left_out.items() if name.endswith(".attn")]
    assert reasons == ["its 4 heads are stored in 4 blocks"] * 2 * (not size)


def test_a_table_that_all_layers_share_keeps_their_heads() -> None:
    model = beit(use_shared_relative_position_bias=True)
    inputs = CASES["segformer"].inputs() | {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    structure = TransformersStructure(model, example_inputs=inputs)
    assert {group.kind for group in structure.groups} == {"ffn"}
    assert "does not run without" in structure.left_out["beit.layers.0.attention.q_proj"]


# --- wrapped layers -----------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A stand-in for adapters: the layer, and two small parallel ones."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).eval()


def own_adapters(layer: str) -> nn.Module:
    model = llama()
    for block in model.model.layers:
        part = block.mlp if hasattr(block.mlp, layer) else block.self_attn
        setattr(part, layer, LoRA(getattr(part, layer)))
    return model


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("layer", ["gate_proj", "up_proj", "down_proj", "q_proj", "v_proj", "o_proj"])
def test_blocks_with_a_wrapped_layer_are_left_out(layer: str) -> None:
    model = own_adapters(layer)
    batches = [torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]

    def loss(model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    report = obc.prune(model, None, batches, loss, macs=0.9, steps=1, progress=False).report
    assert report.error is not None
    assert torch.isfinite(loss(model, batches[0]))
    kept_whole = "mlp" if layer in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    assert not any(kept_whole in name for name in report.widths)
    assert report.widths


@pytest.mark.parametrize("layer", ["gate_proj", "down_proj", "v_proj"])
def test_adapters_of_peft_are_refused_with_what_to_do(layer: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: pip install peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=[layer])).eval()
    with pytest.raises(ValueError, match="merge_and_unload"):
        TransformersStructure(model)
    assert TransformersStructure(model.merge_and_unload()).groups


def test_a_wrapped_gate_is_seen_without_running_the_model() -> None:
    structure = TransformersStructure(own_adapters("gate_proj"))
    assert {group.kind for group in structure.groups} == {"heads"}
    assert "gate_proj.base_layer has 48 channels too" in structure.left_out["model.layers.0.mlp"]
