"""Quality of a model: perplexity on tokens, accuracy, and agreement with another model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.model.arguments import instance, iterable_batches, positive
from obc.model.evaluation import ForwardFn, call_on_batch, device_of, evaluating, main_output
from obc.model.usable import refuse_non_modules


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and its spread.

    Attributes:
        perplexity: exp of the mean loss per token; infinite beyond 709 nats.
        losses: (windows,) float64: the mean loss of each window's predicted tokens, in nats.
        counts: (windows,) int64: how many tokens each window predicts.
        standard_error: standard error of the mean loss in nats, over windows; nan for a single window.
    """

    perplexity: float
    losses: Tensor
    counts: Tensor
    standard_error: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.2f} (loss ± {self.standard_error:.4f} nats, {int(self.counts.sum())} tokens)"
        )


def perplexity(
    model: Any, tokens: Tensor, *, length: int, stride: int | None = None, batch_size: int = 1
) -> Perplexity:
    """Perplexity of a causal language model on one long text, in windows.

    Windows of ``length`` tokens start every ``stride`` tokens. Each token of the text except the first is predicted
    once, by the first window that contains it, from the tokens before it in that window. With ``stride == length``
    windows don't overlap and each window's first token is not predicted; a smaller stride gives more context and takes
    longer.

    Args:
        model: returns ``.logits`` (batch, length, vocabulary) for ``model(input_ids=...)``; run in eval mode.
        tokens: (N,) token ids of the text.
        length: tokens per window, at least 2.
        stride: tokens between the starts of windows, in [1, length]; None means ``length``.
        batch_size: number of windows run together.

    Raises:
        ValueError: an argument has a wrong value, the text is shorter than two tokens, or a loss is not finite.
    """
    refuse_non_modules(model)
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride), ("batch_size", batch_size)):
        positive(name, value)
    if length < 2 or stride > length:
        raise ValueError(f"length must be at least 2 and stride in [1, length], got length={length}, stride={stride}")
    instance("tokens", tokens, Tensor, "a tensor of token ids")
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"tokens must be one row of at least 2 token ids, got shape {tuple(tokens.shape)}")
    device = device_of(model)
    losses, counts = [], []
    with evaluating(model), torch.inference_mode():
        for group in _window_batches(len(tokens), length, stride, batch_size):
            ids = torch.stack([tokens[start:stop] for start, stop, _ in group]).to(device)
            logits = model(input_ids=ids).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().cpu()
            for row, (_, _, new) in zip(loss, group, strict=True):
                losses.append(row[-new:].mean())
                counts.append(new)
    found, weights = torch.stack(losses), torch.tensor(counts, device="cpu")
    if not bool(found.isfinite().all()):
        raise ValueError(f"the loss of window {int((~found.isfinite()).nonzero()[0])} is not finite")
    mean = (found * weights).sum() / weights.sum()
    error = float(found.std() / math.sqrt(len(found))) if len(found) > 1 else math.nan
    return Perplexity(float(mean.exp()), found, weights, error)


def _window_batches(size: int, length: int, stride: int, batch_size: int) -> Iterable[list[tuple[int, int, int]]]:
    """(start, stop, predicted tokens) of every window, windows of equal length together."""
    windows: list[tuple[int, int, int]] = []
    done = 0  # tokens before this one have been predicted
    for start in range(0, size - 1, stride):
        stop = min(start + length, size)
        new = stop - max(done, start + 1)
        if new > 0:
            windows.append((start, stop, new))
        done = stop
        if stop == size:
            break
    group: list[tuple[int, int, int]] = []
    for window in windows:
        if group and (len(group) == batch_size or window[1] - window[0] != group[0][1] - group[0][0]):
            yield group
            group = []
        group.append(window)
    yield group


def accuracy(model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn = call_on_batch) -> float:
    """The share of samples whose label has the largest logit.

    Args:
        model: run in eval mode; returns logits (B, classes), or an output with ``.logits``.
        batches: (inputs, labels), or mappings with "labels"; one label for each sample.
        forward_fn: ``forward_fn(model, batch)``.

    Raises:
        ValueError: there are no batches; a batch has no labels, or not one for each row of logits; there is one class
            only; a logit is NaN.
        TypeError: ``model`` is no module.
    """

    def right(batch: Any) -> Tensor:
        predicted = _predicted(_tensor(forward_fn(model, batch)))
        labels = _labels(batch)
        _refuse_unlike("accuracy", "labels", labels, "predictions", predicted)
        return predicted == labels.to(predicted.device)

    return _mean("accuracy", (model,), batches, right)


def agreement(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn = call_on_batch
) -> float:
    """The share, in [0, 1], of positions at which both models have the same largest logit along the last dimension.

    Args:
        model: the model to compare; both run in eval mode without gradients.
        reference: the model to compare it with, such as the unpruned one.
        batches: any iterable; labels are not read.
        forward_fn: ``forward_fn(model, batch)`` returns a tensor, or an output that has ``logits``.

    Raises:
        ValueError: there are no batches, or the models' outputs have different shapes or NaN.
        TypeError: a model is no module.
    """

    def same(batch: Any) -> Tensor:
        ours, theirs = (_predicted(_tensor(forward_fn(network, batch))) for network in (model, reference))
        _refuse_unlike("agreement", "the model's predictions", ours, "the reference's", theirs)
        return ours == theirs

    return _mean("agreement", (model, reference), batches, same)


def cosine(
    model: nn.Module, reference: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn = call_on_batch
) -> float:
    """Mean cosine similarity, in [-1, 1], of the two models' outputs along the last dimension.

    Args:
        model: the model to compare; both run in eval mode without gradients.
        reference: the model to compare it with, such as the unpruned one.
        batches: any iterable; labels are not read.
        forward_fn: ``forward_fn(model, batch)`` returns a tensor, or an output that has ``logits``.

    Raises:
        ValueError: there are no batches, or the models' outputs have different shapes or NaN.
        TypeError: a model is no module.
    """

    def similarity(batch: Any) -> Tensor:
        ours, theirs = (_numbers(_tensor(forward_fn(network, batch))).float() for network in (model, reference))
        _refuse_unlike("cosine", "the model's outputs", ours, "the reference's", theirs)
        return F.cosine_similarity(ours, theirs, dim=-1)

    return _mean("cosine", (model, reference), batches, similarity)


def _mean(figure: str, models: Sequence[nn.Module], batches: Iterable[Any], values: Callable[[Any], Tensor]) -> float:
    """The mean over all entries of ``values(batch)``, with the models in eval mode."""
    for model in models:
        refuse_non_modules(model)
    iterable_batches(batches)
    total, count = 0.0, 0
    with evaluating(*models), torch.inference_mode():
        for batch in batches:
            found = values(batch)
            total += float(found.double().sum())
            count += found.numel()
    if count == 0:
        raise ValueError(f"{figure} got no batches; pass an iterable that is not used up")
    return total / count


def _labels(batch: Any) -> Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"accuracy needs labels, a tensor, and found none in a batch of type {type(batch).__name__}; pass batches "
            "of (inputs, labels), or mappings with 'labels'"
        )
    return labels


def _predicted(logits: Tensor) -> Tensor:
    """The class with the largest logit."""
    if logits.dim() < 2 or logits.shape[-1] < 2:
        raise ValueError(
            f"the model returns {tuple(logits.shape)}, which is not one logit for each of several classes; pass a "
            "forward_fn that does, such as torch.stack([-y, y], -1) of a single logit y"
        )
    return _numbers(logits).argmax(-1)


def _numbers(outputs: Tensor) -> Tensor:
    if bool(outputs.isnan().any()):
        raise ValueError("the model's outputs have NaN; look for it in the weights, and in this batch")
    return outputs


def _refuse_unlike(figure: str, name: str, one: Tensor, other_name: str, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"{figure}: {name} have shape {tuple(one.shape)}, {other_name} {tuple(other.shape)}; they must be the same"
        )


def _tensor(outputs: Any) -> Tensor:
    """The logits, the last hidden state, or the first tensor of a model's outputs."""
    if (found := main_output(outputs)) is None:
        raise ValueError(f"can't find logits in an output of type {type(outputs).__name__}; pass forward_fn")
    return found[1]
