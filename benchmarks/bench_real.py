"""Pruned pretrained models without training: ``python -m benchmarks.bench_real --model smollm2``.

Models and texts: :mod:`benchmarks.real_sources`. A case is a draw of texts, a criterion, a share of the parameters of
the model's blocks that goes (heads and feed-forward channels compete), and a way of compensation. Calibration and test
come from different documents: the Debian handbook calibrates, the developer's reference tests.

What is measured, for every test sequence, is the mean loss of its tokens. The table shows exp(mean over sequences), the
perplexity, and the difference to the best criterion of the same draw, share and compensation with its standard error
over the sequences, paired.

Criteria are those of ``obc.prune`` by name, with the allocation that each was published with. Cases that the file of
``--out`` already has are not run again, so that a run can be stopped and started; each says which commit made it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc
from benchmarks import real_sources
from benchmarks.harness import RESULTS, provenance, write

SHARES = (0.125, 0.25, 0.375, 0.5)
CRITERIA = (
    "jacobian",
    "compensated_jacobian",
    "flap",
    "wanda_sp",
    "minitron",
    "llm_pruner_element",
    "slimgpt",
    "l2",
)
COMPENSATION = ("none", "mean", "ls", "correct")


@dataclass
class Task:
    """A model and its batches.

    Attributes:
        model: unpruned.
        blocks: how many of its parameters stand in its blocks.
        calibration: batches.
        test: one batch a sequence.
        loss: of a batch, for criteria.
        forward: what compensation preserves.
        measure: of a pruned model on one test batch; smaller is better.
        shown: what the table shows of the mean.
    """

    model: nn.Module
    blocks: int
    calibration: list[Any]
    test: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    forward: Callable[[nn.Module, Any], Any]
    measure: Callable[[nn.Module, Any], float]
    shown: Callable[[float], float]


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def language_model(model: nn.Module, calibration: Tensor, test: Tensor) -> Task:
    """A task of a causal language model of the transformers library."""
    blocks: Any = model.get_submodule("model.layers")

    @torch.no_grad()
    def measure(pruned: nn.Module, tokens: Tensor) -> float:
        return float(next_token_loss(pruned, tokens))

    return Task(
        model.eval(),
        sum(parameter.numel() for parameter in blocks.parameters()),
        [tokens[None] for tokens in calibration],
        [tokens[None] for tokens in test],
        next_token_loss,
        lambda model, tokens: model(input_ids=tokens, use_cache=False).logits,
        measure,
        math.exp,
    )


def smollm2(draw: int, calibration: int, test: int, length: int) -> Task:
    model, tokenizer = real_sources.smollm2()
    texts = real_sources.handbook(), real_sources.reference()
    counts = calibration, test
    pieces = [
        real_sources.sequences(tokenizer, text, count, length, draw) for text, count in zip(texts, counts, strict=True)
    ]
    return language_model(model, *pieces)


def tiny(draw: int, calibration: int, test: int, length: int) -> Task:
    """Random weights, for a test of the harness: no figure of it says anything."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    generator = torch.Generator().manual_seed(draw)
    texts = [torch.randint(64, (count, length), generator=generator) for count in (calibration, test)]
    return language_model(LlamaForCausalLM(config), *texts)


TASKS = {"smollm2": smollm2, "tiny": tiny}


def prune(task: Task, criterion: str, share: float) -> obc.PruningResult:
    """A copy without that share of the blocks' parameters."""
    total = sum(parameter.numel() for parameter in task.model.parameters())
    return obc.prune(
        copy.deepcopy(task.model),
        None,
        task.calibration,
        task.loss,
        params=1 - share * task.blocks / total,
        criterion=criterion,
        steps=1,
        forward_fn=task.forward,
        progress=False,
    )


def compensated(task: Task, pruned: nn.Module, plan: obc.PruningPlan, how: str) -> tuple[nn.Module, dict[str, Any]]:
    """A compensated copy, and what its report says."""
    model, start = copy.deepcopy(pruned), time.perf_counter()
    facts: dict[str, Any] = {}
    if how == "mean":
        from obc.recovery.mean_bias import absorb_means

        absorb_means(model, task.model, plan, task.calibration, task.forward)
    elif how != "none":
        report = obc.compensate(model, task.model, plan, task.calibration, task.forward, mode=how, progress=False)
        facts = {"held_out_naive": report.naive_error, "held_out_final": report.final_error}
        facts |= {"stream_bytes": report.stream_bytes, "moment_bytes": report.moment_bytes}
    return model, facts | {"seconds": time.perf_counter() - start}


Key = tuple[str, int, str, float, str, int, int, int]


def key_of(case: Mapping[str, Any]) -> Key:
    names = ("model", "draw", "criterion", "share", "compensation", "calibration", "test", "length")
    return tuple(case[name] for name in names)  # type: ignore[return-value]


def run(arguments: argparse.Namespace, done: set[Key]) -> Iterator[dict[str, Any]]:
    """The cases that are not done."""
    sizes = {"calibration": arguments.calibration, "test": arguments.test, "length": arguments.length}
    for draw in arguments.draws:
        task: Task | None = None
        facts = {"model": arguments.model, "draw": draw, **sizes}
        for criterion, share in [("none", 0.0), *((c, s) for c in arguments.criteria for s in arguments.shares)]:
            ways = ["none"] if criterion == "none" else arguments.compensation
            cases = [facts | {"criterion": criterion, "share": share, "compensation": how} for how in ways]
            cases = [case for case in cases if key_of(case) not in done]
            if not cases:
                continue
            task = task or TASKS[arguments.model](draw, **sizes)
            result = None if criterion == "none" else prune(task, criterion, share)
            for case in cases:
                if result is None:
                    model, more = task.model, {}
                else:
                    model, more = compensated(task, result.model, result.plan, case["compensation"])
                losses = [task.measure(model, batch) for batch in task.test]
                shown = task.shown(statistics.mean(losses))
                print(f"draw {draw} {criterion:22} {share:6.1%} {case['compensation']:8} {shown:9.3f}", flush=True)
                yield case | more | {"losses": losses, "shown": shown}


def table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per criterion and share: by compensation the figure, and its difference to the best with its error."""
    lines = [f"{'model':8} {'draw':>4} {'share':>6} {'criterion':22} " + " ".join(f"{how:>24}" for how in COMPENSATION)]
    found = {(c["model"], c["draw"], c["share"], c["criterion"], c["compensation"]): c for c in cases}
    for model, draw, share, criterion in dict.fromkeys(key[:4] for key in found):
        cells = []
        for how in COMPENSATION:
            case = found.get((model, draw, share, criterion, how))
            cells.append(f"{'-':>24}" if case is None else _cell(case, _rivals(found, case)))
        lines.append(f"{model:8} {draw:4} {share:6.1%} {criterion:22} " + " ".join(cells))
    return lines


def _rivals(found: Mapping[Any, Mapping[str, Any]], case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    same = ("model", "draw", "share", "compensation", "calibration", "test", "length")
    return [other for other in found.values() if all(other[name] == case[name] for name in same)]


def _cell(case: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> str:
    best = min(rivals, key=lambda other: statistics.mean(other["losses"]))
    differences = [mine - its for mine, its in zip(case["losses"], best["losses"], strict=True)]
    if best is case or len(differences) < 2:
        return f"{case['shown']:9.2f} {'(best)' if best is case else '':>14}"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{case['shown']:9.2f} {statistics.mean(differences):+7.3f} ± {error:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_real")
    parser.add_argument("--model", choices=TASKS, default="smollm2")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--compensation", nargs="+", choices=COMPENSATION, default=COMPENSATION)
    parser.add_argument("--calibration", type=int, default=64, help="sequences (%(default)s)")
    parser.add_argument("--test", type=int, default=64, help="sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", nargs="?", type=Path, const=RESULTS / "bench_real.json", help="write JSON, and resume")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts = provenance(1, arguments.threads)
    out = arguments.out
    cases = json.loads(out.read_text())["cases"] if out is not None and out.exists() else []
    for case in run(arguments, {key_of(case) for case in cases}):
        cases.append(case | {"provenance": facts})
        if out is not None:  # after each case: a run takes long
            write(out, facts, cases=cases)
    print("\n".join(table(cases)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
