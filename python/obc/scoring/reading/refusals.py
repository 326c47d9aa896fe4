"""Refusals of what would silently make rows wrong, before a row is read or at its end."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from obc.model.layouts import is_compiled
from obc.model.rules import channel_count
from obc.model.sharding import is_in_flat_shards
from obc.scoring.errors import SampleRowsError, ScoringError
from obc.scoring.reading.flat_row import FlatRow
from obc.scoring.reading.gradients import NormGradients
from obc.scoring.reading.module_readers import RowReading
from obc.scoring.reading.reading_plan import Plan


def refuse_unreadable(model: nn.Module) -> None:
    """Refuse a model whose gates would not be seen, whose layers have no weights of their own, or no values yet."""
    if is_in_flat_shards(model):
        raise ScoringError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), whose layers hold pieces of one flat parameter; "
            "score the model before it is wrapped, or shard it by torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    for name, module in model.named_modules():
        if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters(recurse=False)):
            raise ScoringError(f"module {name!r} is not initialised yet; run one batch through the model first")
        if is_compiled(module):
            what = f"module {name!r}" if name else "the model"
            raise ScoringError(
                f"{what} was compiled before attaching, so gates would not be seen; pass the model that torch.compile "
                "was given (compiled._orig_mod), or in a loop of your own attach, then compile"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ScoringError(
                f"module {name!r} is a ScriptModule, whose inside can't be read; score the module it was made of"
            )


def refuse_changed(model: nn.Module, plan: Plan) -> None:
    """Refuse a model whose modules are no longer those of the plan."""
    modules = dict(model.named_modules())
    reads_gradients = bool(plan.sources or plan.norms)  # false for sharded models, which swap their parameters
    known = plan.parameters_read()
    for name, reader in plan.readers.items():
        weight = None if reader.rule.packed else reader.weight
        replaced = reads_gradients and isinstance(weight, nn.Parameter) and id(weight) not in known
        if replaced or modules.get(name) is not reader.module:
            raise ScoringError(f"{name!r} was replaced since this scorer was made; make a new scorer")
        if channel_count(reader.module, reader.rule, reader.rule.out_axis) != reader.out.size:
            raise ScoringError(f"{name!r} changed its width since this scorer was made; make a new scorer")
        if reader.weight.device != reader.out.flat.device:
            where = reader.weight.device
            raise ScoringError(f"{name!r} moved to {where} since this scorer was made; make a new scorer")


def refuse_replaced_gradients(model: nn.Module, flats: Iterable[FlatRow], norms: Iterable[NormGradients]) -> None:
    """Refuse a row whose gradients did not go where they were preset to go."""
    for flat in flats:
        for slot in flat.slots:
            if not slot.is_bound():
                raise ScoringError(
                    f"the gradient of {slot.label!r}'s gate was replaced instead of added to: call backward "
                    "without create_graph=True, and leave the gates' .grad alone"
                )
    for norm in norms:
        if (parameter := norm.unbound()) is not None:
            name = next(name for name, p in model.named_parameters() if p is parameter)
            raise ScoringError(
                f"the gradient of {name!r} was replaced inside a row: call zero_grad() between rows, and backward "
                "without create_graph=True"
            )


def refuse_samples(plan: Plan, reading: RowReading, samples: int | None) -> None:
    """Refuse a row whose samples don't lie along dim 0, or that a module with no per-sample form takes part in.

    Args:
        reading: which kind of row is read, and how many samples its activations have.
        samples: the caller's number of samples, or None.

    Raises:
        ScoringError: the numbers differ.
        SampleRowsError: some modules are read from their weight's gradient, and there are several samples.
    """
    seen = reading.samples
    if not reading.per_sample or seen is None:
        return
    if samples is not None and samples != seen:
        raise ScoringError(
            f"the loss has {samples} samples, but the model's first activation has {seen} entries along dim 0; "
            "sample rows need the samples along dim 0: use rows='batch' with one sample a batch"
        )
    if not reading.checking and seen > 1:
        # A layer that no gradient has reached so far, for example because it is never called, has no row to lose.
        fired = [reader for source in plan.sources if source.gradient.fired for reader in source.readers]
        if names := [reader.name for reader in fired if reader.how == "weight gradient" and reader.scored]:
            raise SampleRowsError.of(names)


def warn_train_mode(model: nn.Module, stacklevel: int) -> None:
    """Warn about the first BatchNorm in train mode."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            warnings.warn(
                f"BatchNorm {name!r} is in train mode: a layer before it scores 0 up to rounding, and samples are "
                "mixed; call model.eval() before scoring",
                stacklevel=stacklevel + 1,
            )
            return


def is_inplace_error(error: BaseException | None) -> bool:
    """Whether autograd found a saved tensor changed in place, or refused an in-place change of a view."""
    if not isinstance(error, RuntimeError):
        return error is not None and is_inplace_error(error.__cause__)
    message = str(error)
    return "modified by an inplace operation" in message or "is being modified inplace" in message
