"""``obc score``: score a local transformers directory, and write the scores."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import obc
from obc.commands import checkpoints, data
from obc.commands.common import require, writable
from obc.scoring import Scores

_DESCRIPTION = """\
Score every channel of a model that save_pretrained wrote, by the Jacobian Criterion, and write a safetensors file for
`obc report` and `obc prune MODEL_DIR --scores`. Nothing is fetched; no code of the directory is run.

The data: a .txt file (paragraphs), a .jsonl file (one object a line with "text", or "input_ids" where the directory has
no tokenizer) or a folder of images. Text is cut into sequences of --seq-len tokens without padding.

The loss follows the model's head: next token (causal LM), masked tokens (masked LM), the class that an image's folder
is named by (image classification); label-free for anything else: random projections of the outputs, which need no head
and no labels."""


def add(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="score a local transformers directory",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("model", type=Path, metavar="MODEL_DIR", help="a directory written by save_pretrained")
    score.add_argument("--data", type=Path, required=True, help="a .txt or .jsonl file, or a folder of images")
    score.add_argument("--out", type=Path, default=Path("scores.safetensors"), help="(default: %(default)s)")
    score.add_argument("--rows", choices=("batch", "sample"), default="batch", help="(default: %(default)s)")
    score.add_argument("--batches", type=positive, default=50, help="fewer where the data ends (default: 50)")
    score.add_argument("--batch-size", type=positive, default=4, help="samples of a batch (default: 4)")
    score.add_argument(
        "--seq-len", type=positive, help=f"tokens of a sequence (default: {data.SEQUENCE}, or the model's most)"
    )
    score.add_argument("--loss", choices=checkpoints.LOSSES, default="auto", help="(default: by the model's head)")
    score.add_argument("--dtype", choices=tuple(checkpoints.DTYPES), help="(default: the one the model was saved in)")
    score.add_argument("--device", help="cpu, cuda:0 ... (default: the first GPU, else the CPU)")
    score.add_argument("--seed", type=int, default=0, help="of masks and random projections (default: 0)")
    score.set_defaults(command=run)


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(parsed: argparse.Namespace) -> int:
    require(checkpoints.PACKAGES)
    out = writable(parsed.out)
    checkpoint = checkpoints.load(parsed.model, parsed.dtype, checkpoints.device_of(parsed.device), parsed.loss)
    model = checkpoint.model
    batches = data.batches(
        parsed.data,
        model,
        parsed.model,
        checkpoint.loss,
        count=parsed.batches,
        size=parsed.batch_size,
        seq_len=parsed.seq_len,
        seed=parsed.seed,
    )
    if len(batches) < parsed.batches:
        print(f"{parsed.data} gives {len(batches)} batches of the {parsed.batches} asked for", flush=True)
    loss = checkpoints.loss_of(checkpoint.loss, parsed.rows, parsed.seed)
    start = time.perf_counter()
    scores = obc.score(model, batches, loss, rows=parsed.rows)
    seconds = time.perf_counter() - start
    scores.metadata["loss"] = checkpoint.loss
    scores.save(out)
    print(summary(scores))
    print(f"{len(batches)} batches of {_shape(batches[0])}, loss {checkpoint.loss}, {seconds:.1f} s; written: {out}")
    return 0


def summary(scores: Scores) -> str:
    """How many modules were read in which way, and what is unscored by name."""
    ways: dict[str, int] = {}
    for how in scores.coverage.values():
        ways[how] = ways.get(how, 0) + (not how.startswith("unscored"))
    lines = [f"{len(scores)} modules scored by {scores.num_rows} rows"]
    lines += [f"  {count} read by {how}" for how, count in ways.items() if count]
    lines += [f"  {name}: {how}" for name, how in scores.coverage.items() if how.startswith("unscored")]
    return "\n".join(lines)


def _shape(batch: dict[str, Any]) -> str:
    values = batch.get("input_ids", batch.get("pixel_values"))
    assert values is not None
    return " x ".join(map(str, values.shape))
