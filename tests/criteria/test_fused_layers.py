"""Units of fused projections score as those of the same layers apart: Phi-3 against Llama, GPT-2 against nn.Linear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from formulas import changed, check, make_subject
from models import randomise
from torch import nn

import obc
from obc.criteria import Subject, group_scores

# These sum over weights or rows, whatever tensor they lie in; three query heads share each head of keys and values.
CRITERIA = (
    "flap", "wanda_sp", "minitron", "cfsp", "obs", "slimgpt", "kfac", "kfac_obs", "compensated_jacobian", "jacobian",
    "token_jacobian", "nvit", "nirvana", "llm_pruner_element", "reconstruction",
)  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def subject_of(model: Any) -> Subject:
    return changed(make_subject("llama"), model=model, groups=tuple(obc.transformer_groups(model)))


def phi3_and_llama() -> tuple[nn.Module, nn.Module]:
    import transformers

    torch.manual_seed(0)
    llama = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))).double().eval()
    phi3 = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES)).double().eval()
    tensors = dict(llama.state_dict())
    for layer in range(SIZES["num_hidden_layers"]):
        for block, parts, whole in (("self_attn", ("q_", "k_", "v_"), "qkv_"), ("mlp", ("gate_", "up_"), "gate_up_")):
            prefix = f"model.layers.{layer}.{block}"
            taken = [tensors.pop(f"{prefix}.{part}proj.weight") for part in parts]
            tensors[f"{prefix}.{whole}proj.weight"] = torch.cat(taken)
    phi3.load_state_dict(tensors)
    return phi3, llama


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_fused_projections_score_as_separate_ones(criterion: str) -> None:
    fused, separate = (subject_of(model) for model in phi3_and_llama())
    x = fused.batches[0][0]
    torch.testing.assert_close(fused.model(x).logits, separate.model(x).logits)
    got, expected = group_scores(criterion, fused), group_scores(criterion, separate)
    assert [group.size for group in fused.groups] == [group.size for group in separate.groups] == [2, 14, 2, 14]
    for one, other in zip(got.values(), expected.values(), strict=True):
        check({criterion: one}, {criterion: other.double()}, 1e-5)


@pytest.mark.parametrize("criterion", [*CRITERIA, "l1", "llm_pruner_vector", "taylor"])
def test_transposed_projections_score_as_linear_layers(criterion: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 14, "n_positions": 16, "vocab_size": 31}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    transposed = subject_of(randomise(transformers.GPT2LMHeadModel(config)).double().eval())
    model = copy.deepcopy(transposed.model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            owner, _, key = name.rpartition(".")
            layer = nn.Linear(*module.weight.shape, dtype=torch.float64)  # type: ignore[arg-type]
            layer.load_state_dict({"weight": module.weight.T, "bias": module.bias})
            setattr(model.get_submodule(owner), key, layer)
    expected = group_scores(criterion, changed(transposed, model=model))
    check(group_scores(criterion, transposed), {name: scores.double() for name, scores in expected.items()}, 1e-5)
