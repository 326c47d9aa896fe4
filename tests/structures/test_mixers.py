"""Units of recurrent mixers and of JetMoE's mixtures, in the models that have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_inputs import inputs_of
from sweep_model import built, difference, in_float64, model_class, tensors

from obc.structures.proof import prove
from obc.structures.transformers import TransformersStructure, load_pruned, save_pruned

MAMBA2 = ("mamba2", "bamba", "nemotron_h", "granitemoehybrid", "zamba2")
DELTA = ("qwen3_next", "qwen3_5_text", "olmo_hybrid", "bailing_hybrid")
OTHERS = ("zamba", "xlstm", "recurrent_gemma", "minimax")
# Model types with kinds of their own -> these, and how many groups of each two layers have.
KINDS = {
    "rwkv": {"mixer_channels": 2, "ffn": 2},
    "lfm2": {"mixer_channels": 1, "ffn": 2, "heads": 1},
    "jetmoe": {"heads": 2, "experts": 4, "expert_ffn": 2},
}


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    with in_float64(model_class("causal", request.param)[1]):
        yield built("causal", request.param)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("model", [*MAMBA2, *DELTA, *OTHERS, *KINDS], indirect=True)
def test_removed_units_equal_masked_ones_and_go_through_files(model: Any, tmp_path: Path) -> None:
    batch, before = inputs_of("causal", model), dict(model.state_dict())
    counts = KINDS.get(model.config.model_type, {})
    structure = TransformersStructure(model, [*counts] or ["mixer_heads"])
    assert not counts or Counter(group.kind for group in structure.groups) == counts
    proof = prove(structure, lambda copied: tensors(copied(**batch)))
    assert structure.groups
    assert proof.proved == [group.name for group in structure.groups]
    assert proof.error < 1e-11
    costs = structure.costs("parameters")
    for number, group in enumerate(structure.groups):
        least = structure.limits.min_units[group.name]
        units = torch.arange(1 + number % 2, group.size, 2)[: group.size - least]
        structure.remove({group.name: units})
    assert structure.costs("parameters").total() == sum(parameter.numel() for parameter in model.parameters())
    assert costs.total() > structure.costs("parameters").total()
    structure.plan.verify(before, model)
    with torch.no_grad():
        pruned = tensors(model(**batch))
    save_pruned(model, structure.plan, tmp_path)
    loaded = _eager(load_pruned(tmp_path).double())
    with torch.no_grad():
        assert difference(tensors(loaded(**batch)), pruned) < 1e-11


@pytest.mark.parametrize("model", ["mamba2", "bamba", "qwen3_next", "bailing_hybrid", "zamba"], indirect=True)
def test_half_of_the_heads_load_by_from_pretrained_and_generate(model: Any, tmp_path: Path) -> None:
    structure = TransformersStructure(model, ["mixer_heads"])
    structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    assert structure.config_refused is None
    model.save_pretrained(tmp_path)
    loaded = _eager(type(model).from_pretrained(tmp_path, dtype=torch.float64).double().eval())
    batch = inputs_of("causal", model)
    with torch.no_grad():
        assert difference(tensors(loaded(**batch)), tensors(model(**batch))) < 1e-6
    prompt = batch["input_ids"][:1, :6]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **how)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **how))


@pytest.mark.parametrize("model", ["lfm2"], indirect=True)
def test_a_narrower_short_convolution_generates_with_its_cache(model: Any) -> None:
    structure = TransformersStructure(model, ["mixer_channels"])
    structure.remove({group.name: torch.arange(0, group.size, 3) for group in structure.groups})
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = inputs_of("causal", model)["input_ids"][:1, :6]
    how["attention_mask"] = torch.ones_like(prompt)
    cached = model.generate(prompt, use_cache=True, **how)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **how))


@pytest.mark.parametrize("model", ["lfm2", "recurrent_gemma"], indirect=True)
def test_the_residual_stream_goes_past_a_convolution_as_wide_as_itself(model: Any) -> None:
    batch = inputs_of("causal", model)
    structure = TransformersStructure(model, ["embedding"])
    (group,) = structure.groups
    assert not [part.module for part in group.slices if part.module.endswith((".conv", ".conv_1d"))]
    assert prove(structure, lambda copied: tensors(copied(**batch))).proved == [group.name]


@pytest.mark.parametrize("model", ["falcon_h1"], indirect=True)
def test_a_mixer_whose_channels_are_scaled_by_a_buffer_is_named(model: Any) -> None:
    structure = TransformersStructure(model, ["mixer_heads"])
    assert not structure.groups
    assert any("mup_vector" in reason for reason in structure.left_out.values())


@pytest.mark.parametrize("model", ["inkling2_text"], indirect=True)
def test_whatever_is_not_offered_is_named(model: Any) -> None:
    """Every weight of a repeated block is in a group's module, or in one that is left out with a reason."""
    structure = TransformersStructure(model)
    named = [part.module for block in structure.blocks.values() for part in block.group.slices]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            parent = name.rpartition(".")[0]
            inside = any(one == parent or one.startswith(f"{parent}.") for one in named)
            assert inside or any(
                parent.startswith(left) or left.startswith(f"{parent}.") for left in structure.left_out
            ), name


@pytest.mark.parametrize("kinds", [["ffn"], None])
def test_a_module_that_is_not_known_is_named_where_all_kinds_are_asked_for(kinds: list[str] | None) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.back = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Odd(), Odd()])
    structure = TransformersStructure(model) if kinds is None else TransformersStructure(model, kinds)
    reason = "Odd has no units of a kind that is known (its weights: mix, back)"
    assert structure.left_out == ({} if kinds else {"layers.0": reason, "layers.1": reason})


def _eager(model: Any) -> Any:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("model", ["rwkv"], indirect=True)
def test_a_cache_that_a_narrower_mixer_has_no_room_in_is_told(model: Any) -> None:
    structure = TransformersStructure(model, ("mixer_channels",))
    assert not structure.warnings
    structure.remove({structure.groups[0].name: torch.tensor([1])})
    assert any("use_cache=False" in warning for warning in structure.warnings)
    batch = inputs_of("causal", model)
    generated = model.generate(batch["input_ids"][:, :4], max_new_tokens=2, use_cache=False, do_sample=False)
    assert generated.shape[1] == 6
    with pytest.raises(RuntimeError, match="must match"):  # once transformers makes room, the warning can go
        model(batch["input_ids"][:, :4], use_cache=True)
