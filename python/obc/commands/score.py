"""``obc score``: scores a local transformers directory and writes the scores."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import obc
from obc.commands import data, model_directory
from obc.commands.common import UsageError, add_command, positive, refusing, require, writable
from obc.commands.run_log import add_log, say
from obc.criteria import available, get
from obc.criteria.scoring import needed
from obc.files import made_folder
from obc.scoring import Coverage, Scores
from obc.scoring.errors import ScoringError
from obc.statistics import ByBlock
from obc.statistics.names import Chosen

_DESCRIPTION = """\
Score every channel of a model that save_pretrained wrote, by the Jacobian Criterion, and write a safetensors file for
`obc report` and `obc prune MODEL_DIR --scores`. Nothing is fetched; no code of the directory is run.

The data: a .txt file (paragraphs), a .jsonl file (one object a line with "text", or "input_ids" where the directory has
no tokenizer) or a folder of images. Text is cut into sequences of --seq-len tokens without padding.

The loss follows the model's head: next token (causal LM), masked tokens (masked LM), the class that an image's folder
is named by (image classification); label-free for anything else: random projections of the outputs, which need no head
and no labels. kl needs a head and no labels: projections that see how the probabilities change."""


def add(commands: Any) -> None:
    """Add ``obc score`` to the subparsers."""
    score = add_command(commands, "score", run, "score a local transformers directory", _DESCRIPTION)
    score.add_argument("model", type=Path, metavar="MODEL_DIR", help="a directory written by save_pretrained")
    data.add_options(score, most=50)
    score.add_argument("--out", type=Path, default=Path("scores.safetensors"), help="(default: %(default)s)")
    score.add_argument("--rows", choices=("batch", "sample"), default="batch", help="(default: %(default)s)")
    score.add_argument("--loss", choices=model_directory.LOSSES, default="auto", help="(default: by the model's head)")
    model_directory.add_options(score)
    score.add_argument("--micro-batch", type=positive, help="samples at once: less memory, the same rows")
    score.add_argument(
        "--checkpointing", action="store_true", help="compute activations again in backward: less memory, the same rows"
    )
    score.add_argument(
        "--statistics",
        metavar="NAMES",
        help="instead of scores, collect these statistics of the groups that can be pruned (moments,gram ...), or what "
        "these criteria need (flap,angular_distance ...: obc criteria lists them)",
    )
    score.add_argument(
        "--by-block",
        nargs="?",
        const="host",
        choices=("host", "disk"),
        help="with --statistics of forward passes: one block after the other runs on all batches, with its weights "
        "alone on the device; hidden states between blocks stay in the host's memory, or on disk beside --out",
    )
    score.add_argument("--keep-rows", action="store_true", help="keep every row, for joint selection in obc prune")
    score.add_argument("--checkpoint", type=Path, help="file to resume from after a kill, with the same arguments")
    score.add_argument("--every", type=positive, default=10, help="batches between checkpoints (default: 10)")
    score.add_argument("--seed", type=int, default=0, help="of masks and random projections (default: 0)")
    add_log(score)


def run(parsed: argparse.Namespace) -> int:
    """Score a directory by local data, write the scores, and print how they were read."""
    require(model_directory.PACKAGES)
    out = writable(parsed.out)
    if parsed.by_block and not parsed.statistics:
        raise UsageError(
            "--by-block collects statistics only: scores need a backward pass; name some with --statistics"
        )
    device = model_directory.device_of(parsed.device)
    resident = torch.device("cpu") if parsed.by_block else device
    directory = model_directory.load(parsed.model, parsed.dtype, resident, parsed.loss)
    model = directory.model
    if parsed.checkpointing:
        model_directory.recompute_activations(model)
    batches = data.batches(parsed, model, parsed.model, directory.loss, seed=parsed.seed, device=device)
    if len(batches) < parsed.batches:
        say(f"{parsed.data} gives {len(batches)} batches of the {parsed.batches} asked for")
    shorter = "--batches, --batch-size" + ("" if parsed.data.is_dir() else ", --seq-len")
    say(f"reading {len(batches)} batches of {data.shape_of(batches[0])} on {device}; smaller {shorter} take less time")
    loss = model_directory.loss_of(directory.loss, parsed.rows, parsed.seed)
    if parsed.statistics:
        return _collect(parsed, model, batches, loss, out, device)
    with refusing(ScoringError, ValueError):
        scores = obc.score(
            model,
            batches,
            loss,
            rows=parsed.rows,
            micro_batch=parsed.micro_batch,
            keep_rows=parsed.keep_rows,
            checkpoint=parsed.checkpoint,
            every=parsed.every,
        )
    assert scores.report is not None
    scores.metadata["loss"] = directory.loss
    with made_folder(out.parent):
        scores.save(out)
    say(summary(scores))
    peak = scores.report.peak_bytes
    memory = "" if peak is None else f", peak memory {peak / 2**20:.0f} MiB"
    took = f"{scores.report.seconds:.1f} s{memory}"
    say(f"{len(batches)} batches of {data.shape_of(batches[0])}, loss {directory.loss}, {took}; written: {out}")
    return 0


def _collect(
    parsed: argparse.Namespace, model: nn.Module, batches: Any, loss: Any, out: Path, device: torch.device
) -> int:
    with refusing(ScoringError, ValueError), _states(parsed.by_block, out) as states:
        by_block = ByBlock(device=device, states=states) if parsed.by_block else False
        statistics = _statistics(parsed, model, batches, loss, by_block)
    with made_folder(out.parent):
        statistics.save(out)
    assert statistics.report is not None
    say(f"{statistics}\n{statistics.report.seconds:.1f} s; written: {out}")
    return 0


@contextlib.contextmanager
def _states(by_block: str | None, out: Path) -> Iterator[str]:
    """The place of hidden states between blocks: "host", or a folder that is removed afterwards."""
    if by_block != "disk":
        yield "host"
        return
    with made_folder(out.parent) as parent, tempfile.TemporaryDirectory(prefix="hidden_states.", dir=parent) as folder:
        yield folder


def asked_for(names: str) -> list[str | Chosen]:
    """Statistics by name, and those of criteria by name, with the options that these need.

    Raises:
        UsageError: a criterion needs no statistics.
    """
    found: list[str | Chosen] = []
    for name in (part.strip() for part in names.split(",")):
        asked: Sequence[str | Chosen] = needed(get(name)) if name in available() else [name]
        if not asked:
            raise UsageError(f"--statistics {name}: this criterion needs no statistics: it is of weights, or measures")
        found += [one for one in asked if one not in found]
    return found


def _statistics(
    parsed: argparse.Namespace, model: nn.Module, batches: Any, loss: Any, by_block: ByBlock | bool
) -> obc.Statistics:
    return obc.collect(
        model,
        batches,
        loss,
        statistics=asked_for(parsed.statistics),
        groups=obc.transformer_groups(model),
        rows=parsed.rows,
        micro_batch=parsed.micro_batch,
        checkpoint=parsed.checkpoint,
        every=parsed.every,
        by_block=by_block,
    )


def summary(scores: Scores) -> str:
    """How many modules were read in which way, and the unscored ones by name."""
    ways = Counter(_way(how) for how in scores.coverage.values() if how.scored)
    lines = [f"{len(scores)} modules scored by {scores.num_rows} rows"]
    lines += [f"  {count} read by {way}" for way, count in ways.items()]
    lines += [f"  {name}: {how}" for name, how in scores.coverage.items() if not how.scored]
    return "\n".join(lines)


def _way(how: Coverage) -> Coverage:
    """How a module was read, without the names of the modules that it shares rows with."""
    return Coverage(how.how, how.reason, copied=how.copied, checked=how.checked)
