"""Quantised models are refused by name when they would be sliced; obc.dequantize makes them plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, QuantoConfig
from transformers.integrations.finegrained_fp8 import FP8Linear

import obc
from obc.model.quantized import QuantisedKind, quantised_layers, register
from obc.structures.transformers import TransformersStructure

TOKENS = torch.arange(3, 19).view(2, 8)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, **heads)
    ).eval()


def loss(model: Any, batch: Tensor) -> Tensor:
    found: Tensor = model(batch, labels=batch).loss
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


# --- the kinds that can be installed ------------------------------------------------------------------------------


def changed(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, change(module))
    return model


def bitsandbytes_four(model: nn.Module, quant_type: str = "nf4") -> nn.Module:
    import bitsandbytes as bnb

    def change(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=quant_type)
        layer.bias = linear.bias
        return layer.to("cpu")

    return changed(model, change)


def bitsandbytes_eight(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    def change(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = linear.bias
        return layer.to("cpu")

    return changed(model, change)


def torchao(model: nn.Module, config: str = "Int8WeightOnlyConfig") -> nn.Module:
    # Where it is installed, transformers imports it with every model, which would slow down all tests.
    quantization = pytest.importorskip("torchao.quantization", reason="make torchao installs it and runs these tests")
    quantization.quantize_(
        model,
        getattr(quantization, config)(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )
    return model


def quanto(model: nn.Module, weights: str = "qint8") -> nn.Module:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, weights), exclude="lm_head")
    quanto.freeze(model)
    return model


def compressed(model: nn.Module, scheme: str = "W4A16") -> nn.Module:
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    targets = preset_name_to_scheme(scheme, ["Linear"])
    targets.weights.group_size = 32 if targets.weights.group_size else targets.weights.group_size
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": targets}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            groups = module.weight.unflatten(1, (module.weight_scale.shape[1], -1))
            module.weight_scale.data = groups.detach().abs().amax(2) / 7
            compress_module(module)
    return model


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bitsandbytes nf4": bitsandbytes_four,
    "bitsandbytes fp4": lambda model: bitsandbytes_four(model, "fp4"),
    "bitsandbytes int8": bitsandbytes_eight,
    "torchao int8": torchao,
    "torchao int8, activations too": lambda model: torchao(model, "Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8": lambda model: torchao(model, "Float8WeightOnlyConfig"),
    "quanto int8": quanto,
    "quanto fp8": lambda model: quanto(model, "qfloat8"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_models_are_refused_by_name_and_pruned_once_they_are_plain(kind: str) -> None:
    """Neither the structure nor a plan slices a packed weight; the plain model computes what the packed one did."""
    model = KINDS[kind](llama())
    packed = set(quantised_layers(model))
    assert len(packed) == 14
    structure = TransformersStructure(model)
    assert not structure.groups
    assert all("obc.dequantize" in reason for reason in structure.left_out.values())
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is a .* stores its weight packed"):
        obc.prune(model, batches=[TOKENS], loss_fn=loss, macs=0.8)
    plain = llama()
    plan = _pruned(plain)
    with pytest.raises(obc.PlanError, match="stores its weight packed"):
        plan.apply(model)

    before, rounding = logits(model), 0.02 if "activations" in kind else 1e-5
    assert set(obc.dequantize(model)) == packed
    assert not quantised_layers(model)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model), before, atol=rounding, rtol=0)
    weights = model.state_dict()
    _pruned(model).verify(weights, model)


def _pruned(model: nn.Module) -> obc.PruningPlan:
    structure = TransformersStructure(model)
    structure.remove({group.name: torch.arange(group.size // 4) for group in structure.groups})
    logits(model)
    return structure.plan


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_compressed_tensors(scheme: str) -> None:
    model = compressed(llama(), scheme)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    original = llama().get_submodule("model.layers.0.mlp.up_proj").weight
    scale = layer.weight_scale.float().repeat_interleave(original.shape[1] // layer.weight_scale.shape[1], 1)
    least = -8 if scheme == "W4A16" else -128
    expected = (original / scale).round().clamp(least, -least - 1) * scale
    assert not TransformersStructure(model).groups
    assert len(obc.dequantize(model)) == 14
    torch.testing.assert_close(model.get_submodule("model.layers.0.mlp.up_proj").weight, expected)
    _pruned(model)


@pytest.mark.parametrize("blocks", [None, (4, 6)], ids=["tensor", "blocks"])
def test_fp8_linear(blocks: tuple[int, int] | None) -> None:
    """Its kernels need a GPU; the weight does not. Blocks at the edges are smaller."""
    torch.manual_seed(0)
    layer = FP8Linear(9, 7, blocks, has_bias=True)
    layer.weight.data = torch.randn(7, 9).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.tensor(0.3) if blocks is None else torch.rand(2, 2) + 0.5
    layer.bias.data = torch.randn(7)
    model = nn.Sequential(layer, nn.Linear(7, 2))
    assert obc.dequantize(model) == ["0"]
    for row in range(7):
        for column in range(9):
            scale = layer.weight_scale_inv if blocks is None else layer.weight_scale_inv[row // 4, column // 6]
            assert model[0].weight[row, column] == layer.weight[row, column].float() * scale
    assert torch.equal(model[0].bias, layer.bias)


def test_convolutions_and_embeddings_of_quanto() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)).eval()
    x = torch.randn(2, 3, 8, 8)
    quanto(model)
    before = model(x)
    with pytest.raises(obc.PlanError, match="0 is a QConv2d that stores its weight packed"):
        obc.prune(model, x, [x], lambda model, x: model(x).square().mean(), macs=0.7)
    assert obc.dequantize(model) == ["0", "2"]
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), before)
    obc.prune(model, x, [x], lambda model, x: model(x).square().mean(), macs=0.7)
    assert model[0].out_channels < 8


# --- unknown kinds -----------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear layer of no known library: rows of small integers, with a scale for each."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8).T.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def values(self) -> Tensor:
        return self.qweight.T.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values(), self.bias)


class Rounded(Packed):
    """Its output is no linear function of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.2, 0.2)


class Elsewhere(Packed):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("this kernel needs a GPU")


@pytest.mark.parametrize("bias", [True, False])
def test_an_unknown_kind_is_read_by_what_it_does(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Packed(nn.Linear(600, 5, bias)), nn.Linear(5, 2))
    expected = model[0].values()
    assert obc.dequantize(model) == ["0"]
    torch.testing.assert_close(model[0].weight, expected)
    assert (model[0].bias is not None) == bias


@pytest.mark.parametrize(("kind", "why"), [(Rounded, "differs from it by"), (Elsewhere, "this kernel needs a GPU")])
def test_what_can_not_be_read_is_refused_by_name_and_nothing_changes(kind: type[Packed], why: str) -> None:
    model = changed(llama(), lambda linear: linear)
    layer = "model.layers.1.mlp.down_proj"
    quanto(model)
    model.set_submodule(layer, kind(nn.Linear(128, 64)))
    before = dict(model.named_modules())
    assert "model.layers.1.mlp" in TransformersStructure(model).left_out
    with pytest.raises(obc.PlanError, match=rf"{layer}.*{kind.__name__}") as raised:
        obc.dequantize(model)
    assert why in str(raised.value)
    assert dict(model.named_modules()) == before


def test_a_kind_can_be_taught() -> None:
    model = nn.Sequential(Elsewhere(nn.Linear(6, 5)), nn.Linear(5, 2))
    expected = model[0].values()
    kind = QuantisedKind("elsewhere", lambda module: isinstance(module, Elsewhere), lambda module: module.values())
    register(kind)
    with pytest.raises(ValueError, match="registered already"):
        register(copy.copy(kind))
    obc.dequantize(model)
    assert torch.equal(model[0].weight, expected)


def test_a_wrong_weight_is_refused() -> None:
    """The weight that a kind reads is compared with the layer's outputs."""

    class Scaled(Packed):
        pass

    register(QuantisedKind("scaled", lambda module: isinstance(module, Scaled), lambda module: module.values() * 1.1))
    with pytest.raises(obc.PlanError, match=r"0: a plain layer .* differs from it by 0\.0"):
        obc.dequantize(nn.Sequential(Scaled(nn.Linear(6, 5)), nn.Linear(5, 2)))


def test_experts_stored_packed_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, shape in (("gate_up_proj", (4, 12, 8)), ("down_proj", (4, 8, 6))):
                setattr(self, key, nn.Parameter(torch.zeros(shape).to(torch.float8_e4m3fn), requires_grad=False))

    with pytest.raises(obc.PlanError, match="0 is a Experts that stores its weights packed"):
        obc.dequantize(nn.Sequential(Experts(), nn.Linear(5, 2)))


# --- as transformers loads them -----------------------------------------------------------------------------------

LOADED = {
    "bitsandbytes 4 bits": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "quanto": lambda: QuantoConfig(weights="int8"),
}


@pytest.mark.parametrize("kind", LOADED)
def test_a_checkpoint_loaded_quantised_is_pruned_and_saved_plain(kind: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=LOADED[kind]())
    assert quantised_layers(model)
    obc.dequantize(model)
    structure = TransformersStructure(model, uniform=True)
    obc.prune(model, batches=[TOKENS], loss_fn=loss, macs=0.7, structure=structure, steps=1)
    model.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert not quantised_layers(loaded)
    assert loaded.config.intermediate_size < 128
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "quanto int8"])
def test_scores_of_the_quantised_model_prune_the_plain_one(kind: str, tmp_path: Path) -> None:
    """Scoring in 4 or 8 bits needs less memory; modules have the same names, so the scores serve the original."""
    model = KINDS[kind](llama())
    scores = obc.score(model, [TOKENS], loss)
    assert not any(how.startswith("unscored") for how in scores.coverage.values())
    scores.save(tmp_path / "scores.safetensors")
    plain = llama()
    found = obc.Scores.load(tmp_path / "scores.safetensors", plain).group(obc.transformer_groups(plain))
    assert len(found) == 4


def test_adapters_come_first() -> None:
    import peft

    model = peft.get_peft_model(quanto(llama()), peft.LoraConfig(target_modules=["k_proj"], r=2))
    with pytest.raises(obc.PlanError, match="merge_and_unload"):
        obc.dequantize(model)
