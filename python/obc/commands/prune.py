"""``obc prune``: prunes the model of a Python entry point, or a local transformers directory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

import obc
from obc.commands import allocation_option, budget_options, entry_point, model_directory, prune_directory, prune_scored
from obc.commands.common import REPORT_FILES, UsageError, add_command, expecting, folder, positive, refusing, require
from obc.commands.run_log import add_log, say
from obc.files import whole_folder
from obc.pruning.budgets import Budget
from obc.scoring.errors import ScoringError

_STEPS = prune_directory.STEPS
_CALIBRATION = f"{prune_directory.SEQUENCES} sequences of {prune_directory.SEQUENCE} tokens"
_DESCRIPTION = f"""\
Prune a model until a share of its multiply-accumulates remains, or of its parameters, memory or latency.

obc prune MODEL_DIR --data F     prune a transformers directory: score on the data, remove, compensate, in {_STEPS}
                                 steps. Writes a directory that from_pretrained loads, or, where no config can
                                 say the widths, one for obc.structures.transformers.load_pruned; --uniform keeps
                                 to widths that the config can say. The data: {_CALIBRATION},
                                 or {prune_directory.IMAGES} images.
obc prune MODEL_DIR --scores F   the same by what `obc score` wrote, in one step without a forward pass, so that
                                 another --ratio costs seconds.
obc prune module:function        score, select, remove, step by step (obc.prune); writes model.safetensors (the pruned
                                 state dict), plan.json (what every layer kept) and report.json.

{entry_point.DESCRIPTION}"""

# Options that not every way has.
_MEASURED = ("selection", "slices", "steps", "rows", "ignore")
_SAMPLED = ("loss", "batches", "batch_size")
_DIRECTORY = (*_SAMPLED, "scores", "uniform", "data", "seq_len", "dtype", "device")


def add(commands: Any) -> None:
    """Add ``obc prune`` to the subparsers: the options of every way, each in its own group."""
    prune = add_command(
        commands, "prune", run, "prune a model of your own code, or a transformers directory", _DESCRIPTION
    )
    prune.add_argument("target", metavar="module:function | MODEL_DIR")
    prune.add_argument("--out", type=Path, required=True, help="folder to write to")
    budget_options.add(prune)
    prune.add_argument("--round-to", type=positive, help="make widths multiples of this")
    prune.add_argument(
        "--max-pruning-ratio",
        type=_caps,
        metavar="SHARE | NAME=SHARE,...",
        help="the largest share of its units that any group may lose; or by name of a group or block",
    )
    prune.add_argument(
        "--protected-blocks",
        type=_ends,
        metavar="COUNT | FIRST,LAST",
        help="number of blocks at the start and at the end that lose nothing",
    )
    prune.add_argument(
        "--compensate",
        choices=("mean", "correct", "ls", "seq", "none"),
        help="let what remains compensate for what was removed (default: correct for MODEL_DIR --data, else none)",
    )
    prune.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    prune.add_argument(
        "--criterion",
        help="see obc criteria (default: that of obc.prune, of text token_jacobian); --scores must have its statistics",
    )
    prune.add_argument("--allocation", metavar=allocation_option.METAVAR, help=allocation_option.HELP)
    _add_ways(prune)
    add_log(prune)


def _add_ways(prune: argparse.ArgumentParser) -> None:
    """The options that not every way has."""
    measured = prune.add_argument_group("module:function, MODEL_DIR --data")
    measured.add_argument(
        "--selection",
        choices=("joint", "independent"),
        help="(default: joint if the criterion has rows, else independent)",
    )
    measured.add_argument("--slices", choices=("gate", "all"), help="(default: gate)")
    measured.add_argument(
        "--steps", type=positive, help=f"how often to score and remove (default: 8; MODEL_DIR: {_STEPS})"
    )
    measured.add_argument("--rows", choices=("batch", "sample"), help="(default: batch)")
    measured.add_argument(
        "--ignore", action="append", metavar="LAYER", help="keep the width of this layer; may be repeated"
    )
    directory = prune.add_argument_group("MODEL_DIR")
    directory.add_argument("--data", type=Path, help="calibration data, as in obc score")
    directory.add_argument(
        "--seq-len", type=positive, help=f"tokens of a sequence (default: {prune_directory.SEQUENCE})"
    )
    directory.add_argument("--uniform", action="store_true", default=None, help="equal widths in all layers")
    directory.add_argument(
        "--scores", type=Path, help="the file that obc score wrote: scores, or statistics for --criterion"
    )
    model_directory.add_options(directory)
    sampled = prune.add_argument_group("MODEL_DIR --data")
    sampled.add_argument(
        "--loss",
        choices=model_directory.LOSSES,
        help="(default: kl, or label-free without a head; neither needs labels)",
    )
    sampled.add_argument(
        "--batches", type=positive, help=f"(default: {prune_directory.SEQUENCES}, of images {prune_directory.IMAGES})"
    )
    sampled.add_argument("--batch-size", type=positive, help="sequences or images of a batch (default: 1)")


@expecting("a share such as 0.8, or shares by name such as model.layers.0=0.2,model.layers.1=0.5")
def _caps(text: str) -> float | dict[str, float]:
    """A share, or shares by name."""
    if "=" not in text:
        return float(text)
    named = (part.partition("=") for part in text.split(","))
    return {name.strip(): float(share) for name, _, share in named}


@expecting("a number of blocks, or the numbers at the start and at the end, such as 4,2")
def _ends(text: str) -> tuple[int, int]:
    """The numbers of blocks at the start and at the end."""
    first, comma, last = text.partition(",")
    return int(first), int(last if comma else first)


def _example(target: str) -> str:
    """An entry point's name, of the file if one was passed."""
    return f"{Path(target).stem if target.endswith('.py') else 'mymodel'}:subject"


def run(parsed: argparse.Namespace) -> int:
    """Prune a directory or an entry point; options of the other ways are refused."""
    budget = budget_options.budget_of(parsed)
    if not (source := Path(parsed.target)).is_dir():
        if ":" not in parsed.target:
            raise UsageError(
                f"{parsed.target!r} is neither a directory nor module:function; pass one written by save_pretrained "
                "(nothing is fetched), or the name of a function that returns a model, such as "
                f"{_example(parsed.target)}"
            )
        _refuse(parsed, _DIRECTORY, f"is for a model directory, which {parsed.target} is not")
        return _entry(parsed, budget)
    if parsed.scores is not None:
        _refuse(parsed, _MEASURED + _SAMPLED, "is not for --scores: it says how to score the model")
        return prune_scored.run(parsed, budget)
    if parsed.data is None:
        raise UsageError(
            "--data is missing: a .txt or .jsonl file, or a folder of images, on which the model is scored; or pass "
            f"--scores, a file that obc score {source} wrote"
        )
    return prune_directory.run(parsed, budget)


def _refuse(parsed: argparse.Namespace, options: Sequence[str], why: str) -> None:
    for option in options:
        if getattr(parsed, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} {why}")


def _entry(parsed: argparse.Namespace, budget: Budget) -> int:
    """Prune the model of an entry point; write its state dict, the plan and the report."""
    require({"torch_pruning": "torch-pruning"})
    subject = entry_point.load(parsed.target)
    out = folder(parsed.out)
    names = ("criterion", "selection", "slices", "steps", "rows")
    options = budget_options.keywords(parsed, budget, *names) | dict(subject.further)
    if parsed.ignore:
        options["ignored_layers"] = [*options.get("ignored_layers", ()), *parsed.ignore]
    torch.manual_seed(parsed.seed)
    with refusing(ValueError, ScoringError):
        if parsed.kinds is not None:
            options["structure"] = _structure_of(subject, parsed.kinds, options.pop("ignored_layers", ()))
        result = obc.prune(
            subject.model, None if parsed.kinds else subject.example_inputs, subject.batches, subject.loss_fn, **options
        )
    with whole_folder(out) as stage:
        save_model(result.model, str(stage / "model.safetensors"), force_contiguous=True)
        result.plan.save(stage / "plan.json")
        result.report.save(stage / REPORT_FILES[0])
        if result.latency_table is not None:
            result.latency_table.save(stage / budget_options.TABLE_FILE)
    say(result.report)
    say(f"written: {out}/model.safetensors, plan.json, {REPORT_FILES[0]}; as a page: obc report {out}")
    return 0


def _structure_of(subject: entry_point.PruneCall, kinds: Sequence[str], ignored: Sequence[Any]) -> Any:
    """The groups of these kinds in a transformers model."""
    require(model_directory.PACKAGES)
    from obc.structures.transformers import TransformersStructure

    structure = TransformersStructure(subject.model, kinds, ignored_layers=ignored)
    if not structure.groups:
        raise UsageError(
            f"--kinds {' '.join(kinds)}: the model has no such groups; only transformers models have kinds"
        )
    return structure
