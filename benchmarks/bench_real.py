"""Pruned pretrained models without training: ``python -m benchmarks.bench_real --model smollm2``.

Models and data: :mod:`benchmarks.real_tasks`. A case is a draw of the data, a selection, a share that goes (of the
parameters that can be pruned, heads and feed-forward channels competing; of EfficientNet of the MACs) and a way of
compensation. Ours and the peers' are in ``METHODS``: each peer as it was published, by its own formula, allocation and
update; and some of their choices with our compensation.

The measure of every test sample (sequence, sentence, crop) is a number, smaller is better: the mean loss
of its tokens, one minus a cosine, disagreement. The table shows the mean, of losses exp(mean), the perplexity, and the
difference to ``jacobian+correct`` with its standard error over the samples of all draws, paired: above zero is worse.

Cases that the file of ``--out`` already has are not run again, so that a run can be stopped and started; each says
which commit made it. ``--minutes`` ends a run after the case in which they are over.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import obc
from benchmarks.harness import RESULTS, provenance, write
from benchmarks.real_table import tables
from benchmarks.real_tasks import TASKS, Task
from obc.criteria import KFACOBS, Jacobian, Subject, get
from obc.criteria.obs import OBS
from obc.criteria.protocol import MeasuredCriterion
from obc.criteria.rows import read_rows
from obc.criteria.scoring import group_scores
from obc.integrations.transformers import TransformersStructure
from obc.model.evaluation import evaluating
from obc.recovery.consumers import find_consumers
from obc.recovery.mean_bias import absorb_means
from obc.recovery.moments import Solution
from obc.scoring.label_free import Metric, label_free_loss
from obc.selection.search import Search

SHARES = (0.125, 0.25, 0.375, 0.5)


@dataclass(frozen=True)
class Selection:
    """How units are chosen.

    Attributes:
        criterion: a name or an object.
        options: of ``obc.prune``; what is a function is called with the number of blocks.
        inner: layers that write a residual stream keep their outputs.
        metric: rows are of random projections of the outputs in this metric (``obc.scoring.label_free_loss``), in
            place of the task's loss.
        uniform: blocks of a transformers model keep equal widths.
    """

    criterion: Any
    options: Mapping[str, Any]
    inner: bool = False
    metric: Metric | None = None
    uniform: bool = False

    @classmethod
    def of(
        cls,
        criterion: Any,
        *,
        inner: bool = False,
        metric: Metric | None = None,
        uniform: bool = False,
        **options: Any,
    ) -> Selection:
        return cls(criterion, options, inner, metric, uniform)


SELECTIONS: dict[str, Selection] = {
    "default": Selection.of(None),  # of obc.prune with compensation: it tries criteria; in steps only
    "jacobian": Selection.of("jacobian"),
    "jacobian-uniform": Selection.of("jacobian", allocation="uniform"),
    "jacobian-capped": Selection.of("jacobian", max_pruning_ratio=0.8),
    "jacobian-search": Selection.of("jacobian", allocation=Search(generations=8, offspring=6, batches=4)),
    "jacobian-single": Selection.of("jacobian", selection="independent"),
    "token-jacobian": Selection.of("token_jacobian"),
    "output-jacobian": Selection.of("jacobian", metric="euclidean"),
    "output-token-jacobian": Selection.of("token_jacobian", metric="euclidean"),
    "output-token-jacobian-single": Selection.of("token_jacobian", metric="euclidean", selection="independent"),
    "kl-jacobian": Selection.of("jacobian", metric="kl"),
    "kl-token-jacobian": Selection.of("token_jacobian", metric="kl"),
    "kl-token-jacobian-single": Selection.of("token_jacobian", metric="kl", selection="independent"),
    # What from_pretrained loads: one feed-forward width and one number of heads for all blocks.
    "kl-token-jacobian-equal": Selection.of("token_jacobian", metric="kl", uniform=True),
    "kl-token-jacobian-shares": Selection.of("token_jacobian", metric="kl", uniform=True, allocation="uniform"),
    "compensated": Selection.of("compensated_jacobian"),
    "jacobian-inner": Selection.of("jacobian", inner=True),
    "kfac": Selection.of("kfac"),
    "kfac-obs": Selection.of("kfac_obs"),
    # Centred: BatchNorms take the means of what goes.
    "kfac-obs-inner": Selection.of(KFACOBS(centred=True), inner=True),
    "flap": Selection.of("flap"),
    "wanda-sp": Selection.of("wanda_sp"),
    # As its script runs it: an eighth of the blocks at the start and a sixteenth at the end whole (4 and 2 of Llama's
    # 32), equal shares of the others.
    "llm-pruner": Selection.of("llm_pruner_element", protected_blocks=lambda depth: (round(depth / 8), depth // 16)),
    "output-llm-pruner": Selection.of(
        "llm_pruner_element",
        metric="euclidean",
        protected_blocks=lambda depth: (round(depth / 8), depth // 16),
    ),
    "slimgpt": Selection.of("slimgpt"),
    # Local scores of Tyr; widths by evolution, of fewer generations than published.
    "tyr": Selection.of(
        OBS(first_order=True), allocation=Search(generations=4, offspring=6, batches=4, starts=("uniform",))
    ),
    "minitron": Selection.of("minitron"),
    "magnitude": Selection.of("l2"),
}
COMPENSATION = ("none", "mean", "grail", "obs", "ls", "correct", "steps")
# "steps": scored, pruned and compensated again in every step.
_STEPS: Mapping[str, Any] = {"steps": 4, "compensate": "correct", "compensate_every_step": True}
OURS = (
    "jacobian+correct",
    "jacobian+none",
    "token-jacobian+correct",
    "jacobian+steps",
    "token-jacobian+steps",
    "output-jacobian+correct",
    "output-jacobian+steps",
    "output-token-jacobian-single+steps",
    "kl-token-jacobian+correct",
    "kl-token-jacobian+steps",
    "kl-token-jacobian-single+steps",
    "kl-token-jacobian-equal+steps",
    "kl-token-jacobian-shares+steps",
    "compensated+correct",
    "kfac+correct",
    "kfac-obs+correct",
    "jacobian-uniform+correct",
    "jacobian-search+correct",
)
PEERS = (
    "flap+mean",
    "wanda-sp+none",
    "llm-pruner+none",
    "slimgpt+obs",
    "tyr+obs",
    "minitron+none",
    "magnitude+none",
    "magnitude+grail",
    "wanda-sp+grail",
)
MIXED = (
    "output-llm-pruner+none",
    "tyr+correct",
    "flap+correct",
    "slimgpt+correct",
    "wanda-sp+correct",
    "llm-pruner+correct",
)
METHODS = (*OURS, *PEERS, *MIXED)
# Relative to the mean diagonal of the Gram matrix: GRAIL's, and that of the published codes of SlimGPT and its kin.
_GRAIL_RIDGE = 1e-3
_OBS_RIDGE = 1e-2


class Once(MeasuredCriterion):
    """A criterion that scores the unpruned model once, for every share.

    ``measure`` gives scores, and ``measure_rows``, of criteria that have rows, the rows for joint selection.
    """

    def __init__(self, criterion: Any) -> None:
        self.criterion = get(criterion)
        self.allocation = getattr(self.criterion, "allocation", None)
        self.per_cost = getattr(self.criterion, "per_cost", True)
        self._found: dict[str, Tensor] | None = None
        self._rows: dict[str, Tensor] | None = None
        if isinstance(self.criterion, Jacobian) or hasattr(self.criterion, "measure_rows"):
            self.measure_rows = self._measure_rows

    def measure(self, subject: Subject) -> dict[str, Tensor]:
        if hasattr(self, "measure_rows"):
            return {name: rows.double().square().sum(0) for name, rows in self.measure_rows(subject).items()}
        self._found = self._found or group_scores(self.criterion, subject)
        return self._found

    def _measure_rows(self, subject: Subject) -> dict[str, Tensor]:
        if self._rows is None:
            if isinstance(self.criterion, Jacobian):
                read = read_rows(replace(subject, slices="gate")).rows
                rows = {group.name: group.gate_rows(read) for group in subject.groups}
                self._rows = {name: values for name, values in rows.items() if values is not None}
            else:
                self._rows = self.criterion.measure_rows(subject)
        return self._rows


def prune(task: Task, selection: Selection, share: float, kinds: str = "all") -> obc.PruningResult:
    """A copy without that share."""
    model = copy.deepcopy(task.model)
    structure = None
    if task.example_inputs is None:
        which = {} if kinds == "all" else {"kinds": (kinds,)}
        structure = TransformersStructure(model, uniform=selection.uniform, **which)
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    chosen = {name: value(depth) if callable(value) else value for name, value in selection.options.items()}
    options = {"criterion": selection.criterion, "steps": 1, "progress": False, "verify": False, **task.options}
    loss = task.loss
    if selection.metric is not None:
        loss = label_free_loss(task.forward, metric=selection.metric)
    return obc.prune(
        model,
        task.example_inputs,
        task.calibration,
        loss,
        **{task.unit: 1 - share},
        labels=task.labels,
        ignored_layers=task.streams if selection.inner else (),
        structure=structure,
        forward_fn=task.forward,
        **options | chosen,
    )


def compensated(task: Task, pruned: nn.Module, plan: obc.PruningPlan, how: str) -> tuple[nn.Module, dict[str, Any]]:
    """A compensated copy, and what its report says; with "steps" ``pruned`` is compensated already."""
    model, start = copy.deepcopy(pruned), time.perf_counter()
    facts: dict[str, Any] = {}
    if how == "mean":
        absorb_means(model, task.model, plan, task.calibration, task.forward)
    elif how in ("grail", "obs"):
        reconstruct(task, model, plan, how)
    elif how not in ("none", "steps"):
        report = obc.compensate(model, task.model, plan, task.calibration, task.forward, mode=how, progress=False)
        facts = {"held_out_naive": report.naive_error, "held_out_final": report.final_error}
        facts |= {"stream_bytes": report.stream_bytes, "moment_bytes": report.moment_bytes}
    return model, facts | {"seconds": time.perf_counter() - start}


@torch.no_grad()
def reconstruct(task: Task, model: nn.Module, plan: obc.PruningPlan, how: str) -> None:
    """W' = W B for every consumer at once, G = E[x xT] of the unpruned model, no intercept, no held-out data.

    "grail" (arXiv 2602.23795): B = G_:P (G_PP + lambda I)^-1.
    "obs": Optimal Brain Surgeon with G + lambda I: kept rows of B are the identity, dropped ones as above.
    """
    with evaluating(task.model):
        consumers = find_consumers(model, task.model, plan)
        moments = {name: consumer.moments(paired=False) for name, consumer in consumers.items()}
        for batch in task.calibration:
            for name, calls in inputs(task.model, list(consumers), batch, task.forward).items():
                for x in calls:
                    moments[name].add_inputs(consumers[name].rows(x))
    for name, consumer in consumers.items():
        if how == "obs":
            consumer.apply(moments[name].solve(_OBS_RIDGE, intercept=False))
            continue
        sums = moments[name]
        gram = sums.gram / sums.rows
        cross = torch.zeros(len(gram), sums.size, gram.shape[2], dtype=gram.dtype)
        cross.scatter_(1, sums.kept[..., None].expand_as(gram), gram)
        cross.scatter_(1, sums.regressed[..., None].expand_as(sums.cross), sums.cross / sums.rows)
        ridge = _GRAIL_RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(gram.shape[2])
        mapped = torch.linalg.solve(gram + ridge, cross, left=False)
        consumer.apply(Solution(mapped[0] if len(mapped) == 1 else mapped, None, 0.0, 0.0, _GRAIL_RIDGE))


def inputs(
    model: nn.Module, names: Sequence[str], batch: Any, forward_fn: Callable[..., Any]
) -> dict[str, list[Tensor]]:
    """The inputs of the modules ``names`` in one forward pass, one per call; by name, in the order of first calls."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, []).append((args[0] if args else next(iter(kwargs.values()))).detach().clone())

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        forward_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# --- cases ---------------------------------------------------------------------------------------------------------

Key = tuple[Any, ...]
_NAMED = ("model", "kinds", "draw", "selection", "share", "compensation", "calibration", "test", "length")


def key_of(case: Mapping[str, Any]) -> Key:
    return tuple(case[name] for name in _NAMED)


def run(arguments: argparse.Namespace, done: set[Key]) -> Iterator[dict[str, Any]]:
    """The cases that are not done: by draw, selection and share, so that each is scored and pruned once.

    Apart from "steps": there the criterion scores anew in every step.
    """
    sizes = {"calibration": arguments.calibration, "test": arguments.test, "length": arguments.length}
    selections: dict[tuple[str, bool], list[str]] = {}
    for method in arguments.methods:
        name, _, how = method.partition("+")
        selections.setdefault((name, how == "steps"), []).append(how)
    for draw in arguments.draws:
        make = _once(lambda draw=draw: TASKS[arguments.model](draw, *sizes.values()))
        facts = {"model": arguments.model, "kinds": arguments.kinds, "draw": draw, **sizes}
        unpruned = facts | {"selection": "none", "share": 0.0, "compensation": "none"}
        if key_of(unpruned) not in done:
            yield _measured(make(), make().model, unpruned)
        for (name, in_steps), ways in selections.items():
            chosen = SELECTIONS[name]
            if in_steps:
                chosen = replace(chosen, options={**chosen.options, **_STEPS})
            else:
                chosen = replace(chosen, criterion=Once(chosen.criterion))
            for share in arguments.shares:
                cases = [facts | {"selection": name, "share": share, "compensation": how} for how in ways]
                cases = [case for case in cases if key_of(case) not in done]
                if not cases:
                    continue
                task, start = make(), time.perf_counter()
                result = prune(task, chosen, share, arguments.kinds)
                pruning = {"pruning_seconds": time.perf_counter() - start}
                for case in cases:
                    model, more = compensated(task, result.model, result.plan, case["compensation"])
                    yield _measured(task, model, case | more | pruning)


def _once(make: Callable[[], Task]) -> Callable[[], Task]:
    made: list[Task] = []

    def get_task() -> Task:
        if not made:
            made.append(make())
        return made[0]

    return get_task


def _measured(task: Task, model: nn.Module, case: dict[str, Any]) -> dict[str, Any]:
    with evaluating(model):
        losses = [value for batch in task.test for value in task.measure(model, batch)]
    shown = task.shown(statistics.mean(losses))
    print(
        f"draw {case['draw']} {case['share']:6.1%} {case['selection']:18} {case['compensation']:8} {shown:9.4f}",
        flush=True,
    )
    return case | {"losses": [round(loss, 6) for loss in losses], "shown": shown, "what": task.what}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_real")
    parser.add_argument("--model", choices=TASKS, default="smollm2")
    parser.add_argument("--kinds", choices=("all", "ffn"), default="all", help="groups that are pruned (%(default)s)")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, help="selection+compensation (default: all of METHODS)"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--calibration", type=int, default=64, help="sequences (%(default)s)")
    parser.add_argument("--test", type=int, default=64, help="sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", nargs="?", type=Path, const=RESULTS / "bench_real.json", help="write JSON, and resume")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    for method in arguments.methods:
        selection, _, how = method.partition("+")
        known_method = selection in SELECTIONS and how in COMPENSATION
        if not known_method or (SELECTIONS[selection].criterion is None and how != "steps"):
            known = f"selections {', '.join(SELECTIONS)}; compensation {', '.join(COMPENSATION)}; default+steps alone"
            parser().error(f"--methods takes SELECTION+COMPENSATION, got {method!r}; {known}")
    torch.set_num_threads(arguments.threads)
    start, facts, out = time.perf_counter(), provenance(1, arguments.threads), arguments.out
    cases = json.loads(out.read_text())["cases"] if out is not None and out.exists() else []
    for case in run(arguments, {key_of(case) for case in cases}):
        cases.append(case | {"commit": facts["commit"]})
        if out is not None:  # after each case: a run takes long
            write(out, facts, cases=cases)
        if time.perf_counter() - start > 60 * arguments.minutes:
            print("the minutes are over: run again to go on")
            break
    for title, lines in tables(cases):
        print("\n".join(["", title, *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
