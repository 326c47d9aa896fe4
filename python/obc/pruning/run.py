"""``obc.prune``: prunes a trained model to a budget of MACs, parameters, memory or time in one call."""

from __future__ import annotations

import contextlib
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.criteria import Subject
from obc.model.arguments import instance, one_of, refuse_uncallable
from obc.model.autocast import in_present_autocast, without_autocast
from obc.model.batches import RowKind, parts_of
from obc.model.errors import PruningError, add_note
from obc.model.evaluation import ForwardFn, LossFn, Run
from obc.model.groups import Slices
from obc.model.latency_table import LatencyTable
from obc.model.names import joined, named_tensors
from obc.model.plan import PruningPlan
from obc.model.refusals import refuse_unprunable
from obc.model.usable import refuse_unusable
from obc.model.usable_batches import UsableBatches
from obc.pruning.arguments import Choice, Compensation, Options, chosen_compensation, repeatable
from obc.pruning.budgets import DEFAULT_STEPS, Argument, Budget, Meters
from obc.pruning.final_proof import FinalProof, first_finite, prove_groups
from obc.pruning.functions import Functions
from obc.pruning.job import Job
from obc.pruning.measured import MeasuredMacs, MeasuredSpeed
from obc.pruning.report import PruningReport, PruningResult, provenance, timed
from obc.pruning.snapshot import Snapshot
from obc.pruning.trial import better_criterion
from obc.selection.caps import Caps
from obc.selection.choice import Selection
from obc.structures.memory import MemoryUse
from obc.structures.protocol import Structure


def prune(
    model: nn.Module,
    example_inputs: Any = None,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | ForwardFn | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    blocks: float | None = None,
    active_params: float | None = None,
    memory: float | None = None,
    latency: float | None = None,
    memory_use: MemoryUse | None = None,
    latency_table: LatencyTable | str | os.PathLike[str] | None = None,
    criterion: str | Any | None = None,
    allocation: str | Any | None = None,
    selection: Selection | None = None,
    steps: int | Sequence[float] = DEFAULT_STEPS,
    slices: Slices = "gate",
    per_macs: bool | None = None,
    recalibrate: bool = True,
    labels: bool = True,
    compensate: Compensation | bool | None = None,
    compensate_every_step: bool | None = None,
    rows: RowKind = "batch",
    micro_batch: int | None = None,
    ignored_layers: Sequence[nn.Module | str] = (),
    num_heads: Mapping[nn.Module | str, int] | None = None,
    round_to: int | None = None,
    min_units: int = 1,
    max_pruning_ratio: float | Mapping[str, float] = 1.0,
    protected_blocks: int | tuple[int, int] = 0,
    shrinkage: float | None = None,
    forward_fn: ForwardFn | None = None,
    structure: Structure | None = None,
    seed: int = 0,
    verify: bool = True,
    measure: bool = False,
    on_step: Callable[[PruningResult], None] | None = None,
    progress: bool | None = None,
) -> PruningResult:
    """Prune ``model`` in place until a share of its multiply-accumulates, or parameters, remains; returns a plan too.

    In every step the criterion scores the present model, ``obc.select`` chooses what to remove, and BatchNorm
    statistics are re-estimated. After step t of T at most share^(t/T) remains, so each step removes the same share of
    what is left. After an exception the model is as before the call; for this the unpruned weights are kept in memory.

    By default *sets* of channels are chosen (``selection="joint"``). If the channels g of a set are removed, the loss
    of row n changes to first order by sum_g r_g[n]; the set with the smallest sum of squares over the rows is removed.
    ``selection="independent", slices="all", per_macs=False, recalibrate=False`` is the paper's protocol, one global
    ranking of single channels (arXiv 2508.05521).

    Args:
        model: any model (with ``example_inputs``), one of the transformers library, or that of ``structure``.
        example_inputs: what the model is called with: a tensor, a tuple or list of arguments, or a dict of keywords;
            unused with ``structure``. Without it the model must be one of the transformers library, and is pruned by
            its blocks without tracing (:class:`obc.structures.transformers.TransformersStructure`).
        batches: what ``loss_fn`` takes, about 1000 samples; two passes per step. Each batch is one row, and joint
            selection wants as many rows as there are units. A list is made of them, so that every pass sees the same
            ones even if a data loader shuffles. If something about a batch is not finite, such as its row or a
            BatchNorm statistic, the batch is left out of everything from then on, and named.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar loss, or with ``rows="sample"`` the vector of per-sample
            losses. With ``labels=False`` it may be None, or is used as ``forward_fn``.
        macs: the share of MACs that remains, in (0, 1]; 0.5 if no budget is given.
        params: instead of ``macs``, the share of parameters that remains.
        blocks: instead, the share that remains of the prunable parameters: those whose number depends on a group's
            width, without embeddings, heads, and layers left out.
        active_params: instead, the share that remains of the parameters used by one token: only as many of a mixture's
            experts count as a token is routed to. For models of the transformers library.
        memory: instead, the share that remains of the bytes of weights, buffers and the key/value cache; above 1 a
            number of bytes.
        latency: instead, the share that remains of the forward pass's seconds, as summed from ``latency_table``.
        memory_use: the length, batch size and dtype of the cache that ``memory`` and the report count; by default only
            the weights count (:class:`obc.MemoryUse`).
        latency_table: seconds of every group by width (:class:`obc.LatencyTable`), or the path of a saved table. If it
            is missing, ``latency`` measures one on the first batch before anything is removed
            (:func:`obc.measure_latency`). With another budget it is used for the report only.
        criterion: "jacobian" or another name in ``obc.criteria.available()`` (docs/criteria.md); an object with
            ``needs`` and ``score(group, statistics, model)``; or such a function. None: "jacobian"; if 1x1 convolutions
            read a whole group, ``compensate`` is "correct", "ls" or "seq", and ``allocation``, ``selection``,
            ``slices`` and ``shrinkage`` are left out, "kfac_obs" if that leaves a smaller error after compensation
            (:mod:`obc.pruning.trial`); ``report.provenance`` says which.
        allocation: how much each group loses: "global" (all units compete), "uniform" (equal shares), "equal" (equal
            widths of groups of one kind), "profile" (blocks that change their input more keep more), "log_profile"
            (later blocks lose more), "two_classes" (attention is ranked separately), "search" (by the output's loss,
            :class:`obc.selection.search.Search`), "window" and "tail" (consecutive whole blocks,
            :mod:`obc.selection.depth_allocations`), a mapping of names to strengths, or an object of
            :mod:`obc.selection.allocation`. None: as the criterion was published, otherwise "global".
        selection: "joint" chooses sets of units by their rows, which "jacobian", "compensated_jacobian",
            "token_jacobian" and "jbr" have; "independent" ranks single units by their scores. None: joint if the
            criterion has rows and ``slices`` is "gate".
        steps: how often to score and remove, at most once a unit; or the shares to reach, descending to the budget's.
        slices: "gate": one row per unit, for all its consumers together. "all": every slice is squared separately, as
            in the paper; for independent selection.
        per_macs: divide what a unit costs the loss by what its removal frees of the budgeted quantity. None: yes,
            unless the criterion's scores are standardised or ranks.
        recalibrate: after every step give BatchNorms the statistics with which they return the same means and variances
            as in the unpruned model, on the same batches (:func:`obc.recalibrate_norms`).
        labels: False scores without labels: rows are gradients of random projections of the model's outputs.
        compensate: consumers take over by least squares what the dropped channels carried (:func:`obc.compensate`):
            "correct" or True, which also repairs the errors of layers before them; "ls"; "seq". "mean": biases take
            over the average of the dropped channels (:func:`obc.recovery.mean_bias.absorb_means`). "fusion": removed
            units are fused into remaining ones without data (:func:`obc.recovery.fusion.fuse_units`; needs scipy).
            Needs a copy of the unpruned model meanwhile.
        compensate_every_step: with "correct", "ls" or "seq", compensate after every step: the next step scores the
            compensated model, ``on_step`` gets it, and each compensation restarts from the unpruned model's weights.
            This costs a compensation per step. False: one, after the last step. None: every step for "correct".
        rows: "batch" or "sample": what one row is.
        micro_batch: the Jacobian Criterion runs batches in parts of at most this many samples (:func:`obc.score`).
        ignored_layers: layers, or names of layers, whose outputs keep their widths.
        num_heads: query, key and value projections, or their names -> number of heads; heads are removed whole.
        round_to: widths, in units, become multiples of it; a ``structure`` may exempt groups of heads and experts.
        min_units: the number of units that every group keeps at least.
        max_pruning_ratio: the largest share of its units that any group loses, over all steps; or by name of a group or
            block, such as "model.layers.0".
        protected_blocks: the number of blocks at the start and at the end that lose nothing, or a pair of numbers.
        shrinkage: shrinkage of interactions in joint selection; None chooses it from the numbers of rows and units.
        forward_fn: ``forward_fn(model, batch)`` returns the outputs to preserve, for recalibration, compensation and
            label-free rows. By default they are what ``model`` returns inside ``loss_fn``, or without a ``loss_fn`` on
            the batch (:func:`obc.model.evaluation.call_on_batch`).
        structure: the groups, in place of those that Torch-Pruning finds.
        seed: seed of the criterion "random" and of label-free rows.
        verify: compare the pruned model, before compensation, with the unpruned one with masked channels, on the first
            batch, and run it once in train mode. Takes five forward passes.
        measure: time a forward pass of the unpruned and the pruned model on the first batch (``report.speed``).
        on_step: called after every step with the result so far, for example to evaluate or copy the model.
        progress: show a progress bar; None shows it in a terminal only.

    Raises:
        ValueError: an argument has a wrong value, no layer can be pruned, ``batches`` is empty, more than a tenth of
            them are not finite, or the share can't be reached; the message says which share can.
        PruningError: the model does not run or can't be copied, or neither tracing nor running it finds groups; the
            original error is its cause.
        PlanError: the model can't be pruned as it is: compiled, wrapped, with adapters or with computed weights.
        ProofError: the pruned model does not compute what the masked one computes; the message names the first layer
            that differs.
    """
    refuse_uncallable(on_step=on_step)
    instance("seed", seed, numbers.Integral, "an integer")
    one_of("per_macs", per_macs, (None, True, False))
    given: dict[Argument, float | None] = {"macs": macs, "params": params, "blocks": blocks}
    given |= {"active_params": active_params, "memory": memory, "latency": latency}
    budget = Budget.of(given, Meters.of(memory_use, latency_table))
    count = budget.count_steps(steps)
    caps = Caps.of(max_pruning_ratio, protected_blocks)
    choice = Choice.of(criterion, allocation, selection, slices, per_macs, shrinkage, min_units, round_to, caps)
    compensate, compensate_every_step = chosen_compensation(compensate, compensate_every_step)
    usable = UsableBatches(repeatable(batches))
    _check_model(model, structure)
    functions, generator = Functions.of(loss_fn, forward_fn, labels, rows, seed), torch.Generator().manual_seed(seed)
    loss, forward = functions.loss, functions.forward
    subject = Subject(model, (), usable, loss, forward, choice.slices, rows, generator, micro_batch)
    on_step = in_present_autocast(on_step)
    options = Options(steps, recalibrate, compensate, compensate_every_step, verify, measure, on_step, progress)
    said = {"budget": budget.said, **choice.said(allocation), "steps": count, **options.said()}
    said |= {"rows": rows, "labels": labels, "seed": seed}
    report = PruningReport(provenance=provenance(model, said))
    with without_autocast(), _restored_on_error(model, report, budget, count) as unpruned:
        with timed(report, "structure"):
            if structure is None:
                others = (functions.run_on(part) for batch in usable for part, _, _ in parts_of(batch, micro_batch))
                structure = _structure(model, example_inputs, ignored_layers, num_heads, functions.example, others)
            run = functions.run_on(first_finite(usable))
            prove_groups(structure, run, report)
        return _prune(structure, subject, run, report, budget, choice, options, unpruned)


def _prune(
    structure: Structure,
    subject: Subject,
    run: Run,
    report: PruningReport,
    budget: Budget,
    choice: Choice,
    options: Options,
    unpruned: Snapshot,
) -> PruningResult:
    """Prune the structure's model in steps, prove the result on the first batch, compensate and measure it.

    Args:
        run: runs a model on the first batch.
        unpruned: the unpruned model's tensors.
    """
    model = subject.model
    with timed(report, "structure"):
        final_proof = FinalProof(structure, run) if options.verify else None
    with timed(report, "latency"):
        budget = budget.ready(structure, run, choice.round_to)
    choice = better_criterion(choice, structure, subject, budget, options, report)
    counted = MeasuredMacs(structure, run, report)
    speed = MeasuredSpeed(model, run, report) if options.measure else None
    job = Job(structure, subject, report, budget, choice, options, final_proof)
    job.run()
    with timed(report, "verify"), job.compensator.undone():
        _verify(structure.plan, unpruned.tensors(), model, options.recalibrate)
        if final_proof is not None:
            final_proof.check(model, report)
            final_proof.check_train_mode(model, report)
            final_proof.check_buffers(model, unpruned.tensors(), report)
    counted.finish(model)
    job.finish(run)
    if speed is not None:
        speed.finish(model)
    return PruningResult(model, structure.plan, report, budget.meters.table)


# --- arguments -----------------------------------------------------------------------------------------------


def _check_model(model: nn.Module, structure: Structure | None) -> None:
    refuse_unusable(model)
    if structure is None:
        refuse_unprunable(model, computed=False)
    elif not hasattr(structure, "model"):
        raise TypeError(f"structure must be one of obc.structures, got {type(structure).__name__}")
    elif structure.model is not model:
        raise PruningError(
            f"the structure was made for another model, a {type(structure.model).__name__}, than the "
            f"{type(model).__name__} to be pruned; make one for this model, or pass that one"
        )
    elif len(structure.plan):
        raise PruningError(
            "the structure continues the plan of earlier pruning, of a model whose weights are gone; make it without "
            "plan=, and put the plans together afterwards: result.plan.after(earlier_plan)"
        )


@contextlib.contextmanager
def _restored_on_error(model: nn.Module, report: PruningReport, budget: Budget, steps: int) -> Iterator[Snapshot]:
    """Restore the model after an exception inside the block, and add a note to the exception on how far it came."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    except BaseException as error:
        snapshot.restore()
        if report.steps:
            share = report.steps[-1].remaining
            note = f"obc.prune had done {len(report.steps)} of {steps} steps, {share:.3f} of the {budget.noun}"
            add_note(error, f"{note}; the model was restored to what it was")
        raise


# --- the structure -------------------------------------------------------------------------------------------


def _structure(
    model: nn.Module,
    example_inputs: Any,
    ignored_layers: Sequence[nn.Module | str],
    num_heads: Mapping[nn.Module | str, int] | None,
    call_example: ForwardFn,
    other_runs: Iterable[Run],
) -> Structure:
    if example_inputs is None:
        from obc.structures.transformers import TransformersStructure

        if num_heads:
            raise ValueError("num_heads is for traced models; without example_inputs the config has it")
        found = TransformersStructure(model, ignored_layers=ignored_layers)
        if not found.groups:
            raise ValueError(
                f"nothing in {type(model).__name__} can be pruned{_first_left_out(found.left_out)}; only transformers "
                "models are pruned without being run: for another, pass example_inputs"
            )
        return found
    from obc.structures.traced import TorchPruningStructure

    return TorchPruningStructure(
        model,
        example_inputs,
        ignored_layers=ignored_layers,
        num_heads=num_heads,
        forward_fn=call_example,
        other_runs=other_runs,
    )


def _first_left_out(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ""
    name, reason = next(iter(left_out.items()))
    return f": {name}: {reason}" + (f" ({len(left_out) - 1} more are left out)" if len(left_out) > 1 else "")


def _verify(plan: PruningPlan, original: Mapping[str, Tensor], model: nn.Module, recalibrated: bool) -> None:
    """:meth:`PruningPlan.verify`, except for running statistics that were re-estimated.

    Whole buffers outside BatchNorm are the model's own business: counters, averages and caches change whenever it runs.
    """
    for module_name, module, tensor_name, tensor in named_tensors(model):
        if isinstance(module, _BatchNorm):
            changed = recalibrated and tensor_name.startswith("running_")
        else:
            unpruned = original.get(joined(module_name, tensor_name))
            whole = unpruned is not None and unpruned.shape == tensor.shape
            changed = whole and tensor_name in module._buffers
        if not changed:
            plan.verify_tensor(original, module_name, module, tensor_name, tensor)
