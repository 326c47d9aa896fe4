"""Distil a pruned language model on several processes with accelerate: Equivalent Pruning, accumulation, merging.

torchrun --nproc-per-node 2 examples/recover_on_two_processes.py
"""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import obc
from obc.structures.transformers import TransformersStructure


def main() -> None:
    """Prune half of the feed-forward channels, train for two epochs, print the loss before and after."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)  # the same model and the same choice on every process
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, use_cache=False,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (64, 24))
    pruned = copy.deepcopy(teacher)
    structure = TransformersStructure(pruned, kinds=("ffn",))
    batches = [{"input_ids": part} for part in tokens.split(4)]
    plan = obc.prune(pruned, batches=batches, labels=False, structure=structure, blocks=0.5, steps=1).plan

    folded = obc.equivalent_pruning(pruned, teacher.state_dict(), plan)
    distillation = obc.Distillation(temperature=2.0)
    optimizer = torch.optim.AdamW(folded.param_groups(lr=3e-3, weight_decay=0.0))
    loader = DataLoader([{"input_ids": row} for row in tokens], batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(pruned, optimizer, loader)  # each process has its share of the data
    before = distillation.loss(pruned, teacher, {"input_ids": tokens}).item()
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(distillation.loss(model, teacher, batch))
                optimizer.step()
                optimizer.zero_grad()
    folded.merge()  # a plain model again, the same on every process
    after = distillation.loss(pruned, teacher, {"input_ids": tokens}).item()
    everyone = accelerator.gather(torch.tensor([after]))
    accelerator.print(f"divergence {before:.3f} -> {after:.3f} on {accelerator.num_processes} processes")
    accelerator.print("the same on every process:", bool((everyone == everyone[0]).all()))
    # The model in its wrapper goes before the process group: destroying both at once can wait for ever (torch 2.13).
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
