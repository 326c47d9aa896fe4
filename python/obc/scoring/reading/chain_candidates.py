"""Candidates of chains (:mod:`obc.scoring.reading.chains`): what the graph of the checking row suggests."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from obc.scoring.reading.flat_row import Slot

# Graph nodes that are homogeneous of degree one in their first input, by how their names start.
_HOMOGENEOUS = (
    *("Relu", "LeakyRelu", "PreluKernel", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "Mkldnn", "Mean"),
    *("Upsample", "ConstantPad", "View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze", "Transpose"),
    *("Permute", "TBackward", "Expand", "Clone", "Div"),
)
# Nodes that are homogeneous in each input while the others are fixed.
_MULTILINEAR = ("Mul", "Bmm")
_ATTENTION, _VALUES = "ScaledDotProduct", 2  # and the index of its input that holds the values

# Limit of the walk from an input back to the nearest gates; between two layers lie only a few nodes.
_MOST_NODES = 64


# From an input's graph node backwards: for each node its name and which of its inputs the path takes.
Path = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Candidate:
    """The row of ``slot`` may follow from the row of ``source``, or from the gradients of ``norm`` after it.

    Attributes:
        slot: the slot that would need no gate.
        seen_by: the input where the path begins.
        path: the path to the output whose row is ``slot``, or to ``norm``.
        source: another slot; None if ``norm``'s gradients are used.
        norm: the BatchNorm where the path ends, or None if it ends at an output.
    """

    slot: Slot
    seen_by: Slot
    path: Path
    source: Slot | None = None
    norm: nn.Module | None = None

    def holds(self, node: Any, outputs: Mapping[Slot, Any]) -> bool:
        """Whether the path from the input's node ends at the same node as in the checking row."""
        for name, index in self.path:
            if node is None or node.name() != name:
                return False
            node = node.next_functions[index][0]
        if self.norm is not None:
            if node is None or self.norm.training or "BatchNorm" not in node.name():
                return False
            (before, _), (weight, _), *_ = node.next_functions
            if getattr(weight, "variable", None) is not self.norm.weight:
                return False
            node = before
        return self.slot is self.seen_by or (self.slot in outputs and outputs[self.slot] is node)


class Candidates:
    """Collects the chains that the graph of the checking row suggests.

    Args:
        norms: id of a norm's weight -> the norm and its slot.
    """

    def __init__(self, norms: dict[int, tuple[nn.Module, Slot]]) -> None:
        self._norms = norms
        self._found: dict[Candidate, int] = {}
        self._walks: dict[Slot, int] = {}

    def found(self) -> list[Candidate]:
        """The candidates that every use of their input suggested."""
        return [one for one, times in self._found.items() if times == self._walks[one.seen_by]]

    def walk(self, activation: Tensor, slot: Slot) -> None:
        """Follow the graph from ``activation``, an input whose row is in ``slot``, back to the nearest gates."""
        self._walks[slot] = self._walks.get(slot, 0) + 1
        pending: list[tuple[Any, Path, bool]] = [(activation.grad_fn, (), True)]
        for _ in range(_MOST_NODES):
            if not pending:
                return
            node, path, homogeneous = pending.pop()
            name = "" if node is None else node.name()
            if name == "CheckGateBackward":
                if homogeneous and node.watch.keeps_received:
                    self._add(Candidate(node.watch.slot, slot, path, source=slot))
            elif "BatchNorm" in name:
                self._norm(node, path, slot, homogeneous)
            elif node is not None:
                passed = _through(node, name) if homogeneous else ()
                for index, (before, _) in enumerate(node.next_functions):
                    pending.append((before, (*path, (name, index)), index in passed))

    def _norm(self, node: Any, path: Path, slot: Slot, homogeneous: bool) -> None:
        (before, _), (weight, _), *_ = node.next_functions
        norm, own = self._norms.get(id(getattr(weight, "variable", None)), (None, None))
        if norm is None or own is None or norm.training:
            return
        if homogeneous:
            self._add(Candidate(slot, slot, path, source=own, norm=norm))
        if before is not None and before.name() == "CheckGateBackward" and before.watch.keeps_received:
            self._add(Candidate(before.watch.slot, slot, path, norm=norm))

    def _add(self, candidate: Candidate) -> None:
        self._found[candidate] = self._found.get(candidate, 0) + 1


class Pending:
    """Candidates found on one sample, waiting for a row of a whole batch, where every slot has its gate.

    Args:
        candidates: what the graph of the checking row suggested.
    """

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self._by_input: dict[Slot, list[Candidate]] = {}
        for one in candidates:
            self._by_input.setdefault(one.seen_by, []).append(one)
        self._seen: dict[Candidate, list[bool]] = {}

    def begin_row(self) -> None:
        """Forget what a dropped or non-finite row showed."""
        self._seen.clear()

    def look(self, activation: Tensor, slot: Slot, outputs: Mapping[Slot, Any]) -> None:
        """Note whether this row's graph suggests the same; ``outputs``: slot -> the node of its gate."""
        for candidate in self._by_input.get(slot, ()):
            held = candidate.holds(activation.grad_fn, outputs)
            self._seen.setdefault(candidate, []).append(held)

    def found(self) -> list[Candidate]:
        """The candidates that every use of their input suggested."""
        return [candidate for candidate, held in self._seen.items() if all(held)]


def _through(node: Any, name: str) -> Collection[int]:
    """The inputs in which this node is homogeneous."""
    if name.startswith(_HOMOGENEOUS):
        return (0,)
    if name.startswith(_ATTENTION):
        return (_VALUES,)
    return range(len(node.next_functions)) if name.startswith(_MULTILINEAR) else ()
