"""JBR: the Jacobian Criterion with the unpruned model's own predictions as labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.criteria.masked_model import output_tensor
from obc.criteria.protocol import About, MeasuredRows
from obc.criteria.rows import read_rows
from obc.criteria.subject import Subject
from obc.model.batches import attention_mask
from obc.model.evaluation import ForwardFn, evaluating
from obc.model.usable_batches import UsableBatches


class JBR(MeasuredRows):
    """S_u = sum over n of (sum over consumers of r_m,u[n])^2 with L_n = CE(f(x_n), argmax f_0(x_n)).

    f is the present model. f_0 is the model that was scored first with these batches, which during one ``obc.prune`` is
    the unpruned one. Classes lie along dim 1 of images (B, C, H, W), otherwise along the last dim; positions masked by
    ``attention_mask`` don't count. No labels are used.
    """

    name = "jbr"
    reads_parameters = True
    about = About(
        "JBR",
        "no publication was confirmed",
        "sum over rows n of (sum over consumers of w . dL_n/dw)^2, L_n on the unpruned model's predictions",
        "gradients",
        kinds="all that have rows",
    )

    def __init__(self) -> None:
        self._labels: WeakKeyDictionary[UsableBatches, dict[int, Tensor]] = WeakKeyDictionary()

    def measure_rows(self, subject: Subject) -> dict[str, Tensor]:
        """(N, units) per group: the gate's rows of the loss against the first model's predictions."""
        subject = replace(subject, batches=UsableBatches.of(subject.batches))
        if subject.batches not in self._labels:
            self._labels[subject.batches] = predictions(subject)
        loss = PseudoLabelLoss(self._labels[subject.batches], subject)
        rows = read_rows(replace(subject, loss_fn=loss)).rows
        found = {group.name: group.gate_rows(rows) for group in subject.groups}
        return {name: values for name, values in found.items() if values is not None}


def predictions(subject: Subject) -> dict[int, Tensor]:
    """Number of a batch -> the most likely class of every sample or position, according to the model."""
    found = {}
    with evaluating(subject.model), torch.no_grad():
        for number, batch in subject.batches.numbered():
            logits = output_tensor(subject.forward_fn(subject.model, batch))
            found[number] = logits.argmax(class_dim(logits)).cpu()
    return found


def class_dim(logits: Tensor) -> int:
    """The dimension of the classes: 1 for images (B, C, H, W), else the last."""
    return 1 if logits.dim() >= 4 else logits.dim() - 1


class PseudoLabelLoss:
    """``loss(model, batch)``: cross entropy with labels found before, for one batch after another."""

    def __init__(self, labels: Mapping[int, Tensor], subject: Subject) -> None:
        self._labels, self._batches, self._rows = labels, subject.batches, subject.rows
        self._forward: ForwardFn = subject.forward_fn
        self._sample = 0

    def seek(self, row: int, sample: int = 0) -> None:
        """The next call belongs to the same batch, from ``sample`` on."""
        self._sample = sample

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits = output_tensor(self._forward(model, batch))
        labels = self._labels[self._batches.current][self._sample : self._sample + len(logits)].to(logits.device)
        self._sample += len(logits)
        losses = F.cross_entropy(logits.movedim(class_dim(logits), 1), labels, reduction="none")
        mask = attention_mask(batch)
        counted = torch.ones_like(losses)
        if mask is not None and mask.shape == losses.shape:
            counted = mask.to(losses)
        sums = (losses * counted).reshape(len(losses), -1).sum(1)
        if self._rows == "sample":
            return sums / counted.reshape(len(losses), -1).sum(1).clamp_min(1)
        return sums.sum() / counted.sum().clamp_min(1)
