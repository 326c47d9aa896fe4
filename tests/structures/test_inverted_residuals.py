"""Inverted residuals in models of the transformers library: pruned exactly, with the MACs that run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import obc  # noqa: E402
from obc.structures.counted_macs import counted_macs  # noqa: E402
from obc.structures.transformers import TransformersStructure  # noqa: E402
from obc.structures.transformers.saving import load_pruned, save_pruned  # noqa: E402


def mobilevit(version: str) -> nn.Module:
    common: dict[str, Any] = {"image_size": 64, "num_labels": 4}
    if version == "V2":
        config = transformers.MobileViTV2Config(width_multiplier=0.25, base_attn_unit_dims=[16, 24, 32], **common)
        return transformers.MobileViTV2ForImageClassification(config)
    widths = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 12, 12, 16, 24]}
    config = transformers.MobileViTConfig(num_attention_heads=2, **widths, **common)
    return transformers.MobileViTForImageClassification(config)


def mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(image_size=64, depth_multiplier=0.25, num_labels=4)
    return transformers.MobileNetV2ForImageClassification(config)


def efficientnet() -> nn.Module:
    config = transformers.EfficientNetConfig(image_size=64, width_coefficient=0.25, depth_coefficient=0.2, num_labels=4)
    config.hidden_dim = 320
    return transformers.EfficientNetForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "mobilevit": (lambda: mobilevit("V1"), {"inverted_residual", "ffn", "heads"}),
    "mobilevit v2": (lambda: mobilevit("V2"), {"inverted_residual", "ffn"}),
    "mobilenet v2": (mobilenet, {"inverted_residual"}),
    "efficientnet": (efficientnet, {"inverted_residual"}),
}


def made(name: str) -> nn.Module:
    """The model in float64, with norms that are not the identity."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                tensor.uniform_(low, high)
    return model


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("name", MODELS)
def test_inverted_residuals_are_pruned_exactly(name: str, tmp_path: Any) -> None:
    """Truth: the unpruned model with the channels at zero where the narrowing convolution, and a gate, read them."""
    model, x = made(name), pixels()
    unpruned = copy.deepcopy(model)
    structure = TransformersStructure(model, example_inputs={"pixel_values": x})
    assert structure.proof is not None
    assert set(structure.proof.proved) == {group.name for group in structure.groups}
    assert {group.kind for group in structure.groups} == MODELS[name][1]
    for group in structure.groups:
        gone = torch.arange(1, group.size, 3)
        for part in group.slices:
            layer: Any = unpruned.get_submodule(part.module)
            if part.side == "in":
                layer.weight.data[:, part.channels[gone].flatten()] = 0
        structure.remove({group.name: gone})
    torch.testing.assert_close(model(pixel_values=x).logits, unpruned(pixel_values=x).logits, rtol=1e-9, atol=1e-9)
    structure.plan.verify(made(name).state_dict(), model)
    save_pruned(model, structure.plan, tmp_path)
    loaded = load_pruned(tmp_path)
    torch.testing.assert_close(loaded(pixel_values=x).logits, model(pixel_values=x).logits, rtol=0, atol=0)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", MODELS)
def test_macs_of_every_stage_are_those_that_run(name: str) -> None:
    model, x = made(name), pixels()

    def run(copied: nn.Module) -> Any:
        return copied(pixel_values=x)

    structure = TransformersStructure(model)
    structure.calibrate(counted_macs(model, run))
    for step in (2, 3):
        assert structure.costs("macs").total() == pytest.approx(sum(counted_macs(model, run).values()), rel=1e-6)
        structure.remove({group.name: torch.arange(0, group.size - 1, step) for group in structure.groups})
    assert structure.costs("macs").total() == pytest.approx(sum(counted_macs(model, run).values()), rel=1e-6)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert structure.costs("parameters").total() == parameters


@pytest.mark.slow
def test_a_budget_is_met() -> None:
    model = made("mobilevit").float()
    batches = [{"pixel_values": pixels().float(), "labels": torch.tensor([0, 1])} for _ in range(8)]
    report = obc.prune(
        model, batches=batches, loss_fn=lambda m, b: m(**b).loss, macs=0.7, steps=2, progress=False
    ).report
    assert report.macs_measured is not None
    assert 0.6 < report.macs_measured <= 0.7
    assert report.error is not None


def test_what_is_no_inverted_residual_is_named() -> None:
    model = made("mobilevit")
    parts: Any = model.get_submodule("mobilevit.encoder.layer.1.layer.0")
    parts.conv_3x3.normalization = nn.GroupNorm(2, parts.conv_3x3.convolution.out_channels)
    structure = TransformersStructure(model)
    name = "mobilevit.encoder.layer.1.layer.0"
    assert "how" in structure.left_out[name]
    assert not any(group.name.startswith(name) for group in structure.groups)
