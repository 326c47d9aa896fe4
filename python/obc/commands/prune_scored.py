"""Pruning a local transformers directory by scores that lie in a file: no forward pass."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import obc
from obc.commands import checkpoints, data
from obc.commands.common import UsageError, folder, require
from obc.commands.report import load as load_scores
from obc.model.plan import PruningPlan
from obc.pruning.arguments import Budget
from obc.scoring import Scores
from obc.selection import select
from obc.selection.uniform import select_uniform
from obc.structures.transformers.saving import PLAN_FILE

_CALIBRATION_BATCHES = 32
_CALIBRATION_BATCH = 4


def run(parsed: argparse.Namespace, budget: Budget) -> int:
    """Prune ``parsed.target`` to the budget and write it to ``parsed.out``."""
    require(checkpoints.PACKAGES)
    source, out = Path(parsed.target), parsed.out
    if parsed.scores is None:
        raise UsageError(f"--scores is missing: score the directory first, obc score {source} --data FILE")
    if parsed.compensate and parsed.data is None:
        raise UsageError("--compensate needs --data: a .txt or .jsonl file, or a folder of images")
    if out.resolve() == source.resolve():
        raise UsageError(f"--out {out} is the model's own directory; choose another")
    scores = load_scores(parsed.scores)
    checkpoint = checkpoints.load(source, parsed.dtype, checkpoints.device_of(parsed.device))
    model = checkpoint.model
    from obc.structures.transformers import TransformersStructure

    try:
        scores.verify(model)
        structure = TransformersStructure(model, uniform=bool(parsed.uniform), round_to=parsed.round_to)
        original = copy.deepcopy(model) if parsed.compensate else model
        before, widths = dict(model.state_dict()), {group.name: group.size for group in structure.groups}
        costs, parameters = structure.costs("macs").total(), structure.costs("parameters").total()
        structure.remove(_chosen(structure, scores, budget))
        structure.plan.verify(before, model)
    except (ValueError, obc.PlanError) as error:
        raise UsageError(str(error)) from error
    remaining = structure.costs("macs").total() / costs
    print(f"MACs a token: {remaining:.1%} remain; parameters: {structure.costs('parameters').total() / parameters:.1%}")
    for group in structure.groups:
        print(f"  {group.name} ({group.kind}): {widths[group.name]} -> {group.size}")
    for name, why in structure.left_out.items():
        print(f"  {name}: not pruned: {why}")
    if parsed.compensate:
        print(_compensate(parsed, model, original, structure.plan))
    _save(model, structure, source, folder(out))
    return 0


def _chosen(structure: Any, scores: Scores, budget: Budget) -> dict[str, Tensor]:
    """The units to remove: sets of them where the file has rows, else one by one."""
    groups, costs, limits = structure.groups, structure.costs(budget.unit), structure.limits
    joint = bool(scores.rows)
    values: dict[str, Tensor]
    if joint:
        rows = ((group.name, group.gate_rows(scores.rows)) for group in groups)
        values = {name: found for name, found in rows if found is not None}
    else:
        values = dict(scores.group(groups, slices="gate"))
    if not values:
        raise UsageError("the scores have nothing of any group that can be pruned; score the model itself")
    freed = (1 - budget.share) * costs.total()
    selection = "joint" if joint else "independent"
    options: dict[str, Any] = {"selection": selection, "min_units": limits.min_units, "round_to": limits.round_to}
    if limits.families:
        return select_uniform(values, costs, freed, limits.families, widths=limits.widths, **options)
    return select(values, costs, freed, **options)


def _compensate(parsed: argparse.Namespace, model: Any, original: nn.Module, plan: PruningPlan) -> str:
    """Compensate ``model`` in place from ``--data``, and say in a line what came of it."""
    batches = data.batches(
        parsed.data,
        original,
        Path(parsed.target),
        "label-free",
        count=_CALIBRATION_BATCHES,
        size=_CALIBRATION_BATCH,
        seq_len=parsed.seq_len,
        seed=parsed.seed,
    )
    try:
        report = obc.compensate(model, original, plan, batches, checkpoints.outputs, mode=parsed.compensate)
    except ValueError as error:
        raise UsageError(f"--compensate: {error}") from error
    return (
        f"compensated ({parsed.compensate}): held-out output error {report.naive_error:.4f} -> "
        f"{report.final_error:.4f}, {report.seconds:.1f} s"
    )


def _save(model: Any, structure: Any, source: Path, out: Path) -> None:
    """Write the model as ``from_pretrained`` loads it, or else as ``load_pruned`` does; the tokenizer beside it."""
    from obc.structures.transformers import save_pruned

    if structure.config_refused is None:
        model.save_pretrained(out)
        structure.plan.save(out / PLAN_FILE)
        print(f"written: {out}; from_pretrained loads it")
    else:
        save_pruned(model, structure.plan, out)
        print(f"written: {out}; obc.structures.transformers.load_pruned loads it: {structure.config_refused}")
    tokenizer = data.tokenizer_of(source)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
