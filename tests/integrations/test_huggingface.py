"""Distillation inside transformers.Trainer: its loss is ours, and training goes where it should."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import obc
from obc.integrations.huggingface import DistillationMixin
from obc.structures.transformers import TransformersStructure


class Recovery(DistillationMixin, transformers.Trainer):
    """The Trainer with distillation."""


def models() -> tuple[Any, Any, obc.PruningPlan]:
    """(pruned, unpruned, plan) of a tiny Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, use_cache=False,
    )  # fmt: skip
    teacher = transformers.LlamaForCausalLM(config).eval()
    pruned = copy.deepcopy(teacher)
    structure = TransformersStructure(pruned)
    structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    return pruned, teacher, structure.plan


DATA = [{"input_ids": torch.randint(0, 23, (12,), generator=torch.Generator().manual_seed(seed))} for seed in range(16)]


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_brings_the_pruned_model_closer(folded: bool, accumulate: int, tmp_path: Path) -> None:
    pruned, teacher, plan = models()
    equivalent = obc.equivalent_pruning(pruned, teacher.state_dict(), plan) if folded else None
    batch = {"input_ids": torch.stack([entry["input_ids"] for entry in DATA])}
    before = obc.Distillation().loss(pruned, teacher, batch).item()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, learning_rate=0.01, per_device_train_batch_size=4, report_to=[],
        gradient_accumulation_steps=accumulate, use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Recovery(model=pruned, teacher=teacher, args=arguments, train_dataset=DATA)
    logged = trainer.train().training_loss
    assert logged < before
    if equivalent is not None:
        equivalent.merge()
    pruned.eval()
    assert obc.Distillation().loss(pruned, teacher, batch).item() < 0.7 * before


def test_accumulated_batches_count_once(tmp_path: Path) -> None:
    """Two batches a step give the loss of their mean, not of their sum."""
    pruned, teacher, _ = models()
    losses = []
    for accumulate in (1, 4):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, learning_rate=0.0, per_device_train_batch_size=16 // accumulate,
            gradient_accumulation_steps=accumulate, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Recovery(model=copy.deepcopy(pruned), teacher=teacher, args=arguments, train_dataset=DATA)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
