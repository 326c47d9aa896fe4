"""The parameters that recovery trains: the pruned model's own, Equivalent Pruning's folds, or low-rank updates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from obc.model.kept import PlanError
from obc.model.layouts import layout_of
from obc.model.names import named_modules
from obc.model.plan import PruningPlan
from obc.recovery.equivalent_pruning import equivalent_pruning


@dataclass
class Trained:
    """A model ready for training.

    Attributes:
        model: the module to call: the pruned model itself, with low-rank updates inside its layers.
        parameters: the parameters for the optimizer.
        factors: ids of the compressors' and decompressors' parameters, which have no weight decay.
        accumulate: a context in which several backwards add up to one step.
        merge: makes the pruned model a plain one again; call it once.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    factors: frozenset[int]
    accumulate: Callable[[], Any]
    merge: Callable[[], object]


def prepared(model: nn.Module, teacher: nn.Module, train: str, plan: PruningPlan | None, rank: int) -> Trained:
    """``model`` with the parameters for this kind of training.

    Raises:
        ValueError: no plan for folds, or nothing to train.
        ImportError: peft is missing.
    """
    ways = {
        "naive": lambda: _naive(model),
        "folded": lambda: _folded(model, teacher, plan),
        "lora": lambda: _lora(model, rank),
    }
    trained = ways[train]()
    if not trained.parameters:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient; unfreeze some")
    return trained


def _naive(model: nn.Module) -> Trained:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trained(model, parameters, frozenset(), contextlib.nullcontext, lambda: None)


def _folded(model: nn.Module, teacher: nn.Module, plan: PruningPlan | None) -> Trained:
    if plan is None:
        raise ValueError("train='folded' needs plan=, what pruning kept: obc.prune(...).plan or prune_step's")
    try:
        folded = equivalent_pruning(model, teacher.state_dict(), plan)
    except PlanError as error:
        remedy = "a model that was compensated or trained can't be folded: train='naive' or 'lora' can train it"
        raise PlanError(f"{error}; {remedy}") from error
    own, factors = (group["params"] for group in folded.param_groups(lr=1.0, weight_decay=0.0))
    if not factors:
        raise ValueError(
            "train='folded' found nothing to fold: by the plan no layer lost channels; pass the pruned model and its "
            "plan, or train='naive'"
        )
    parameters = [parameter for parameter in (*own, *factors) if parameter.requires_grad]
    return Trained(model, parameters, frozenset(map(id, factors)), folded.accumulate, folded.merge)


def _lora(model: nn.Module, rank: int) -> Trained:
    try:
        import peft
    except ImportError as error:
        raise ImportError("train='lora' needs peft: pip install peft") from error
    layers = [name for name, module in named_modules(model) if name and layout_of(module) is not None]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    targets = [name for name in layers if model.get_submodule(name) is not head]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.device("cpu"):  # peft moves its layers to those of the model, which loses values on a default device
        wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))

    def merge() -> None:
        wrapped.merge_and_unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    # peft changes the model in place. In its wrapper modules have other names, which distillation would not find.
    return Trained(model, parameters, frozenset(map(id, parameters)), contextlib.nullcontext, merge)
