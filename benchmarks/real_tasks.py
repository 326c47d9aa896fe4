"""The pretrained models of ``bench_real``, each with its calibration and test data and its measure.

SmolLM2 and the sentence encoder: the Debian handbook calibrates, the developer's reference tests. EfficientNet-Lite0:
cut-outs on photographs calibrate, photographs of ImageNet test. A draw is the seed that says which pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import real_sources
from obc.demo import pretrained
from obc.demo.real import embed

_SENTENCES = 16  # of the encoder that stand for one sequence of a language model: as many tokens, about
_CROPS = 32  # images, likewise


@dataclass
class Task:
    """A model and its batches.

    Attributes:
        model: unpruned.
        calibration: batches.
        test: batches.
        loss: of a batch, for criteria.
        forward: what compensation preserves.
        measure: of a pruned model on one test batch, a number for each of its samples; smaller is better.
        shown: what the table shows of their mean.
        what: that is, in words.
        unit: of what a share goes: "blocks" (parameters that can be pruned) or "macs".
        example_inputs: where the model is traced.
        labels: whether ``loss`` is one; else the model's outputs alone are scored.
        options: of ``obc.prune``.
        streams: names of layers that write a residual stream, where the model is traced.
    """

    model: nn.Module
    calibration: list[Any]
    test: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    forward: Callable[[nn.Module, Any], Any]
    measure: Callable[[nn.Module, Any], list[float]]
    shown: Callable[[float], float]
    what: str
    unit: str = "blocks"
    example_inputs: Any = None
    labels: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    streams: tuple[str, ...] = ()


# --- language models -----------------------------------------------------------------------------------------------


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean over the batch's tokens."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def language_model(model: nn.Module, calibration: Tensor, test: Tensor) -> Task:
    """A task of a causal language model of the transformers library, one sequence a batch."""

    @torch.no_grad()
    def measure(pruned: nn.Module, tokens: Tensor) -> list[float]:
        return [float(next_token_loss(pruned, tokens))]

    return Task(
        model.eval(),
        [tokens[None] for tokens in calibration],
        [tokens[None] for tokens in test],
        next_token_loss,
        lambda model, tokens: model(input_ids=tokens, use_cache=False).logits,
        measure,
        math.exp,
        "perplexity",
    )


def smollm2(draw: int, calibration: int, test: int, length: int) -> Task:
    model, tokenizer = pretrained.smollm2()
    texts = real_sources.handbook(), real_sources.reference()
    counts = calibration, test
    pieces = [
        real_sources.sequences(tokenizer, text, count, length, draw) for text, count in zip(texts, counts, strict=True)
    ]
    return language_model(model, *pieces)


def tiny_llama() -> Any:
    """Random weights, for tests of benchmarks: no figure of it says anything. Its vocabulary has 64 tokens."""
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
    return LlamaForCausalLM(config)


def tiny(draw: int, calibration: int, test: int, length: int) -> Task:
    """:func:`tiny_llama` on random tokens."""
    generator = torch.Generator().manual_seed(draw)
    texts = [torch.randint(64, (count, length), generator=generator) for count in (calibration, test)]
    return language_model(tiny_llama(), *texts)


# --- the sentence encoder ------------------------------------------------------------------------------------------


def minilm(draw: int, calibration: int, test: int, length: int) -> Task:
    """Sentences; the measure is one minus the cosine to the unpruned model's embedding. ``length`` is not used."""
    model, tokenizer = pretrained.encoder()

    def batches(text: str, count: int) -> list[Mapping[str, Tensor]]:
        found = real_sources.sentences(text, count * _SENTENCES, draw)
        found.sort(key=len)  # those of like length together, so that hardly any position is padding
        parts = [found[start : start + _SENTENCES] for start in range(0, len(found), _SENTENCES)]
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(draw)).tolist()
        return [dict(tokenizer(parts[place], padding=True, return_tensors="pt")) for place in order]

    tested = batches(real_sources.reference(), test)
    with torch.no_grad():
        wanted = {id(batch): embed(model, batch) for batch in tested}

    @torch.no_grad()
    def measure(pruned: nn.Module, batch: Mapping[str, Tensor]) -> list[float]:
        return (1 - (embed(pruned, batch) * wanted[id(batch)]).sum(1)).tolist()

    return Task(
        model,
        batches(real_sources.handbook(), calibration),
        tested,
        contrastive_loss,
        embed,
        measure,
        lambda mean: 1 - mean,
        "cosine to the unpruned model's embedding",
    )


def contrastive_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The two halves of every sentence should find each other among the batch's: no labels are needed."""
    mask = batch["attention_mask"]
    place, half = torch.arange(mask.shape[1]).expand_as(mask), mask.sum(1, keepdim=True) // 2
    first, second = (embed(model, {**batch, "attention_mask": mask * side}) for side in (place < half, place >= half))
    return F.cross_entropy(first @ second.T / 0.05, torch.arange(len(first)))


# --- the image classifier ------------------------------------------------------------------------------------------


def efficientnet(
    draw: int, calibration: int, test: int, length: int, crops: bool = False, development: bool = False
) -> Task:
    """Crops of photographs; the measure is 0 if the class is the unpruned model's, otherwise 1.

    Args:
        draw: seed of the images.
        calibration: batches.
        test: batches.
        length: not used.
        crops: every second calibration image is a crop of a photograph too.
        development: the test images are made like the calibration images, of cut-outs and photographs kept apart.
    """
    from benchmarks import efficientnet_lite, photographs

    # On CPUs convolutions of this layout take half the time.
    model = efficientnet_lite.lite0().to(memory_format=torch.channels_last)
    batches = [
        [batch.contiguous(memory_format=torch.channels_last) for batch in found]
        for found in (
            photographs.calibration_batches(calibration, _CROPS, draw, crops, "rest" if development else "all"),
            photographs.calibration_batches(test, _CROPS, draw, crops, "development")
            if development
            else photographs.test_batches(test, _CROPS, draw),
        )
    ]
    with torch.no_grad():
        wanted = {id(batch): model(batch).argmax(1) for batch in batches[1]}

    @torch.no_grad()
    def measure(pruned: nn.Module, batch: Tensor) -> list[float]:
        return (pruned(batch).argmax(1) != wanted[id(batch)]).float().tolist()

    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        return network(batch)

    return Task(
        model,
        batches[0],
        batches[1],
        loss,
        lambda network, batch: network(batch),
        measure,
        lambda mean: 1 - mean,
        "agreement of the first class with the unpruned model",
        unit="macs",
        example_inputs=batches[0][0][:1],
        labels=False,
        options={"rows": "sample"},
        # The head's outputs are spared too: the classifier reads only one position of each image.
        streams=tuple(name for name, _ in model.named_modules() if name.endswith(("_project_conv", "_conv_head"))),
    )


TASKS: dict[str, Callable[[int, int, int, int], Task]] = {
    "smollm2": smollm2,
    "minilm": minilm,
    "efficientnet": efficientnet,
    "efficientnet-crops": partial(efficientnet, crops=True),
    "efficientnet-development": partial(efficientnet, crops=True, development=True),
    "tiny": tiny,
}
