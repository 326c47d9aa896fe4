"""Prunes a local transformers directory in steps: scored on local data, pruned, compensated."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import obc
from obc.commands import budget_options, data, model_directory, pruned_directory
from obc.commands.common import UsageError, folder, refusing, require
from obc.commands.run_log import say
from obc.model.batches import RowKind
from obc.pruning.budgets import Budget
from obc.scoring.errors import ScoringError

STEPS, SEQUENCES, SEQUENCE = 4, 32, 512
IMAGES = 256  # one a batch and a row: models that cut images into windows have no sample rows


def run(parsed: argparse.Namespace, budget: Budget) -> int:
    """Prune ``parsed.target`` to the budget on ``parsed.data``, and write it to ``parsed.out``.

    What is not chosen is what kept the most of a real language model (docs/measured.md): four steps, each compensated;
    rows of tokens; a loss without labels, in the metric of the Kullback-Leibler divergence if the model has a head.
    """
    require(model_directory.PACKAGES)
    source = Path(parsed.target)
    directory = model_directory.load(
        source, parsed.dtype, model_directory.device_of(parsed.device), parsed.loss or "auto"
    )
    model, loss = directory.model, directory.loss
    if parsed.loss is None and loss != "label-free":
        loss = "kl"
    criterion, count = (None, IMAGES) if parsed.data.is_dir() else ("token_jacobian", SEQUENCES)
    rows: RowKind = parsed.rows or "batch"
    batches = data.batches(
        parsed,
        model,
        source,
        loss,
        count=parsed.batches or count,
        size=parsed.batch_size or 1,
        length=SEQUENCE,
        seed=parsed.seed,
    )
    options: dict[str, Any] = {"criterion": criterion, "rows": rows, "steps": STEPS, "compensate": "correct"}
    options |= budget_options.keywords(parsed, budget, "criterion", "selection", "slices", "steps")
    folder(parsed.out)  # before minutes of work, not after
    torch.manual_seed(parsed.seed)
    with refusing(ValueError, ScoringError):
        structure = structure_of(parsed, model)
        result = obc.prune(
            model,
            batches=batches,
            loss_fn=model_directory.loss_of(loss, rows, parsed.seed),
            forward_fn=model_directory.outputs,
            structure=structure,
            **options,
        )
    calibration = f"{len(batches)} batches of {data.shape_of(batches[0])}"
    result.report.provenance |= {"directory": str(source), "data": f"{parsed.data}, {calibration}", "loss": loss}
    say(f"{calibration}, loss {loss}", result.report)
    pruned_directory.write(structure, result.report, result.latency_table, directory, parsed.out)
    return 0


def structure_of(parsed: argparse.Namespace, model: Any) -> Any:
    """The groups of a transformers model by the options --kinds, --uniform, --round-to and --ignore."""
    from obc.structures.transformers import TransformersStructure

    kinds = {} if parsed.kinds is None else {"kinds": parsed.kinds}
    ignored = parsed.ignore or ()
    structure = TransformersStructure(
        model, uniform=bool(parsed.uniform), round_to=parsed.round_to, ignored_layers=ignored, **kinds
    )
    if parsed.kinds and not structure.groups and not structure.left_out:
        others = dict.fromkeys(group.kind for group in obc.transformer_groups(model))
        raise UsageError(
            f"--kinds {' '.join(parsed.kinds)}: {type(model).__name__} has no such groups; it has {', '.join(others)}"
        )
    structure.saved_with_plan = True
    return structure
