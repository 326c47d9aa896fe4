"""``obc demo --real``: a pretrained model from a Python package, pruned and compensated without training.

Calibration and test texts are different topics of the language reference included in Python (``pydoc_data.topics``), so
nothing is downloaded.
"""

from __future__ import annotations

import copy
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obc
from obc.demo import pretrained
from obc.files import save_figure
from obc.model.evaluation import LossFn
from obc.scoring.label_free import label_free_loss

# Chosen so that two CPU cores need a few minutes. With a quarter of the sequences compensation gains nothing.
_CALIBRATION, _TEST, _LENGTH = 32, 24, 128  # for the language model: sequences, and tokens per sequence
_SENTENCES, _BATCH = 96, 16  # for the encoder: sentences, both to calibrate and to test, and batch size
_PROMPTS = ("The capital of France is", "A function in Python is defined with")
_QUERIES = ("How do I open a file?", "Comparing two numbers", "What happens when an error is raised?")
_NEW_TOKENS = 16


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained model, its data, and what to show of it.

    Attributes:
        title: its name.
        model: the unpruned model.
        calibration: calibration batches.
        loss: loss of a batch, for the Jacobian Criterion.
        forward: outputs that compensation preserves.
        measure: figure of a pruned model on the test texts.
        what: the name of that figure.
        texts: (prompt, answer) pairs that show what a model does.
        shares: shares of the prunable parameters to remove, one after another.
        data: the calibration and test data, in words.
    """

    title: str
    model: nn.Module
    calibration: Sequence[Any]
    loss: LossFn
    forward: Callable[[nn.Module, Any], Any]
    measure: Callable[[nn.Module], float]
    what: str
    texts: Callable[[nn.Module], list[tuple[str, str]]]
    shares: tuple[float, ...]
    data: str


@dataclass(frozen=True)
class PrunedModel:
    """One pruned model.

    Attributes:
        share: removed share of the prunable parameters.
        parameters: number of remaining parameters.
        naive: the figure after pruning alone.
        compensated: after :func:`obc.compensate`.
    """

    share: float
    parameters: int
    naive: float
    compensated: float


@dataclass(frozen=True)
class Result:
    """The results that the demo shows: figures, and answers of the unpruned and the last pruned model."""

    title: str
    what: str
    data: str
    parameters: int
    unpruned: float
    points: tuple[PrunedModel, ...]
    before: list[tuple[str, str]]
    after: list[tuple[str, str]]
    seconds: float


def documents(seed: int) -> tuple[str, str]:
    """Text for calibration and text for testing, from different topics."""
    texts = [re.sub(r"[ \t]+", " ", topics[name]) for name in sorted(topics)]
    random.Random(seed).shuffle(texts)
    return "\n\n".join(texts[::2]), "\n\n".join(texts[1::2])


def run(name: str, seed: int = 0, say: Callable[[str], None] = print) -> Result:
    """Prune the model to every share in turn, and compensate a copy of each.

    Args:
        name: one of ``SUBJECTS``.
        seed: selects the topics for calibration and testing.
        say: called with a line before each long part.

    Raises:
        ImportError: a package is missing; the message says how to get it.
    """
    return compare(SUBJECTS[name](seed), say)


def compare(subject: PretrainedModel, say: Callable[[str], None]) -> Result:
    """:func:`run` for any subject."""
    start, shares = time.perf_counter(), subject.shares
    found: list[PrunedModel] = []
    last: list[nn.Module] = []

    def keep(result: obc.PruningResult) -> None:
        share = shares[len(found)]
        say(f"Compensating the model without {share:.1%} of its prunable parameters")
        model = copy.deepcopy(result.model)
        naive = subject.measure(model)
        obc.compensate(
            model, subject.model, result.plan, subject.calibration, subject.forward, mode="correct", progress=False
        )
        found.append(PrunedModel(share, count(model), naive, subject.measure(model)))
        last[:] = [model]

    say(f"Scoring and pruning {subject.title}")
    kept = [1 - share for share in shares]
    obc.prune(
        copy.deepcopy(subject.model),
        None,
        subject.calibration,
        subject.loss,
        criterion="token_jacobian",
        blocks=kept[-1],
        steps=kept,
        forward_fn=subject.forward,
        on_step=keep,
        progress=False,
    )
    say("Asking the unpruned and the smallest model")
    return Result(
        subject.title,
        subject.what,
        subject.data,
        count(subject.model),
        subject.measure(subject.model),
        tuple(found),
        subject.texts(subject.model),
        subject.texts(last[0]),
        time.perf_counter() - start,
    )


def count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


# --- subjects ------------------------------------------------------------------------------------------------------


def language_model(model: Any, tokenizer: Any, seed: int, title: str) -> PretrainedModel:
    """A causal language model of the transformers library: perplexity, and how it continues a prompt."""
    calibration, test = (
        _sequences(tokenizer, text, number, seed)
        for text, number in zip(documents(seed), (_CALIBRATION, _TEST), strict=True)
    )

    def forward(network: Any, tokens: Tensor) -> Tensor:
        return network(input_ids=tokens, use_cache=False).logits

    def loss(network: Any, tokens: Tensor) -> float:
        return float(F.cross_entropy(forward(network, tokens)[0, :-1].float(), tokens[0, 1:]))

    @torch.no_grad()
    def measure(network: Any) -> float:
        return math.exp(sum(loss(network, tokens) for tokens in test) / len(test))

    @torch.no_grad()
    def texts(network: Any) -> list[tuple[str, str]]:
        found = []
        for prompt in _PROMPTS:
            tokens = torch.tensor([tokenizer(prompt)["input_ids"]], device="cpu")
            for _ in range(_NEW_TOKENS):
                best = network(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, best], 1)
            answer = tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True)
            found.append((prompt, " ".join(answer.split())[len(prompt) :].strip()))
        return found

    return PretrainedModel(
        title,
        model.eval(),
        calibration,
        label_free_loss(forward, metric="kl"),
        forward,
        measure,
        "perplexity",
        texts,
        (0.1, 0.2),
        f"{len(calibration)} sequences of {_LENGTH} tokens calibrate, {len(test)} of other documents test",
    )


def _sequences(tokenizer: Any, text: str, number: int, seed: int) -> list[Tensor]:
    tokens = torch.tensor(tokenizer(text)["input_ids"], device="cpu")
    pieces = tokens[: len(tokens) // _LENGTH * _LENGTH].reshape(-1, 1, _LENGTH)
    return list(
        pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed), device="cpu")[:number]]
    )


def sentence_encoder(model: Any, tokenizer: Any, seed: int, title: str) -> PretrainedModel:
    """A BERT-like model: cosine to the unpruned model's embeddings, and the sentence nearest to a query."""
    (first, second), found = documents(seed), []
    for text in (first, second):
        split = re.split(r"(?<=[.!?])\s", re.sub(r"\s+", " ", text))
        sentences = sorted({one for one in split if 6 <= len(one.split()) <= 25})
        found.append(random.Random(seed).sample(sentences, min(_SENTENCES, len(sentences))))
    test = found[1]

    def batches(sentences: Sequence[str]) -> list[Mapping[str, Tensor]]:
        ordered = sorted(sentences, key=len)
        parts = [ordered[start : start + _BATCH] for start in range(0, len(ordered), _BATCH)]
        random.Random(seed).shuffle(parts)
        return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]

    tested = batches(test)
    model = model.eval()
    with torch.no_grad():
        wanted = [embed(model, batch) for batch in tested]

    @torch.no_grad()
    def measure(network: nn.Module) -> float:
        cosines = [(embed(network, batch) * unpruned).sum(1) for batch, unpruned in zip(tested, wanted, strict=True)]
        return float(torch.cat(cosines).mean())

    @torch.no_grad()
    def texts(network: nn.Module) -> list[tuple[str, str]]:
        known = torch.cat([embed(network, dict(tokenizer([one], return_tensors="pt"))) for one in test])
        asked = embed(network, dict(tokenizer(list(_QUERIES), padding=True, return_tensors="pt")))
        return [(query, test[int(place)]) for query, place in zip(_QUERIES, (asked @ known.T).argmax(1), strict=True)]

    return PretrainedModel(
        title,
        model,
        batches(found[0]),
        label_free_loss(embed),
        embed,
        measure,
        "cosine to the unpruned embeddings",
        texts,
        (0.2, 0.4),
        f"{len(found[0])} sentences calibrate, {len(test)} of other documents test",
    )


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, features) unit vectors: the mean over a sentence's tokens."""
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


SUBJECTS: dict[str, Callable[[int], PretrainedModel]] = {
    "encoder": lambda seed: sentence_encoder(*pretrained.encoder(), seed, "all-MiniLM-L6-v2"),
    "smollm2": lambda seed: language_model(*pretrained.smollm2(), seed, "SmolLM2-135M-Instruct"),
}


# --- printing and drawing -----------------------------------------------------------------------------------------


def shown(result: Result) -> str:
    """The figures as a table, and texts before and after."""
    head = f"{'parameters':>12} {'size':>9} {'went':>6} {'naive':>9} {'compensated':>12}"
    lines = [f"{result.title}: {result.what}; {result.data}", head]
    size = lambda parameters: f"{4 * parameters / 2**20:5.0f} MiB"  # noqa: E731
    lines.append(f"{result.parameters:12,} {size(result.parameters)} {'':6} {result.unpruned:9.3f}  (unpruned)")
    for point in result.points:
        lines.append(
            f"{point.parameters:12,} {size(point.parameters)} {point.share:6.1%} {point.naive:9.3f} "
            f"{point.compensated:12.3f}"
        )
    share = result.points[-1].share
    for (prompt, before), (_, after) in zip(result.before, result.after, strict=True):
        lines += ["", prompt, f"  unpruned:       {before}", f"  without {share:5.1%}:  {after}"]
    return "\n".join(lines)


def draw(result: Result, path: Path) -> None:
    """The figures over the shares, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    shares = [0.0, *(100 * point.share for point in result.points)]
    for label, style, values in (
        ("as pruning left it", "o--", [point.naive for point in result.points]),
        ("compensated, no training", "s-", [point.compensated for point in result.points]),
    ):
        axis.plot(shares, [result.unpruned, *values], style, label=label)
    axis.set_title(f"{result.title}, {result.parameters:,} parameters", loc="left", fontsize=11)
    axis.set_xlabel("% of the prunable parameters removed")
    axis.set_ylabel(result.what)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path, 130)
