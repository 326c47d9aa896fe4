"""Distillation inside ``transformers.Trainer``: the loss compares with the unpruned model instead of labels.

>>> class Recovery(DistillationMixin, transformers.Trainer): ...
>>> distillation = obc.Distillation(temperature=2.0)
>>> trainer = Recovery(model=pruned, teacher=original, distillation=distillation, args=arguments, train_dataset=...)
>>> trainer.train()

The Trainer does everything else: data, optimizer, accumulation, checkpoints, several processes, logging. Equivalent
Pruning needs nothing more: call :func:`obc.equivalent_pruning` on the pruned model before, and ``merge()`` after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from obc.model.evaluation import device_of
from obc.recovery.distillation import Distillation


class DistillationMixin:
    """Base class to list before ``transformers.Trainer``, or before a class derived from it.

    Args:
        teacher: the unpruned model; it is put in eval mode and moved to the device of the trained model.
        distillation: what is compared.
    """

    def __init__(self, *args: Any, teacher: nn.Module, distillation: Distillation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()
        self.distillation = distillation or Distillation()
        # The loss is a mean over its batch: the Trainer divides by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation loss; with ``return_outputs`` also the model's outputs, which evaluation needs."""
        self.teacher.to(device_of(model))
        loss = self.distillation.loss(model, self.teacher, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, self.distillation.forward_fn(model, inputs)
