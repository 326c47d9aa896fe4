"""``obc recover``: trains a pruned transformers directory for a while against the unpruned one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import obc
from obc.commands import data, model_directory
from obc.commands.common import REPORT_FILES, UsageError, add_command, folder, positive, refusing, require
from obc.commands.pruned_directory import save, say_written
from obc.commands.run_log import add_log, say
from obc.files import whole_folder
from obc.pruning.report import PruningReport
from obc.structures.transformers.saving import is_saved_pruned

_DESCRIPTION = """\
Train the model of a pruned directory to compute again what the unpruned one computes: the divergence of their
predictions, or of a model without a head the relative error of its last hidden state. Neither needs labels. What
trains: every weight (naive), Equivalent Pruning's factors too (folded), or low-rank updates (lora); the result is a
plain model."""


def add(commands: Any) -> None:
    """Add ``obc recover`` to the subparsers."""
    recover = add_command(commands, "recover", run, "distil the unpruned model into the pruned one", _DESCRIPTION)
    recover.add_argument("model", type=Path, metavar="PRUNED_DIR", help="what obc prune wrote")
    recover.add_argument("--teacher", type=Path, required=True, metavar="MODEL_DIR", help="the unpruned directory")
    data.add_options(recover, most=200)
    recover.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the recovered model")
    recover.add_argument("--steps", type=positive, default=100, help="optimizer steps (default: 100)")
    recover.add_argument("--lr", type=float, default=1e-4, help="the peak learning rate (default: 1e-4)")
    recover.add_argument("--train", choices=("naive", "folded", "lora"), default="naive", help="(default: naive)")
    recover.add_argument("--rank", type=positive, default=8, help="of --train lora (default: 8)")
    recover.add_argument("--temperature", type=float, default=1.0, help="of the predictions (default: 1)")
    recover.add_argument("--accumulate", type=positive, default=1, help="batches of a step (default: 1)")
    recover.add_argument("--checkpoint", type=Path, help="file to resume from after a kill, with the same arguments")
    recover.add_argument("--every", type=positive, default=20, help="steps between checkpoints (default: 20)")
    model_directory.add_options(recover)
    add_log(recover)


def run(parsed: argparse.Namespace) -> int:
    """Train, save, and print the report."""
    require(model_directory.PACKAGES)
    if parsed.teacher.resolve() == parsed.model.resolve():
        raise UsageError(
            f"--teacher {parsed.teacher} is the pruned model's own directory, from which it has nothing to learn; pass "
            "the unpruned model's"
        )
    out = folder(parsed.out)
    device = model_directory.device_of(parsed.device)
    pruned = model_directory.load(parsed.model, parsed.dtype, device)
    teacher = model_directory.load(parsed.teacher, parsed.dtype, device)
    model_directory.refuse_unlike(pruned, teacher, "--teacher")
    batches = data.batches(parsed, teacher.model, parsed.teacher, "label-free")
    with refusing(ValueError, ImportError):
        plan = pruned.plan
        if plan is None and parsed.train == "folded":
            plan = obc.PruningPlan.from_models(teacher.model.state_dict(), pruned.model)
        report = obc.recover(
            pruned.model,
            teacher.model,
            batches,
            steps=parsed.steps,
            lr=parsed.lr,
            train=parsed.train,
            plan=plan,
            rank=parsed.rank,
            accumulate=parsed.accumulate,
            distillation=_distillation(pruned.loss, parsed.temperature),
            checkpoint=parsed.checkpoint,
            every=parsed.every,
        )
    pruned.restore_cache()
    with whole_folder(out) as stage:
        # In the same form as the pruned model.
        save(pruned.model, plan, parsed.model, stage, by_plan=is_saved_pruned(parsed.model))
        _carry_report(parsed, stage)
    say(report)
    say_written(out, "" if is_saved_pruned(out) else None)
    return 0


def _distillation(loss: str, temperature: float) -> obc.Distillation:
    """Distillation of predictions; of hidden states if the model has no head."""
    if loss == "label-free":
        return obc.Distillation(logits=0.0, outputs=1.0, forward_fn=model_directory.outputs)
    return obc.Distillation(temperature=temperature, forward_fn=model_directory.outputs)


def _carry_report(parsed: argparse.Namespace, out: Path) -> None:
    """Copy the pruning's report, with a note that the model was trained."""
    source = parsed.model / REPORT_FILES[1]
    if source.is_file():
        report = PruningReport.load(source)
        said = f"{parsed.steps} steps at rate {parsed.lr:g}, {parsed.train}, against {parsed.teacher}"
        report.provenance["recovered"] = said
        report.save(out / REPORT_FILES[1])
