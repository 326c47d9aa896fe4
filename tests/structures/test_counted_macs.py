"""MACs that a model executes: counted rightly, and predicted by a calibrated structure before and after pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers_families import FAMILIES, every_other

import obc
from obc.integrations.transformers import TransformersStructure
from obc.structures.counted_macs import counted_macs
from obc.structures.transformers.calibration import calibrate

# Their feed-forward channels and heads are a product of all that runs; routed experts see other tokens after pruning.
EXACT = [name for name in FAMILIES if name not in ("mixtral", "qwen2-moe", "deepseek-v2", "deepseek-v3")]


class Parts(nn.Module):
    """A layer that runs twice, one inside another, products outside any layer, attention by torch's fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3, groups=2)
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
        self.unused = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x).flatten(2).transpose(1, 2)  # (B, 4, 6)
        y = self.inner(self.inner(y))
        y = F.scaled_dot_product_attention(y, y, y)
        return y @ y.transpose(1, 2)


def test_counted_by_hand() -> None:
    model = Parts()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    counted = counted_macs(model, lambda m: m(torch.zeros(3, 4, 4, 4)))
    assert counted == {
        "convolution": 3 * 4 * 6 * 2 * 9,
        "inner": 0,
        "inner.0": 2 * 3 * 4 * 6 * 5,
        "inner.1": 0,
        "inner.2": 2 * 3 * 4 * 5 * 6,
        "": 2 * 3 * 4 * 4 * 6 + 3 * 4 * 6 * 4,
    }
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_cannot_be_counted() -> None:
    with pytest.raises(obc.PruningError, match="Parts: counting its MACs on the first batch failed in 'convolution'"):
        counted_macs(Parts(), lambda m: m(torch.zeros(3, 5, 4, 4)))


@pytest.mark.parametrize("family", EXACT)
def test_what_is_predicted_is_what_is_counted(family: str) -> None:
    case = FAMILIES[family]()

    def run(model: nn.Module) -> Any:
        return case.loss(model, case.batches[0])

    structure = TransformersStructure(case.model)
    structure.calibrate(counted_macs(case.model, run))
    for _ in range(2):
        counted = sum(counted_macs(case.model, run).values())
        assert structure.costs("macs").total() == pytest.approx(counted, rel=1e-6)
        structure.remove({group.name: every_other(group.size) for group in structure.groups})
    counted = sum(counted_macs(case.model, run).values())
    assert structure.costs("macs").total() == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "deepseek-v3"])
def test_inner_channels_of_routed_experts(family: str) -> None:
    """The tokens that each layer's experts get are as many whatever their widths are."""
    case = FAMILIES[family]()

    def run(model: nn.Module) -> Any:
        return case.loss(model, case.batches[0])

    structure = TransformersStructure(case.model, kinds=("expert_ffn",))
    structure.calibrate(counted_macs(case.model, run))
    structure.remove({group.name: torch.arange(8) for group in structure.groups})
    counted = sum(counted_macs(case.model, run).values())
    assert structure.costs("macs").total() == pytest.approx(counted, rel=1e-6)


def images() -> list[dict[str, Tensor]]:
    return [
        {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(4, (2,))} for _ in range(4)
    ]  # two images are enough: what is counted does not depend on them


def words() -> list[dict[str, Tensor]]:
    return [{"input_ids": (ids := torch.randint(3, 37, (2, 9))), "labels": ids} for _ in range(4)]


def mobilevit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    widths = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 12, 12, 16, 24]}
    config = transformers.MobileViTConfig(image_size=32, num_attention_heads=2, num_labels=4, **widths)
    return transformers.MobileViTForImageClassification(config)


def swin() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
    return transformers.SwinForImageClassification(transformers.SwinConfig(window_size=4, num_labels=4, **sizes))


def deberta() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}
    config = transformers.DebertaV2Config(vocab_size=37, pad_token_id=0, **sizes, **relative)
    return transformers.DebertaV2ForMaskedLM(config)


STAGES = {
    "convolutions between": (mobilevit, images, 0.9),
    "stages of other lengths": (swin, images, 0.85),
    "tables of positions": (deberta, words, 0.88),
}


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.filterwarnings("ignore")
def test_a_budget_means_what_the_model_executes(kind: str) -> None:
    build, batches, share = STAGES[kind]
    torch.manual_seed(0)
    model, data = build().eval(), batches()
    with torch.no_grad():
        for parameter in model.parameters():  # as they are made, rows are nearly zero
            if parameter.dim() > 1:
                parameter.mul_(2.0 if parameter.std() > 0.05 else 6.0)
    before = sum(counted_macs(model, lambda m: m(**data[0])).values())
    report = obc.prune(
        model, batches=data, loss_fn=lambda m, b: m(**b).loss, macs=share, steps=1, progress=False
    ).report
    counted = sum(counted_macs(model, lambda m: m(**data[0])).values()) / before
    assert counted <= share + 1e-6
    assert report.macs_measured == pytest.approx(counted)
    assert report.macs_after / report.macs_before == pytest.approx(counted, abs=1e-4)
    assert f"predicted {counted:.3f}; measured {counted:.3f} on the first batch" in str(report)
    assert not any("MACs" in warning for warning in report.warnings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_unreachable_share_says_what_the_model_executes() -> None:
    with pytest.raises(ValueError, match=r"macs=0\.2 is out of reach: 0\.[2-6][0-9]+ remain"):
        obc.prune(mobilevit(), batches=images(), loss_fn=lambda m, b: m(**b).loss, macs=0.2)


def test_one_multiple_for_all_modules_needs_no_calibration() -> None:
    predicted = {"a": 10.0, "b": 30.0}
    assert calibrate({"a": 70.0, "b": 211.0, "": 1.0}, predicted, []) is None
    assert calibrate({"a": 0.0, "b": 0.0}, predicted, []) is None
    found = calibrate({"a": 70.0, "b": 420.0, "": 50.0}, predicted, [])
    assert found is not None
    assert found.factors == {"a": 7.0, "b": 14.0}
    assert found.constant == {"": 50.0}
