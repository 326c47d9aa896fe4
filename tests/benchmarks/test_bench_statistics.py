"""The benchmark of many statistics: every provider of a case computes what its check expects."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

import torch
from transformers import ViTConfig, ViTForImageClassification

from benchmarks import bench_statistics
from benchmarks.bench_statistics import TOGETHER, Subject, class_losses, one_run


def tiny_vit() -> Subject:
    """Of the shape of the benchmark's ViT-S, which takes ten seconds."""
    sizes = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes)
    batch = torch.randn(2, 3, 32, 32), torch.randint(10, (2,))
    return Subject(ViTForImageClassification(config).eval(), [batch], class_losses)


def test_every_way_gives_the_same_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_statistics.MODELS, "ViT-S", tiny_vit)
    case = one_run("ViT-S", batches=1)
    for provider in case.providers:
        result = provider.call()
        if provider.name not in case.unchecked:
            case.check(result)
    together = next(provider.call() for provider in case.providers if provider.name == TOGETHER)
    assert set(together.collected) == {"rows", "gram", "moments", "blocks"}
    together.gram["classifier"].total.mul_(1.01)
    with pytest.raises(AssertionError, match="relative error"):
        case.check(together)
