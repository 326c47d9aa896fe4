"""Distillation losses: the distance of a pruned model's logits and hidden states from the unpruned one's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.model.arguments import number, refuse_uncallable, several
from obc.model.batches import attention_mask
from obc.model.evaluation import ForwardFn, call_on_batch
from obc.model.hooks import hooked
from obc.model.usable import refuse_non_modules


def logit_distillation(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Forward Kullback-Leibler divergence of the two predictions, averaged over positions.

        T^2 · mean over positions of sum over classes of p (log p - log q)

    with p = softmax(teacher / T) and q = softmax(student / T).

    The factor T^2 keeps the gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531).

    Args:
        student: (..., classes) logits of any floating dtype; computed in float32.
        teacher: the same shape; no gradient flows into it.
        temperature: T, positive.
        mask: (...) of bool or 0 and 1: the positions that count; None counts all.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: the shapes differ, the temperature is not positive, or the mask has another shape or selects
            nothing.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    log_p = F.log_softmax(teacher.detach().float() / temperature, -1)
    log_q = F.log_softmax(student.float() / temperature, -1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * _mean(divergence, mask)


def hidden_distillation(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Relative squared error of a hidden state: sum of (student - teacher)^2 / sum of teacher^2 over the positions.

    Args:
        student: (..., width); computed in float32.
        teacher: the same shape; no gradient flows into it.
        mask: (...) the positions that count; None counts all.

    Raises:
        ValueError: the shapes differ, or the mask has another shape or selects nothing.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"hidden states must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "choose modules whose outputs kept their width"
        )
    wanted = teacher.detach().float()
    error = _mean((student.float() - wanted).square().sum(-1), mask)
    energy = _mean(wanted.square().sum(-1), mask)
    return error / energy.clamp_min(torch.finfo(torch.float32).tiny)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise ValueError(
            f"the mask must have the shape {tuple(values.shape)} of the positions, got {tuple(mask.shape)}"
        )
    kept = mask.to(values.dtype)
    count = kept.sum()
    if not bool(count > 0):
        raise ValueError("the mask leaves no position; leave such batches out")
    return (values * kept).sum() / count


@dataclass(frozen=True)
class Distillation:
    """A weighted sum of losses of a pruned model against the unpruned one.

    Attributes:
        logits: weight of :func:`logit_distillation`.
        temperature: temperature of the logits.
        hidden: weight of :func:`hidden_distillation`, averaged over ``modules``.
        modules: names of modules, the same in both models, whose outputs are compared.
        outputs: weight of :func:`hidden_distillation` of the models' own outputs, for models without a head, whose
            outputs are not logits.
        labels: weight of ``label_loss``.
        label_loss: ``label_loss(outputs, batch)`` returns a scalar, such as cross-entropy with the batch's labels.
        forward_fn: ``forward_fn(model, batch)`` returns the model's outputs; by default
            :func:`obc.model.evaluation.call_on_batch`.
        logits_of: takes the logits out of the outputs; by default ``outputs.logits``, else the first tensor of a tuple,
            else the outputs. With the weight ``outputs`` it selects what is compared.
    """

    logits: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    modules: Sequence[str] = ()
    outputs: float = 0.0
    labels: float = 0.0
    label_loss: Callable[[Any, Any], Tensor] | None = None
    forward_fn: ForwardFn = call_on_batch
    logits_of: Callable[[Any], Tensor] | None = field(default=None)

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("logits", "hidden", "outputs", "labels")}
        for name, value in (*weights.items(), ("temperature", self.temperature)):
            number(name, value, finite=True)
        refuse_uncallable(label_loss=self.label_loss, forward_fn=self.forward_fn, logits_of=self.logits_of)
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            said = ", ".join(f"{name}={weight}" for name, weight in weights.items())
            raise ValueError(f"weights must not be negative, and one must be positive: {said}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        several("modules", self.modules)
        if (self.hidden > 0) != bool(self.modules):
            raise ValueError(f"hidden={self.hidden} and modules={tuple(self.modules)!r} need each other")
        if (self.labels > 0) != (self.label_loss is not None):
            raise ValueError(f"labels={self.labels} and label_loss={self.label_loss!r} need each other")

    def loss(self, student: nn.Module, teacher: nn.Module, batch: Any) -> Tensor:
        """The weighted sum of the losses on one batch, () and differentiable; only the student, not the teacher, gets
        gradients.

        Raises:
            ValueError: a module is missing, or two outputs can't be compared.
        """
        refuse_non_modules(student, "the student")
        refuse_non_modules(teacher, "the teacher")
        with torch.no_grad(), _outputs(teacher, self.modules) as wanted:
            compared = self.logits + self.hidden + self.outputs > 0
            teacher_outputs = self.forward_fn(teacher, batch) if compared else None
        with _outputs(student, self.modules) as got:
            outputs = self.forward_fn(student, batch)
        mask = attention_mask(batch)
        terms = []
        if self.logits > 0:
            pair = (self._logits(outputs), self._logits(teacher_outputs))
            terms.append(self.logits * logit_distillation(*pair, self.temperature, _fitting(mask, pair[0])))
        if self.outputs > 0:
            pair = (self._logits(outputs), self._logits(teacher_outputs))
            terms.append(self.outputs * hidden_distillation(*pair, _fitting(mask, pair[0])))
        if self.hidden > 0:
            errors = [hidden_distillation(got[name], wanted[name], _fitting(mask, got[name])) for name in self.modules]
            terms.append(self.hidden * torch.stack(errors).mean())
        if self.label_loss is not None:
            terms.append(self.labels * self.label_loss(outputs, batch))
        return torch.stack(terms).sum()

    def _logits(self, outputs: Any) -> Tensor:
        if self.logits_of is not None:
            return self.logits_of(outputs)
        found = getattr(outputs, "logits", None)
        if found is None and isinstance(outputs, Mapping):
            found = outputs.get("logits")
        if found is None:
            found = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        if not isinstance(found, Tensor):
            raise ValueError(
                f"can't find logits in an output of type {type(outputs).__name__}; pass Distillation(logits_of=...)"
            )
        return found


@contextlib.contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules by name, filled while the model runs inside the block."""
    known = dict(model.named_modules())
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"{type(model).__name__} has no module {missing[0]!r}; change Distillation(modules=...)")
    seen: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, (tuple, list)) else output

    with hooked([known[name].register_forward_hook(partial(record, name)) for name in names]):
        yield seen
    if unseen := [name for name in names if name not in seen]:
        raise ValueError(f"the forward pass did not call {unseen[0]!r}; leave it out of Distillation(modules=...)")


def _fitting(mask: Tensor | None, values: Tensor) -> Tensor | None:
    """The attention mask, if the values have one position for each of its entries."""
    return mask if mask is not None and mask.shape == values.shape[:-1] else None
