"""Integers in a model's own modules that hold a width, such as ``n_embd`` in ``qkv.split(self.n_embd)``.

Channels that such an integer counts can't go unless it changes with them: the model does not run, and the group is left
out. So a group that failed is tried again with the integers that equal its width, in the modules that contain its
layers. Only those without which it does not run as well are changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.evaluation import Run
from obc.model.names import named_modules, outer_names
from obc.model.shared_copy import shared_copy
from obc.structures.comparison import run_alike
from obc.structures.extensible import Extensible
from obc.structures.probed_groups import first_proved
from obc.structures.proof import Proof
from obc.structures.traced_groups import Found
from obc.structures.transformers.block import Block, count_down
from obc.structures.transformers.layers import Counter


def offer_counted(structure: Extensible, failed: Sequence[Found], run: Run, proof: Proof) -> None:
    """Let the structure have the traced groups that are proved once the integers that hold their width change.

    Args:
        structure: receives groups, and what counts their units.
        failed: the traced groups that failed.
        run: see :func:`obc.structures.proof.prove`.
        proof: of the groups so far; the results for all groups together replace its own.
    """
    reasons = dict(structure.left_out)
    blocks = {one.name: Block(one.group) for one in failed if one.group is not None}
    proposals = {name: with_widths(structure, iter([block]), run, alone=False) for name, block in blocks.items()}
    accepted = first_proved(structure, proposals, run, proof)
    structure.left_out.update({name: reasons[name] for name in proposals if name not in accepted})
    if accepted:
        proof.left_out |= proof.again(structure, run)


def with_widths(structure: Extensible, blocks: Iterator[Block], run: Run, alone: bool = True) -> Iterator[Block]:
    """Each block, if it may be proved as it is (``alone``), then with the integers that hold its width, if any do."""
    for block in blocks:
        if alone:
            yield block
        if counters := _needed(structure, block, run):
            yield replace(block, counters=(*block.counters, *counters))


def _equal(model: nn.Module, block: Block) -> list[Counter]:
    """The integers, of the group's layers and modules that contain them, that equal the width of a slice there."""
    found: dict[tuple[str, str], Counter] = {(one.module, one.attribute): one for one in block.counters}
    modules = {name: one for name, one in named_modules(model) if not type(one).__module__.startswith("torch.nn.")}
    for part in block.group.slices:
        for name in modules.keys() & {part.module, *outer_names(part.module)}:
            for key, value in vars(modules[name]).items():
                if key[0] != "_" and type(value) is int and value == part.channels.numel() and value > 1:
                    found.setdefault((name, key), Counter(name, key, part.channels.shape[1]))
    return [one for one in found.values() if one not in block.counters]


def _needed(structure: Extensible, block: Block, run: Run) -> list[Counter]:
    """Those of the integers that must change for the model to run, and to compute the same, without half of the units.

    Attributes of one name in modules of one class change together.
    """
    if not (counters := _equal(structure.model, block)):
        return []
    gone = block.group.size // 2
    tried: Any = structure.twin(shared_copy(structure.model))
    tried.blocks[block.group.name] = block
    tried.offer(block.group)
    tried.remove({block.group.name: torch.arange(gone, device="cpu")})
    model, modules = tried.model, dict(tried.model.named_modules())
    whole = dict(structure.model.named_modules())
    counters = [one for one in counters if _value(modules, one) == _value(whole, one)]  # no size of a torch layer
    kinds: dict[tuple[type, str], list[Counter]] = {}
    for one in counters:
        kinds.setdefault((type(modules[one.module]), one.attribute), []).append(one)
    count_down(modules, replace(block, counters=tuple(counters)), gone)
    if (expected := _outputs(model, run)) is None:
        return []
    needed = []
    for ones in kinds.values():
        count_down(modules, replace(block, counters=tuple(ones)), -gone)
        found = _outputs(model, run)
        if found is None or not all(map(torch.equal, found, expected)):
            needed += ones
            count_down(modules, replace(block, counters=tuple(ones)), gone)
    return needed


def _value(modules: Mapping[str, nn.Module], counter: Counter) -> Any:
    return vars(modules[counter.module])[counter.attribute]


def _outputs(model: nn.Module, run: Run) -> list[Tensor] | None:
    """What the model returns; None if it does not run."""
    try:
        return run_alike(model, run)
    except Exception:  # the model may raise anything
        return None
