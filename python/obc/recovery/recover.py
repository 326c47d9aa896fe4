"""``obc.recover``: short training of a pruned model against the unpruned one."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from obc.model.arguments import (
    instance,
    iterable_batches,
    listed,
    no_batches,
    number,
    one_of,
    positive,
    refuse_uncallable,
)
from obc.model.autocast import in_present_autocast, without_autocast
from obc.model.batches import refuse_empty
from obc.model.plan import PruningPlan
from obc.model.progress import progress_bar
from obc.model.sharding import is_dtensor, is_sharded
from obc.model.usable import OTHER_MODEL, refuse_non_modules, refuse_one_model, refuse_unusable
from obc.recovery.distillation import Distillation
from obc.recovery.trained import Trained, prepared
from obc.recovery.training_state import load_training, save_training
from obc.scoring.checkpoint import weights_of
from obc.scoring.place import Place

logger = logging.getLogger("obc")

Train = Literal["naive", "folded", "lora"]


@dataclass
class RecoveryReport:
    """The report of training.

    Attributes:
        losses: mean loss of every optimizer step over its batches.
        evaluations: (step, what ``evaluate`` returned).
        trained_parameters: number of trained parameters.
        seconds: total time.
        resumed_at: the step that a checkpoint had reached; 0 for a fresh start.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    trained_parameters: int = 0
    seconds: float = 0.0
    resumed_at: int = 0

    def __str__(self) -> str:
        lines = [f"{len(self.losses)} steps in {self.seconds:.1f} s, {self.trained_parameters:,} parameters trained"]
        if self.losses:
            lines.append(f"loss {self.losses[0]:.4g} at the first step, {self.losses[-1]:.4g} at the last")
        lines += [f"step {step}: {value:.5g}" for step, value in self.evaluations]
        return "\n".join(lines)


def recover(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float,
    train: Train = "naive",
    plan: PruningPlan | None = None,
    distillation: Distillation | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    clip: float | None = 1.0,
    accumulate: int = 1,
    rank: int = 8,
    evaluate: Callable[[nn.Module], float] | None = None,
    every: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> RecoveryReport:
    """Train the pruned ``model`` in place to compute what the unpruned ``teacher`` computes.

    AdamW with a linear warm-up and a cosine decay to 0. The default loss needs no labels: the forward KL divergence of
    the logits (:class:`obc.Distillation`). The model is in train mode and the teacher in eval mode. Both run under the
    autocast that is on. Gradients that the model has before are dropped.

    Args:
        model: the pruned model. With ``train="folded"`` or ``"lora"`` the trained factors are merged at the end, so
            that the model is a plain one again.
        teacher: the unpruned model; unchanged.
        batches: repeated until ``steps`` are done.
        steps: number of optimizer steps.
        lr: the peak learning rate.
        train: "naive" trains every parameter of the pruned model. "folded" also trains the compressors and
            decompressors of Equivalent Pruning (:func:`obc.equivalent_pruning`); it needs ``plan`` and a model that was
            pruned but not compensated. "lora" trains low-rank updates of linear and convolutional layers (needs peft).
        plan: what pruning kept, for ``train="folded"``.
        distillation: the losses to use.
        weight_decay: weight decay of AdamW; biases, norms and compressors have none.
        warmup: the share of the steps during which the learning rate rises.
        clip: the largest gradient norm; None does not clip.
        accumulate: batches per optimizer step. Folds are computed once per step, exactly.
        rank: rank of "lora".
        evaluate: ``evaluate(model)`` returns a number; called before the first step, every ``every`` steps and after
            the last, in eval mode and without gradients.
        every: steps between evaluations and checkpoints; None evaluates and saves at the end only.
        checkpoint: a file from which a run of the same models with the same arguments and batches resumes, and another
            is refused; replaced during training. A loader may shuffle by torch's generators, which are restored.
        progress: show a progress bar; None shows it in a terminal only.

    Raises:
        ValueError: an argument has a wrong value, ``checkpoint`` is given for a sharded model, the teacher shares
            parameters with the model, ``batches`` is empty, or the loss or its gradient is not finite; then the message
            names the step, and the model keeps the parameters before that step.
        PlanError: the plan does not describe how ``model`` came from ``teacher`` (``train="folded"``).
        ImportError: peft is missing (``train="lora"``).
    """
    refuse_unusable(model)
    refuse_non_modules(teacher, "the teacher")
    _check_teacher(model, teacher)
    one_of("train", train, get_args(Train))
    if checkpoint is not None and (is_sharded(model) or is_sharded(teacher)):
        raise ValueError(
            "checkpoint= needs whole parameters, and those of the model or the teacher are split over several "
            "processes; leave it out, and save the model after shorter runs"
        )
    _check(steps, lr, accumulate, warmup, every, weight_decay, clip)
    refuse_uncallable(evaluate=evaluate)
    instance("distillation", distillation, (Distillation, type(None)), "an obc.Distillation")
    iterable_batches(batches)
    started = time.perf_counter()
    distillation = distillation or Distillation()
    report, place = RecoveryReport(), Place(ValueError, checkpoint is not None)
    flags = {module: module.training for part in (model, teacher) for module in part.modules()}
    options = {"steps": steps, "lr": lr, "train": train, "weight_decay": weight_decay, "warmup": warmup, "clip": clip}
    options |= {"accumulate": accumulate, "rank": rank if train == "lora" else None}
    identity = {} if checkpoint is None else _identity(model, teacher, distillation, options)
    trained = prepared(model, teacher, train, plan, rank)
    _warn_of_short_floats(trained)
    # Inside the caller's autocast torch would keep the first step's casts of weights, so each run has one of its own.
    evaluate, loss_of = in_present_autocast(evaluate), in_present_autocast(distillation.loss)
    try:
        job = _Training(trained, teacher, loss_of, steps, lr, weight_decay, warmup, clip, report)
        if checkpoint is not None:
            report.resumed_at = load_training(checkpoint, trained.model, job.optimizer, report, identity, place)
        teacher.eval()
        source = _endless(batches, place)
        bar = progress_bar(progress, range(report.resumed_at, steps), desc="obc.recover")
        with without_autocast(), torch.enable_grad():
            for step in bar:
                if step == 0:
                    job.evaluate(0, evaluate)
                job.step([next(source) for _ in range(accumulate)], step)
                due = step + 1 == steps or (every is not None and (step + 1) % every == 0)
                if due:
                    logger.info("obc.recover: step %d of %d: loss %.4g", step + 1, steps, report.losses[-1])
                    job.evaluate(step + 1, evaluate)
                if due and checkpoint is not None:
                    save_training(checkpoint, step + 1, trained.model, job.optimizer, report, identity, place)
    finally:
        with without_autocast():
            trained.merge()
        for module, flag in flags.items():
            module.training = flag
        report.seconds = time.perf_counter() - started
    return report


@dataclass
class _Training:
    """One optimizer with its schedule, and the work of a step."""

    trained: Trained
    teacher: nn.Module
    loss_of: Callable[[nn.Module, nn.Module, Any], Tensor]
    steps: int
    lr: float
    weight_decay: float
    warmup: float
    clip: float | None
    report: RecoveryReport

    def __post_init__(self) -> None:
        self.report.trained_parameters = sum(parameter.numel() for parameter in self.trained.parameters)
        self.optimizer = torch.optim.AdamW(_groups(self.trained, self.weight_decay), lr=self.lr)
        self.optimizer.zero_grad()  # of the caller's backwards
        self.schedule = _cosine(self.steps, self.warmup)

    def step(self, batches: Sequence[Any], number: int) -> None:
        """One optimizer step on the mean of the batches' losses."""
        self.trained.model.train()
        total = 0.0
        with self.trained.accumulate():
            for batch in batches:
                loss = self.loss_of(self.trained.model, self.teacher, batch) / len(batches)
                total += _finite(loss, number)
                loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.parameters, math.inf if self.clip is None else self.clip)
        if not bool(norm.isfinite()):
            raise ValueError(
                f"the loss is finite at step {number}, and its gradient is not; the model keeps the parameters of the "
                "step before: look for roots, logarithms and quotients of zero in the loss and the model, or train in "
                "float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.report.losses.append(total)

    def evaluate(self, step: int, evaluate: Callable[[nn.Module], float] | None) -> None:
        """Evaluate the present model and record the result."""
        if evaluate is None:
            return
        self.trained.model.eval()
        with torch.no_grad():
            value = float(evaluate(self.trained.model))
        self.report.evaluations.append((step, value))
        logger.info("obc.recover: step %d: %.5g", step, value)


def _check(
    steps: int, lr: float, accumulate: int, warmup: float, every: int | None, weight_decay: float, clip: float | None
) -> None:
    for name, value in (("steps", steps), ("accumulate", accumulate), ("every", 1 if every is None else every)):
        positive(name, value)
    number("lr", lr, finite=True)
    number("warmup", warmup)
    number("weight_decay", weight_decay, finite=True)
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if clip is not None:
        number("clip", clip)
        if not clip > 0:
            raise ValueError(f"clip is the largest gradient norm, above 0, got {clip}; None does not clip")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is a share of the steps, in [0, 1), got {warmup}")


def _identity(
    model: nn.Module, teacher: nn.Module, distillation: Distillation, options: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same when a run resumes, as plain values."""
    losses = {key: value for key, value in vars(distillation).items() if not callable(value)}
    weights: dict[str, Any] = {"weights": weights_of(model), "the teacher's weights": weights_of(teacher)}
    plain: dict[str, Any] = json.loads(json.dumps(weights | options | losses, default=float))
    return plain


def _check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that changes with the model, and warn of one that is its copy, or smaller."""
    refuse_one_model(model, teacher, "the model", "the teacher")
    theirs = {id(parameter) for parameter in teacher.parameters()}
    if shared := [name for name, one in model.named_parameters() if one.requires_grad and id(one) in theirs]:
        raise ValueError(
            f"training would change the teacher, which shares parameters with the model: {listed(shared)}; "
            f"{OTHER_MODEL}, or freeze them"
        )
    own, theirs_now = model.state_dict(), teacher.state_dict()
    if own.keys() == theirs_now.keys() and all(_equal(own[name], theirs_now[name]) for name in own):
        warnings.warn(
            f"the teacher has the same weights as the model, which has nothing to learn from it; {OTHER_MODEL}",
            stacklevel=3,
        )
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, teacher)]
    if sizes[0] > sizes[1]:
        warnings.warn(
            f"the model has {sizes[0]:,} parameters, more than the teacher's {sizes[1]:,}; if they are in the wrong "
            "order, call obc.recover(pruned, unpruned, ...)",
            stacklevel=3,
        )


def _equal(one: Any, other: Any) -> bool:
    """Whether both are equal tensors; a state dict may hold other things as well."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return True
    if is_dtensor(one) != is_dtensor(other):
        return False  # of one the process has a part, of the other all
    if is_dtensor(one):
        one, other = one.to_local(), other.to_local()  # type: ignore[attr-defined]
    return one.shape == other.shape and torch.equal(one, other.to(one))


def _warn_of_short_floats(trained: Trained) -> None:
    short = {str(p.dtype).removeprefix("torch.") for p in trained.parameters if p.element_size() < 4}
    if short:
        warnings.warn(
            f"what trains is {' and '.join(sorted(short))}: updates smaller than its rounding are lost; train a "
            "float32 model and convert it afterwards",
            stacklevel=3,
        )


def _groups(trained: Trained, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [p for p in trained.parameters if p.dim() > 1 and id(p) not in trained.factors]
    others = [p for p in trained.parameters if p.dim() <= 1 or id(p) in trained.factors]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _cosine(steps: int, warmup: float) -> Callable[[int], float]:
    rising = round(steps * warmup)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def _endless(batches: Iterable[Any], place: Place) -> Iterator[Any]:
    """Repeat the batches endlessly, from the place on."""
    if isinstance(batches, Iterator):
        batches = list(batches)
    while True:
        for batch in place.left(batches):
            refuse_empty(place.done - 1, batch)
            yield batch
        if place.done == 0:
            raise ValueError(no_batches("train on"))
        place.ended()


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(
            f"the loss is {value} at step {step}; the model keeps the parameters of the step before: use a lower lr, "
            "or look for bad values in this step's batches"
        )
    return value
