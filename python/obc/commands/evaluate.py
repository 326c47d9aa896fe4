"""``obc evaluate``: perplexity, accuracy, agreement with another model, and speed of a local transformers directory."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from obc import quality
from obc.commands import data, model_directory
from obc.commands.common import add_command, positive, refusing, require
from obc.commands.run_log import add_log, say
from obc.model.evaluation import device_of, evaluating
from obc.model.timing import median_seconds

_DESCRIPTION = """\
Say how good the model of a directory is: perplexity of a causal language model, accuracy of an image classifier.
With --reference, the unpruned model's directory, also how far the two agree. Directories that save_pretrained or obc's
save_pruned wrote; nothing is fetched.

Perplexity: windows of --seq-len tokens start every --stride tokens; every token is predicted once, by the first window
that holds it. The stride is printed with the figure, which means nothing without it."""

_ROUNDS = 7


def add(commands: Any) -> None:
    """Add ``obc evaluate`` to the subparsers."""
    evaluate = add_command(commands, "evaluate", run, "perplexity, accuracy, agreement, speed", _DESCRIPTION)
    evaluate.add_argument("model", type=Path, metavar="MODEL_DIR", help="a directory of a model, pruned or not")
    evaluate.add_argument("--reference", type=Path, metavar="MODEL_DIR", help="the unpruned model's directory")
    data.add_options(evaluate, most=50)
    evaluate.add_argument("--stride", type=positive, help="tokens between windows (default: --seq-len, no overlap)")
    evaluate.add_argument("--measure", action="store_true", help="also time a forward pass, beside the reference's")
    model_directory.add_options(evaluate)
    add_log(evaluate)


def run(parsed: argparse.Namespace) -> int:
    """Print one line per figure."""
    require(model_directory.PACKAGES)
    device = model_directory.device_of(parsed.device)
    directory = model_directory.load(parsed.model, parsed.dtype, device)
    reference = None if parsed.reference is None else model_directory.load(parsed.reference, parsed.dtype, device)
    if reference is not None:
        model_directory.refuse_unlike(directory, reference, "--reference")
    source = parsed.model if data.tokenizer_of(parsed.model) or reference is None else parsed.reference
    loss = directory.loss if directory.loss != "masked-lm" else "label-free"
    batches = data.batches(parsed, directory.model, source, loss)
    models = {"": directory.model} if reference is None else {"": directory.model, "reference: ": reference.model}
    with refusing(ValueError):
        for name, model in models.items():
            say("\n".join(name + line for line in _figures(model, directory.loss, batches, parsed.stride)))
        if reference is not None:
            both = (directory.model, reference.model, batches, model_directory.outputs)
            if directory.loss != "label-free" or directory.model.config.num_labels > 1:  # a single logit has no classes
                say(f"agreement: {quality.agreement(*both):.4f}")
            say(f"cosine: {quality.cosine(*both):.4f}")
    if parsed.measure:
        say("\n".join(_speed(models, batches[0])))
    return 0


def _figures(model: Any, loss: str, batches: list[Any], stride: int | None) -> list[str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [f"parameters: {parameters:,}"]
    if loss == "causal-lm":
        tokens = torch.cat([batch["input_ids"].flatten() for batch in batches])
        length = batches[0]["input_ids"].shape[1]
        found = quality.perplexity(model, tokens, length=length, stride=stride, batch_size=len(batches[0]["input_ids"]))
        lines.append(f"{found}, windows of {length} tokens every {stride or length}")
    elif loss == "label":
        lines.append(f"accuracy: {quality.accuracy(model, batches, model_directory.outputs):.4f}")
    return lines


def _speed(models: dict[str, Any], batch: Any) -> list[str]:
    """Median seconds of a forward pass; the models take turns, so that a drift of the machine affects both alike."""
    calls = [functools.partial(model_directory.outputs, model, batch) for model in models.values()]
    with evaluating(*models.values()), torch.inference_mode():
        seconds = median_seconds(calls, device_of(models[""]), repeats=_ROUNDS, warm_ups=1)
    medians = dict(zip(models, seconds, strict=True))
    lines = [f"{name}seconds of a forward pass: {value:.4f}" for name, value in medians.items()]
    if len(medians) == 2:
        ours, theirs = medians.values()
        how = f"medians of {_ROUNDS} paired rounds, {torch.get_num_threads()} threads"
        lines.append(f"speed-up: {theirs / ours:.2f} ({how})")
    return lines
