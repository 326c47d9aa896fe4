"""Statistics and scores of experts behind every kind of router, against explicit float64 autograd.

Routers differ in what a token's experts are multiplied by: softmax over all experts or over the chosen ones, sigmoids,
normalised or not, times a factor, times a value of each expert. An expert's statistics see it through the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sweep_inputs import inputs_of
from sweep_model import built, in_float64, model_class, tensors
from torch import Tensor, nn
from torch.nn import functional as F

import obc
from obc.criteria import Subject, group_scores, scores_from
from obc.structures.transformers import TransformersStructure

# Model type -> what is special in its router.
ROUTERS = {
    "mixtral": "softmax over all, then normalised",
    "qwen3_moe": "softmax over all",
    "deepseek_v2": "softmax times a factor, and shared experts",
    "deepseek_v3": "groups of experts, sigmoids with a correction bias, normalised, a factor, and shared experts",
    "afmoe": "a linear layer inside, sigmoids, a correction bias in the block around it",
    "beam": "a factor after the experts",
    "ernie4_5_moe": "a correction bias in a module of its own, normalised from a least sum on",
    "flint": "normalised sigmoids without a correction bias",
    "gemma4_text": "a norm before it, and a factor of each expert",
    "hunyuan_v1_moe": "a linear layer inside",
    "lfm2_moe": "a correction bias given by the block around it",
    "nemotron_h": "experts without gates",
}


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return sum((one.square().mean() for one in tensors(model(**batch))), torch.zeros((), dtype=torch.float64))


def _outputs(experts: Any, call: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(h_e of all tokens, y_e of all tokens, sum over experts of g_e y_e): each expert computes every token."""
    hidden, indices, weights = call
    inner, outputs, total = [], [], torch.zeros_like(hidden)
    for expert, down in enumerate(experts.down_proj):
        if hasattr(experts, "up_proj"):
            h = experts.act_fn(hidden @ experts.up_proj[expert].T)
        else:
            gate, up = (hidden @ experts.gate_up_proj[expert].T).chunk(2, -1)
            h = experts.act_fn(gate) * up
        h.retain_grad()
        y = F.linear(h, down)
        y.retain_grad()
        total = total + (weights * (indices == expert)).sum(1, keepdim=True) * y
        inner.append(h)
        outputs.append(y)
    return inner, outputs, total


def _unfused(model: Any, name: str, batch: dict[str, Tensor]) -> SimpleNamespace:
    """What an explicit copy of the experts ``name`` computes in one forward and backward pass of the model."""
    experts, seen = model.get_submodule(name), SimpleNamespace()

    def forward(hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        seen.indices, seen.gates = indices, weights.detach()
        hidden = hidden.detach().requires_grad_() if not hidden.requires_grad else hidden
        seen.inner, seen.outputs, total = _outputs(experts, [hidden, indices, weights])
        return total

    experts.forward = forward
    try:
        _loss(model, batch).backward()
    finally:
        del experts.forward
    return seen


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    _, chosen = model_class("causal", request.param)
    with in_float64(chosen):
        yield built("causal", request.param)


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize("model", ROUTERS, indirect=True)
def test_scores_and_statistics_are_those_of_separate_experts(model: Any) -> None:
    batches: list[Any] = [inputs_of("causal", model)]
    batches.append({"input_ids": batches[0]["input_ids"].flip(1)})
    structure = TransformersStructure(model, ["experts", "expert_ffn"])
    whole = next(group for group in structure.groups if group.kind == "experts")
    name = whole.name
    inner = next(group for group in structure.groups if group.kind == "expert_ffn" and group.name.startswith(name))
    units = whole.slices[-1].channels  # (units, experts of each)
    explicit = [_unfused(model, name, batch) for batch in batches]
    model.zero_grad()
    statistics = ["moments", "gradient_moments", "experts"]
    found = obc.collect(model, batches, _loss, statistics=statistics, groups=[inner, whole], progress=False)
    rows_inner, rows_whole, reap, tokens = [], [], [], []
    for one in explicit:
        rows_inner.append(sum((h * h.grad).sum(0) for h in one.inner))
        rows_of_experts = torch.stack([(y * y.grad).sum() for y in one.outputs])
        rows_whole.append(rows_of_experts[units].sum(1))
    for expert in range(len(explicit[0].outputs)):
        routed = [(one.indices == expert).any(1) for one in explicit]
        count = sum(int(here.sum()) for here in routed)
        h = torch.cat([one.inner[expert].detach()[here] for one, here in zip(explicit, routed, strict=True)])
        g = torch.cat([one.inner[expert].grad[here] for one, here in zip(explicit, routed, strict=True)])
        y = torch.cat([one.outputs[expert].detach()[here] for one, here in zip(explicit, routed, strict=True)])
        weights = [
            (one.gates * (one.indices == expert)).sum(1)[here] for one, here in zip(explicit, routed, strict=True)
        ]
        gates, norms = torch.cat(weights), y.norm(dim=-1)
        reap.append((gates * norms).sum() / max(count, 1))
        tokens.append(torch.tensor(float(count)))
        uses = found.experts[name]
        expected = (count, gates.sum(), norms.sum(), (gates * norms).sum())
        for field, value in zip((uses.count, uses.gate, uses.norm, uses.gate_norm), expected, strict=True):
            torch.testing.assert_close(float(field[expert]), float(value), rtol=1e-6, atol=1e-6)
        if count:
            read = f"{name}[{expert}]"
            for got, value in (
                (found.moments[read].square, h.square().sum(0)),
                (found.gradient_moments[read].square, g.square().sum(0)),
                (found.gradient_moments[read].absolute, g.abs().sum(0)),
            ):
                torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-6 * float(value.max()))
    subject = Subject(model, [inner, whole], batches, _loss, lambda m, b: m(**b), "gate", "batch", torch.Generator())  # type: ignore[arg-type]
    for criterion, by_expert in (("reap", reap), ("expert_frequency", tokens)):
        by_unit = torch.stack(by_expert).double()[units].sum(1)
        torch.testing.assert_close(scores_from(criterion, [whole], found, model)[name].double(), by_unit)
    scores = group_scores("jacobian", subject)
    for group, rows in ((inner, rows_inner), (whole, rows_whole)):
        expected_scores = torch.stack(rows).square().sum(0).detach()
        assert float(expected_scores.max()) > 0
        torch.testing.assert_close(
            scores[group.name].double(), expected_scores, rtol=1e-4, atol=1e-5 * float(expected_scores.max())
        )


def _mixture(model: nn.Module) -> Any:
    return next(group for group in TransformersStructure(model, ["experts"]).groups if group.kind == "experts")


@pytest.mark.parametrize("model", [*ROUTERS, "jetmoe", "llama4_text", "aria_text"], indirect=True)
def test_as_many_experts_stay_as_a_token_is_sent_to(model: Any) -> None:
    batch = inputs_of("causal", model)
    group = _mixture(model)
    structure = TransformersStructure(model, ["experts"])
    least, size = structure.limits.min_units[group.name], group.size
    assert least == 2
    with pytest.raises(
        ValueError,
        match=f"{size - 1} of the {size} units of '{group.name}' were to be removed; at least 2 must stay",
    ):
        structure.remove({group.name: torch.arange(size - 1)})
    structure.remove({group.name: torch.arange(0, 2 * (size - 2), 2) for group in structure.groups})
    with torch.no_grad():
        assert all(output.isfinite().all() for output in tensors(model(**batch)))
    assert structure.config_refused is None
    rebuilt = type(model)(type(model.config).from_dict(model.config.to_dict()))  # what is left is a valid config
    assert {key: one.shape for key, one in rebuilt.state_dict().items()} == {
        key: one.shape for key, one in model.state_dict().items()
    }


def test_a_router_that_adds_the_two_best_of_a_group_keeps_two_experts() -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    latent = {"kv_lora_rank": 12, "q_lora_rank": 12, "v_head_dim": 8, "intermediate_size": 48}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 1}
    config = transformers.DeepseekV3Config(**sizes, **heads, **latent, **experts, n_group=1, topk_group=1)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    structure = TransformersStructure(model, ["experts"])
    (group,) = structure.groups
    assert structure.limits.min_units[group.name] == 2
    structure.remove({group.name: torch.tensor([1, 3])})
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("model", ["deepseek_v3", "glm4_moe", "dots1"], indirect=True)
def test_groups_of_experts_stay_of_equal_size(model: Any) -> None:
    batch = inputs_of("causal", model)
    structure = TransformersStructure(model, ["experts", "expert_ffn"])
    assert {(group.kind, group.size) for group in structure.groups} == {("experts", 3), ("expert_ffn", 24)}
    before = (model.config.n_group, model.config.topk_group, model.config.num_experts_per_tok)
    structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    assert before == (2, 1, 2)
    assert (model.config.n_group, model.config.topk_group, model.config.num_experts_per_tok) == before
    routers = [module for module in model.modules() if hasattr(module, "num_group") and hasattr(module, "weight")]
    assert [(module.num_experts, len(module.weight)) for module in routers] == [(4, 4)] * len(routers)
    with torch.no_grad():
        assert all(output.isfinite().all() for output in tensors(model(**batch)))


def test_a_router_that_does_not_say_how_many_experts_is_left_out() -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model: Any = transformers.MixtralForCausalLM(config)
    for module in model.modules():
        vars(module).pop("top_k", None)
        vars(module).pop("config", None)
    structure = TransformersStructure(model, ["experts"])
    assert list(structure.left_out.values()) == [
        "to how many experts model.layers.0.mlp.gate sends a token is not known, so neither is how many must stay"
    ]
