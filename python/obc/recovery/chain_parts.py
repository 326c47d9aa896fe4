"""Both models in parts, for work on layers in the order of execution: each part runs from where the last one ended.

Parts are the modules of a chain (:mod:`obc.recovery.segments`). Only the tensors between two of them are kept. Layers
before and after the chain are reached from the models' start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from obc.model.evaluation import ForwardFn, stream_of
from obc.model.names import is_within
from obc.model.processes import Processes
from obc.model.usable_batches import UsableBatches
from obc.recovery.segments import ChainBatch, captured, find_chain, replays

logger = logging.getLogger("obc.compensate")

# With more passes over the calibration data than this, a user should know before they begin.
_MANY_PASSES = 20


@dataclass(frozen=True)
class ChainPart:
    """Layers, and how to run the unpruned and the pruned model far enough for them: on a batch and its number."""

    layers: list[str]
    full: Callable[[Any, int], Any]
    pruned: Callable[[Any, int], Any]

    @classmethod
    def whole(cls, models: tuple[nn.Module, nn.Module], forward: ForwardFn) -> ChainPart:
        """The unpruned and the pruned model from their start to their end."""
        full, pruned = models
        return cls([], lambda batch, number: forward(full, batch), lambda batch, number: forward(pruned, batch))


def agreed_chain(
    model: nn.Module, run: Callable[[], Any], scopes: Mapping[str, str], processes: Processes
) -> tuple[list[str], str]:
    """The chain that contains most of the layers, on all processes; if there is none, also why.

    Args:
        model: the unpruned model.
        scopes: layer -> the innermost module that contains it and its point.
        processes: all must find the same chain.
    """
    chain, why = find_chain(model, run, scopes, list(scopes)), "its modules form no chain"
    if chain and (fault := replays(model, chain, run)) is not None:
        chain, why = [], fault
    (agreed,) = processes.least([len(chain)])
    return (chain, "") if chain and agreed == len(chain) else ([], why)


def say_many_passes(mode: str, passes: int, why: str) -> None:
    """Warn before work that takes many passes over the calibration data."""
    if passes > _MANY_PASSES:
        logger.warning(
            "obc.compensate: mode %r takes about %d forward passes over the calibration data, because every layer is "
            "reached from the model's start: %s; mode 'ls' takes one, and fewer or shorter batches take less time",
            mode,
            passes,
            why,
        )


def parts(
    models: tuple[nn.Module, nn.Module],
    scopes: Mapping[str, str],
    batches: Sequence[UsableBatches],
    forward: ForwardFn,
    processes: Processes,
    norms: bool,
) -> Iterator[ChainPart]:
    """The parts in order; the layers of one may be changed before the next is asked for.

    Args:
        models: the unpruned and the pruned one.
        scopes: layer, in the order of execution -> the innermost module that contains it and its point.
        batches: in lists that share their numbers.
        processes: all get the same parts.
        norms: BatchNorms of the whole model change between two layers, so that there is only one part.
    """
    chain, why = list[str](), "BatchNorms get new statistics before each of them"
    if not norms:
        chain, why = agreed_chain(models[0], partial(forward, models[0], next(iter(batches[0]))), scopes, processes)
    inside = {layer for layer, scope in scopes.items() if any(is_within(scope, name) for name in chain)}
    say_many_passes(
        "seq", (len(scopes) - len(inside)) * (3 if norms else 2), why or "they are in no module of its chain"
    )
    whole = ChainPart.whole(models, forward)
    first = next((place for place, layer in enumerate(scopes) if layer in inside), len(scopes))
    outside = [(place, layer) for place, layer in enumerate(scopes) if layer not in inside]
    yield replace(whole, layers=[layer for place, layer in outside if place < first])
    streams: list[dict[int, ChainBatch]] = [{}, {}] if chain else []
    for model, found in zip(models, streams, strict=False):
        numbered = {some.current: partial(forward, model, batch) for some in batches for batch in some}
        found |= zip(numbered, captured(model, chain, numbered.values()), strict=True)
    for place, name in enumerate(chain):
        full, pruned = (
            partial(_run_module, found, model.get_submodule(name), place)
            for model, found in zip(models, streams, strict=True)
        )
        yield ChainPart([layer for layer in scopes if layer in inside and is_within(scopes[layer], name)], full, pruned)
        for run, found in zip((full, pruned), streams, strict=True):
            for some in batches:
                for batch in some:
                    stream = stream_of(run(batch, some.current))
                    assert stream is not None
                    found[some.current].stream = stream.detach()
    yield replace(whole, layers=[layer for place, layer in outside if place >= first])


def _run_module(streams: Mapping[int, ChainBatch], module: nn.Module, place: int, batch: Any, number: int) -> Any:
    return streams[number].call(module, place)
