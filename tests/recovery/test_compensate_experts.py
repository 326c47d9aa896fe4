"""Compensation of experts whose weights are one tensor: each down projection is regressed on the tokens it gets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from obc.integrations.transformers import TransformersStructure
from obc.model.processes import ALONE
from obc.recovery import compensate
from obc.recovery.unfused import DownProjection, unfused

MODES = ["ls", "seq", "correct"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
HALF = 8
LIMIT = 20.0  # gpt-oss clamps gates and up projections here


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, intermediate_size=2 * HALF, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe() -> Any:
    """A mixture with a shared expert, whose down projection is an ordinary layer."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * HALF}
    config = transformers.Qwen2MoeConfig(**SIZES, **experts, shared_expert_intermediate_size=8, intermediate_size=8)
    return transformers.Qwen2MoeForCausalLM(config)


def deepseek_v3() -> Any:
    """Gates by sigmoids, groups of experts, a dense first layer."""
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * HALF, "n_group": 2}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    config = transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, **experts, **heads, topk_group=1, first_k_dense_replace=1
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss() -> Any:
    """Experts stored the other way round, gates and up projections interleaved, with biases."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 2 * HALF}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, **experts, head_dim=8))
    for module in fused(model).values():
        module.limit = LIMIT  # transformers 5.17 does not read it from the config
    return model


def jetmoe() -> Any:
    """Each projection of all experts is a module."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 2 * HALF}
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**SIZES, **experts, kv_channels=8))


FAMILIES = {"mixtral": mixtral, "qwen2-moe": qwen2_moe, "deepseek-v3": deepseek_v3, "gpt-oss": gpt_oss}


def build(family: str, redundant: bool = False) -> Any:
    """A float64 model. ``redundant``: the second half of every expert's inner channels is a multiple of the first."""
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    model.set_experts_implementation("eager")  # the only one that takes float64
    for module in fused(model).values():
        with torch.no_grad():
            for name, bias in module.named_parameters():
                if name.endswith("_bias"):
                    bias.normal_(0, 0.2)
            if redundant:
                make_redundant(module)
    return model


def make_redundant(module: Any) -> None:
    """The second half of h = act(gate) * up, or act(gate) * (up + 1), is -1.5 times the first."""
    if not module.has_bias:
        width = module.down_proj.shape[2]
        gate, up = module.gate_up_proj.chunk(2, 1)
        gate[:, width // 2 :] = gate[:, : width // 2]
        up[:, width // 2 :] = -1.5 * up[:, : width // 2]
        return
    width = module.down_proj.shape[1]
    for tensor, constant in ((module.gate_up_proj, 0.0), (module.gate_up_proj_bias, -2.5)):
        gate, up = tensor[..., ::2], tensor[..., 1::2]
        gate[..., width // 2 :] = gate[..., : width // 2]
        up[..., width // 2 :] = -1.5 * up[..., : width // 2] + constant


def fused(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "gate_up_proj")}


def without_half(original: Any, kinds: tuple[str, ...] = ("expert_ffn",), experts: list[int] | None = None) -> Any:
    """(copy without the second half of the inner channels and without some experts, plan)."""
    model = copy.deepcopy(original)
    structure = TransformersStructure(model, kinds)
    gone = {}
    for group in structure.groups:
        if group.kind == "experts":
            gone[group.name] = torch.tensor(experts)
        else:
            gone[group.name] = torch.arange(group.size // 2, group.size)
    structure.remove(gone)
    return model, structure.plan


def text(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (8, 16), generator=generator) for _ in range(count)]


def logits(model: Any, batch: Any) -> Tensor:
    inputs = batch if isinstance(batch, dict) else {"input_ids": batch}
    return model(**inputs, use_cache=False).logits


@torch.no_grad()
def error(model: Any, original: Any) -> float:
    pairs = [(logits(model, tokens), logits(original, tokens)) for tokens in text(2, seed=9)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_redundant_channels_lose_nothing(family: str, mode: str) -> None:
    original = build(family, redundant=True)
    model, plan = without_half(original)
    assert error(model, original) > 1e-3
    report = compensate(model, original, plan, text(12), logits, mode=mode, ridge=1e-9, progress=False)
    assert error(model, original) < 1e-10
    assert report.sliced_experts == []
    assert len(report.layers) == sum(len(module.down_proj) for module in fused(model).values())
    assert list(model.state_dict()) == list(original.state_dict())
    assert not any(isinstance(module, DownProjection) for module in model.modules())


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_gets_the_regression_of_its_own_tokens(family: str) -> None:
    """W D with the normal equations of the tokens that the router sends to it, computed here from its weights."""
    original = build(family)
    model, plan = without_half(original)
    ridge, calibration = 1e-3, text(15)
    compensate(model, original, plan, calibration, logits, mode="ls", ridge=ridge, progress=False)
    name, module = next(iter(fused(original).items()))
    calls: list[tuple[Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        for tokens in (batch for index, batch in enumerate(calibration, 1) if index % 5):  # every fifth is held out
            logits(original, tokens)
    handle.remove()
    expert = int(calls[0][1][0, 0])
    rows = []
    for hidden, indices, _ in calls:
        for token, chosen in enumerate(indices.tolist()):
            if expert in chosen:
                rows.append(inner(module, expert, hidden[token]))
    x = torch.stack(rows).detach()
    mean = x.mean(0) if module.has_bias else torch.zeros(2 * HALF, dtype=torch.float64)
    x = x - mean
    z = x[:, :HALF]
    gram = z.T @ z
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(HALF, dtype=torch.float64)
    select = torch.eye(2 * HALF, dtype=torch.float64)[:, :HALF]
    decompressor = select + torch.linalg.solve(damped, (x - z @ select.T).T @ z, left=False)
    down, got = module.down_proj[expert], fused(model)[name].down_proj[expert]
    if module.has_bias:
        down, got = down.T, got.T
        bias = module.down_proj_bias[expert] + down @ (mean - decompressor @ mean[:HALF])
        assert_close(fused(model)[name].down_proj_bias[expert], bias, rtol=1e-8, atol=1e-10)
    assert_close(got, down @ decompressor, rtol=1e-8, atol=1e-10)


def inner(module: Any, expert: int, x: Tensor) -> Tensor:
    """The input of an expert's down projection for one token, as the papers have it."""
    if not module.has_bias:
        gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
        return module.act_fn(gate) * up
    both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
    gate, up = both[0::2].clamp(max=LIMIT), both[1::2].clamp(-LIMIT, LIMIT)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize(("family", "left"), [("mixtral", 3), ("deepseek-v3", 6)])
@pytest.mark.parametrize("mode", MODES)
def test_experts_that_are_gone_leave_the_others_theirs(mode: str, family: str, left: int) -> None:
    """Names count the experts of the pruned model, weights come from those of the unpruned one.

    DeepSeek-V3's router first chooses among two groups of experts, each of which loses one.
    """
    original = build(family, redundant=True)
    model, plan = without_half(original, ("experts", "expert_ffn"), experts=[1])
    whole = copy.deepcopy(original)
    TransformersStructure(whole, ["experts"]).remove(
        {group.name: torch.tensor([1]) for group in TransformersStructure(whole, ["experts"]).groups}
    )
    before = error(model, whole)
    report = compensate(model, original, plan, text(12), logits, mode=mode, ridge=1e-9, progress=False)
    names = {name.rpartition(".")[2] for name in report.layers}
    assert names == {f"down_proj[{expert}]" for expert in range(left)}
    if mode == "ls":  # the other modes also make up for the expert that is gone
        assert error(model, whole) < 1e-10 < before
    assert report.final_error < report.naive_error


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("mode", MODES)
def test_only_tokens_that_both_models_send_to_an_expert_count(mode: str) -> None:
    """The first layer is changed so much that the second one's router sends tokens elsewhere."""
    original = build("mixtral", redundant=True)
    model, plan = without_half(original)
    with torch.no_grad():
        for module in (model, original):
            module.model.layers[1].mlp.gate.weight.mul_(50)
    report = compensate(model, original, plan, text(12), logits, mode=mode, ridge=1e-9, progress=False)
    assert report.final_error < 1e-8


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("mode", MODES)
def test_padding_does_not_count(mode: str) -> None:
    original = build("mixtral")
    found = []
    for filler in (3, 41):
        batches = []
        for tokens in text(6):
            mask = torch.ones_like(tokens)
            mask[:, 12:] = 0
            batches.append({"input_ids": torch.where(mask.bool(), tokens, filler), "attention_mask": mask})
        model, plan = without_half(original)
        compensate(model, original, plan, batches, logits, mode=mode, ridge=1e-3, progress=False)
        found.append(fused(model)["model.layers.0.mlp.experts"].down_proj.detach())
    assert_close(*found, rtol=1e-9, atol=1e-11)


def test_the_models_are_what_they_were_after_an_exception() -> None:
    original = build("mixtral")
    model, plan = without_half(original)
    before = [copy.deepcopy(each.state_dict()) for each in (model, original)]
    calls = 0

    def forward(model: Any, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise RuntimeError("no more")
        return logits(model, batch)

    with pytest.raises(RuntimeError, match="no more"):
        compensate(model, original, plan, text(6), forward, mode="correct", progress=False)
    for each, state in zip((model, original), before, strict=True):
        assert_close(each.state_dict(), state, rtol=0, atol=0)
        assert not any("forward" in vars(module) for module in each.modules())
        assert not any(isinstance(module, DownProjection) for module in each.modules())


def test_decompressors_are_those_of_layers_that_are_folded() -> None:
    original = build("qwen2-moe")
    model, plan = without_half(original, ("expert_ffn", "ffn"))
    report = compensate(model, original, plan, text(6), logits, mode="ls", keep_decompressors=True, progress=False)
    assert report.decompressors
    assert all(name in plan for name in report.decompressors)


@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss"])
def test_unfused_models_compute_the_same(family: str) -> None:
    original = build(family)
    model, plan = without_half(original)
    tokens = text(1)[0]
    with torch.no_grad():
        before = [logits(each, tokens) for each in (model, original)]
        with unfused(model, original, plan, tokens, logits, ALONE) as (_, left):
            assert left == []
            assert any(isinstance(module, DownProjection) for module in model.modules())
            for each, expected in zip((model, original), before, strict=True):
                assert_close(logits(each, tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("why", ["another formula", "a wrapper"])
def test_experts_that_are_not_understood_stay_naive_and_are_named(mode: str, why: str) -> None:
    original = build("mixtral")
    model, plan = without_half(original)
    for each in (model, original):
        for module in fused(each).values():
            if why == "a wrapper":
                module.forward = module.forward
            else:
                forward = type(module).forward
                scaled = type("Scaled", (type(module),), {"forward": lambda *args, f=forward: 1.1 * f(*args)})
                module.__class__ = scaled
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"fused experts are not compensated: model\.layers\.0\.mlp\.experts"):
        report = compensate(model, original, plan, text(5), logits, mode=mode, progress=False)
    assert report.sliced_experts == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_experts_in_modules_of_their_projections_stay_naive_and_are_named() -> None:
    torch.manual_seed(0)
    original = jetmoe().double().eval()
    model, plan = without_half(original)
    names = [f"model.layers.{layer}.mlp.output_linear" for layer in range(2)]
    with pytest.warns(UserWarning, match=r"fused experts are not compensated: model\.layers\.0\.mlp\.output_linear"):
        report = compensate(model, original, plan, text(5), logits, mode="ls", progress=False)
    assert report.sliced_experts == names
