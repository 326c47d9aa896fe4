"""Adapters of PEFT: refused with the remedy while they are there, pruned like any model once they are merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import obc
from obc.structures.transformers import TransformersStructure

TOKENS = torch.arange(3, 19).view(2, 8)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **sizes)
    ).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)


MERGED: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rank-stabilised": lambda: lora(use_rslora=True),
    "modules to save": lambda: lora(modules_to_save=["lm_head"]),
    "a bias of its own": lambda: lora(lora_bias=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
}


def adapted(kind: str) -> Any:
    torch.manual_seed(1)
    base = llama()
    if kind == "a bias of its own":  # its adapter has one only where the layer has
        for layer in base.model.layers:
            for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
                module.bias = torch.nn.Parameter(torch.randn(module.out_features))
    model = peft.get_peft_model(base, MERGED[kind]()).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "ia3" in name:
            torch.nn.init.normal_(parameter.data, 1.0, 0.1)
    return model


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("kind", MERGED)
def test_adapters_are_refused_until_they_are_merged(kind: str) -> None:
    model = adapted(kind)
    expected = logits(model)
    assert not torch.allclose(expected, logits(llama()), atol=1e-3)
    for found in (model, model.base_model.model):
        with pytest.raises(obc.PlanError, match=r"adapters of PEFT .*merge_and_unload"):
            TransformersStructure(found)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    example = {"input_ids": TOKENS}
    structure = TransformersStructure(merged, example_inputs=example)  # tries every group on copies
    assert len(structure.groups) == 4
    assert not structure.left_out
    structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    assert logits(merged).shape == expected.shape


def test_adapters_merged_in_place_are_refused_too() -> None:
    """Their layers still wrap the model's, with adapters of the unpruned widths to unmerge."""
    model = adapted("lora")
    model.merge_adapter()
    with pytest.raises(obc.PlanError, match="merge_and_unload"):
        TransformersStructure(model)


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["prefix", "prompt"],
)
def test_learned_prompts_are_refused(config: Any) -> None:
    """A prefix holds keys and values of the unpruned heads."""
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(obc.PlanError, match=r"prompts of PEFT.*get_base_model"):
        TransformersStructure(model)
    assert TransformersStructure(model.get_base_model()).groups


def test_an_adapter_for_the_pruned_model_fits() -> None:
    model = llama()
    structure = TransformersStructure(model, uniform=True)
    structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    adapter = peft.get_peft_model(model, lora())
    assert adapter(TOKENS).logits.shape == (2, 8, 32)
