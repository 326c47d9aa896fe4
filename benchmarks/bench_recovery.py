"""Short recovery of pruned pretrained models: ``python -m benchmarks.bench_recovery --model encoder``.

Models and texts: :mod:`benchmarks.real_sources`. A share of the feed-forward channels goes, chosen once by the Jacobian
Criterion; then the pruned model is distilled from the unpruned one for as many steps in every way that
:func:`obc.recover` knows: naive (the pruned weights), folded (Equivalent Pruning's factors too), lora (low-rank
updates). Embeddings are frozen and there is no dropout, in all of them.

- ``smollm2``: SmolLM2-135M-Instruct; forward KL divergence of the logits. Trained on sequences of the Debian handbook;
  validated and tested on different sequences of the developer's reference. Shown: test perplexity.
- ``encoder``: the sentence encoder all-MiniLM-L6-v2; relative squared error of the last layer's output. Sentences of
  the standard library's docstrings. Shown: mean cosine similarity of test embeddings to the unpruned model's.

The learning rate of each way is chosen on validation with the first seed: neighbours on a grid of factors of about
three are tried until the best one is no end of it. The other seeds train with that rate. A seed decides which texts
train, and the start of low-rank updates. Beside them: no training at all, and compensation by least squares.

Memory of smollm2: 3.1 GiB naive, 2.5 lora, 6.3 folded, whose factors are three times as many numbers as the weights.

Cases that the file of ``--out`` already has are not run again; ``--minutes`` begins no case after that time, so that a
run can be made in pieces.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import obc
from benchmarks import real_sources
from benchmarks.bench_compensation_encoder import CORPORA, Encoder, embed, similarity
from benchmarks.harness import RESULTS, provenance, write
from benchmarks.real_tasks import next_token_loss, tiny_llama
from obc.demo import pretrained
from obc.structures.transformers import TransformersStructure

TRAINED = ("naive", "folded", "lora")
UNTRAINED = ("unpruned", "pruned", "compensated")
_SENTENCES = 2500
# The first exponent of ten that is tried, in halves: 10 ** (-8 / 2).
START = {"naive": -8, "folded": -8, "lora": -6}


@dataclass
class Task:
    """A model that was pruned, and its texts.

    Attributes:
        teacher: unpruned.
        pruned: a pruned copy.
        plan: the plan of its pruning.
        train: batches of a seed.
        validation: batches that choose the rate.
        test: batches that are shown.
        distillation: the loss of training.
        forward: what compensation preserves.
        measure: of a model on batches.
        sign: 1 if a larger measure is better, -1 if a smaller one is.
    """

    teacher: nn.Module
    pruned: nn.Module
    plan: obc.PruningPlan
    train: Callable[[int], list[Any]]
    validation: list[Any]
    test: list[Any]
    distillation: obc.Distillation
    forward: Callable[[nn.Module, Any], Any]
    measure: Callable[[nn.Module, list[Any]], float]
    sign: int


def prune(model: nn.Module, share: float, batches: list[Any], **options: Any) -> obc.PruningResult:
    """A copy without that share of the feed-forward parameters."""
    pruned = copy.deepcopy(model)
    structure = TransformersStructure(pruned, kinds=("ffn",))
    return obc.prune(
        pruned, None, batches, structure=structure, blocks=1 - share, steps=1, progress=False, seed=0, **options
    )


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def freeze_embeddings(model: nn.Module) -> None:
    """Embeddings, and a head tied to them, are left unchanged."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def language_model(
    model: nn.Module,
    train: Callable[[int], Tensor],
    calibration: Tensor,
    validation: Tensor,
    test: Tensor,
    share: float,
) -> Task:
    """A task of a causal language model; texts as (sequences, tokens)."""

    def batches(tokens: Tensor) -> list[Any]:
        return [{"input_ids": part} for part in tokens.split(4)]

    @torch.no_grad()
    def measure(network: nn.Module, parts: list[Any]) -> float:
        network.eval()
        return math.exp(statistics.mean(float(next_token_loss(network, part["input_ids"])) for part in parts))

    def forward(network: nn.Module, batch: Any) -> Any:
        return network(input_ids=batch["input_ids"], use_cache=False).logits

    teacher = without_dropout(model.eval())
    loss = lambda network, batch: next_token_loss(network, batch["input_ids"])  # noqa: E731
    result = prune(teacher, share, batches(calibration), loss_fn=loss, forward_fn=forward)
    return Task(
        teacher,
        result.model,
        result.plan,
        lambda seed: batches(train(seed)),
        batches(validation),
        batches(test),
        obc.Distillation(forward_fn=forward),
        forward,
        measure,
        sign=-1,
    )


def smollm2(steps: int, sequences: int, length: int, share: float) -> Task:
    model, tokenizer = pretrained.smollm2()
    handbook, reference = real_sources.handbook(), real_sources.reference()
    held_out = real_sources.sequences(tokenizer, reference, 2 * sequences, length, 0)
    return language_model(
        model,
        lambda seed: real_sources.sequences(tokenizer, handbook, 4 * steps, length, seed + 1),
        real_sources.sequences(tokenizer, handbook, sequences, length, 0),
        held_out[:sequences],
        held_out[sequences:],
        share,
    )


def encoder(steps: int, sequences: int, length: int, share: float) -> Task:
    """``length`` is not used: sentences keep their lengths, and 16 of them count as a sequence."""
    found, count = Encoder.pretrained(), 16 * sequences
    texts = next(corpus for corpus in CORPORA if corpus.name == "docstrings").sentences(_SENTENCES)
    held_out, rest = texts[: 2 * count], texts[2 * count :]

    def train(seed: int) -> list[Any]:
        drawn = random.Random(seed).sample(rest, min(len(rest), 32 * steps))
        return found.batches(drawn, seed)

    teacher = without_dropout(found.model)
    last = f"encoder.layer.{len(found.model.encoder.layer) - 1}"
    result = prune(teacher, share, found.batches(rest[-512:], 0), loss_fn=None, labels=False, forward_fn=embed)
    return Task(
        teacher,
        result.model,
        result.plan,
        train,
        found.batches(held_out[:count], 0),
        found.batches(held_out[count:], 0),
        obc.Distillation(logits=0.0, hidden=1.0, modules=[last]),
        embed,
        lambda network, parts: similarity(network.eval(), teacher, parts),
        sign=1,
    )


def tiny(steps: int, sequences: int, length: int, share: float) -> Task:
    """:func:`benchmarks.real_tasks.tiny_llama` on random tokens."""

    def texts(seed: int, count: int) -> Tensor:
        return torch.randint(64, (count, length), generator=torch.Generator().manual_seed(seed))

    held_out = texts(0, 2 * sequences)
    return language_model(
        tiny_llama(),
        lambda seed: texts(seed + 1, 4 * steps),
        texts(99, sequences),
        held_out[:sequences],
        held_out[sequences:],
        share,
    )


TASKS = {"smollm2": smollm2, "encoder": encoder, "tiny": tiny}


@dataclass(frozen=True)
class Case:
    """One training, or one of the models that are not trained.

    Attributes:
        way: of ``UNTRAINED`` or ``TRAINED``.
        half: twice the exponent of ten of the learning rate; None without training.
        seed: of the texts.
    """

    way: str
    half: int | None = None
    seed: int = 0

    @property
    def rate(self) -> float | None:
        return None if self.half is None else 10 ** (self.half / 2)


def measured(task: Task, case: Case, steps: int) -> dict[str, Any]:
    """Validation and test figures of a case, and its cost."""
    started, model, facts = time.perf_counter(), copy.deepcopy(task.pruned), {}
    if case.way == "unpruned":
        model = task.teacher
    elif case.way == "compensated":
        obc.compensate(model, task.teacher, task.plan, task.train(0), task.forward, mode="ls", progress=False)
    elif case.rate is not None:
        torch.manual_seed(case.seed)
        freeze_embeddings(model)
        facts = trained(task, model, case, steps)
    seconds = time.perf_counter() - started
    figures = {"validation": task.measure(model, task.validation), "test": task.measure(model, task.test)}
    return (
        {"way": case.way, "half": case.half, "rate": case.rate, "seed": case.seed, "seconds": seconds} | figures | facts
    )


def trained(task: Task, model: nn.Module, case: Case, steps: int) -> dict[str, Any]:
    """Train ``model`` in place; what its report says, or that the loss was not finite."""
    assert case.rate is not None
    try:
        report = obc.recover(
            model,
            task.teacher,
            task.train(case.seed),
            steps=steps,
            lr=case.rate,
            train=case.way,  # type: ignore[arg-type]
            plan=task.plan,
            distillation=task.distillation,
            progress=False,
        )
    except ValueError as error:
        return {"failed": str(error)}
    losses = {"first_loss": report.losses[0], "last_loss": report.losses[-1]}
    return {"trained_parameters": report.trained_parameters} | losses


def best(rows: Sequence[Mapping[str, Any]], way: str, sign: int) -> Mapping[str, Any] | None:
    """The case of the first seed with the best validation figure."""
    found = [row for row in rows if row["way"] == way and row["seed"] == 0 and "failed" not in row]
    found = [row for row in found if math.isfinite(row["validation"])]
    return max(found, key=lambda row: sign * row["validation"], default=None)


def next_case(rows: Sequence[Mapping[str, Any]], seeds: int, sign: int) -> Case | None:
    """The first case that is still to run, None where all are done."""
    done = {Case(row["way"], row["half"], row["seed"]) for row in rows}
    for way in UNTRAINED:
        if Case(way) not in done:
            return Case(way)
    for way in TRAINED:
        middle = best(rows, way, sign)
        half = START[way] if middle is None else middle["half"]
        for case in (Case(way, half), Case(way, half - 1), Case(way, half + 1)):
            if case not in done:
                return case
    for seed in range(1, seeds):
        for way in TRAINED:
            chosen = best(rows, way, sign)
            assert chosen is not None
            if (case := Case(way, chosen["half"], seed)) not in done:
                return case
    return None


def run(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], facts: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The cases that are not done, until the time is over."""
    sign, started = 1 if arguments.model == "encoder" else -1, time.monotonic()
    task: Task | None = None
    sizes = {name: getattr(arguments, name) for name in ("steps", "sequences", "length", "share")}
    while (case := next_case(rows, arguments.seeds, sign)) is not None:
        if time.monotonic() - started > 60 * arguments.minutes:
            return
        task = task or TASKS[arguments.model](**sizes)
        row = measured(task, case, arguments.steps)
        rate = "" if case.rate is None else f"lr {case.rate:.1e} seed {case.seed}"
        print(
            f"{case.way:12} {rate:20} {row['validation']:9.4f} {row['test']:9.4f} {row['seconds']:7.1f} s", flush=True
        )
        rows.append({"model": arguments.model, **sizes, **row, "provenance": facts})
        yield rows[-1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_recovery")
    parser.add_argument("--model", choices=TASKS, default="encoder")
    parser.add_argument("--share", type=float, default=0.25, help="of the feed-forward parameters that goes (0.25)")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (%(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="to validate, and to test, each (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after that")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    default = RESULTS / "bench_recovery_MODEL.json"
    parser.add_argument("--out", nargs="?", type=Path, const=default, help="write JSON, and resume")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts, out = provenance(1, arguments.threads), arguments.out
    if out is not None:
        out = out.with_name(out.name.replace("MODEL", arguments.model))
    rows = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    sizes = ("model", "steps", "sequences", "length", "share")
    mine = [row for row in rows if all(row[name] == getattr(arguments, name) for name in sizes)]
    for row in run(arguments, mine, facts):
        rows.append(row)
        if out is not None:  # after each case: a run takes long
            write(out, facts, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
