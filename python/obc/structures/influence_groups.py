"""Groups of layers whose coupled channels tracing does not find, by what each channel influences.

Channels belong together if an input of a layer depends on both. A channel on which most of what a layer reads depends
(the states of a state-space model, a gate for all channels) is not one of that layer's channels, and stays. Channels
that something but a layer reads also stay, with everything that goes together with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from obc.model.evaluation import Run
from obc.model.groups import Side
from obc.model.layouts import layout_of, loose_buffers
from obc.model.names import joined, named_modules
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule, rule_for
from obc.structures.influence import Influence, Source, TooManyPassesError, influences
from obc.structures.probing import reads_channels
from obc.structures.units import Members, Units

Key = tuple[str, int]


@dataclass(eq=False)
class Coupled:
    """Classes of channels that must go together, as running the model shows.

    Attributes:
        layers: the layers whose channels they are.
        members: what each class takes with it.
        size: number of classes that layers read; the others, of channels of the same layers, have higher numbers.
        kinds: (classes,) classes of the same kind take the same numbers of channels of the same layers.
        dims: parameter or buffer outside layers -> its dimension of channels.
    """

    layers: list[str]
    members: Members
    size: int
    kinds: Tensor
    dims: dict[str, int] = field(default_factory=dict)


@dataclass
class Findings:
    """What running the model shows of the layers that tracing leaves out.

    Attributes:
        coupled: what may be pruned.
        reasons: layer -> why none of its channels can be.
        read_elsewhere: those whose channels something but a layer reads.
        passes: number of forward passes.
    """

    coupled: list[Coupled] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    read_elsewhere: set[str] = field(default_factory=set)
    passes: int = 0


def coupled_channels(
    model: nn.Module, run: Run, layers: Collection[str], fixed: Mapping[str, str], taken: Collection[str]
) -> Findings:
    """What running ``model`` shows of ``layers``.

    Args:
        model: it is not changed.
        run: ``run(model)`` calls it, always on the same inputs.
        layers: names of linear and convolutional layers.
        fixed: layer -> why its outputs keep their widths.
        taken: names of layers and parameters whose channels belong to other groups.
    """
    sources = _sources(model, layers, taken)
    try:
        found, passes = influences(model, run, sources)
    except TooManyPassesError as error:
        return Findings(reasons=dict.fromkeys(layers, str(error)))
    findings = Findings(passes=passes)
    wide = {
        key: torch.zeros(sources[key].size, dtype=torch.bool, device="cpu")
        if one.unexamined
        else _wide(one, sources[key].size)
        for key, one in found.items()
    }
    classes = _Classes(model, sources, found, wide)
    blocked = {}
    for key, source in sources.items():
        if source.name in fixed:
            blocked[key] = fixed[source.name]
        elif found[key].ends:
            blocked[key] = f"{found[key].ends[0]} reads its channels"
            findings.read_elsewhere.add(key)
        elif found[key].unexamined:
            blocked[key] = found[key].unexamined
    findings.coupled = classes.components(blocked)
    free = {layer for one in findings.coupled for layer in one.layers}
    for name in layers:
        if name not in free:
            findings.reasons[name] = _why(name, found[name], classes, blocked)
    return findings


def _sources(model: nn.Module, layers: Collection[str], taken: Collection[str]) -> dict[str, Source]:
    """Layers by name, and embeddings and each dimension of parameters and buffers outside layers by other keys."""
    modules = dict(named_modules(model))
    sources = {}
    for name in layers:
        rule, module = layout_of(modules[name]), modules[name]
        if is_recurrent(module):
            sources[name] = Source(name, module.hidden_size)
            continue
        assert rule is not None
        sources[name] = Source(name, rule.sizes(module.weight)[0])  # type: ignore[arg-type]
    for name, module in modules.items():
        rule_ = rule_for(module)
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) or name in taken:
            continue
        for key, tensor in (*module.named_parameters(recurse=False), *loose_buffers(module)):
            full = joined(name, key)
            if isinstance(module, nn.Embedding):
                sources[f"{full}:1"] = Source(name, module.embedding_dim, full, 1)
            elif not isinstance(rule_, Rule) and full not in taken and type(tensor) in (nn.Parameter, Tensor):
                for dim, size in enumerate(tensor.shape):
                    if size > 1:
                        sources[f"{full}:{dim}"] = Source(full, size, full, dim)
    return sources


def _wide(influence: Influence, size: int) -> Tensor:
    """(size,) bool: whether more than half of the inputs of a module that the source reaches depend on the channel."""
    wide = torch.zeros(size, dtype=torch.bool, device="cpu")
    for possible in influence.inputs.values():
        wide |= 2 * possible.sum(0) > possible.any(1).sum()
    return wide


class _Classes:
    """Channels of sources, joined where an input depends on several."""

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Source],
        found: Mapping[str, Influence],
        wide: Mapping[str, Tensor],
    ) -> None:
        self._modules, self._sources, self._wide = dict(named_modules(model)), sources, wide
        sizes = [source.size for source in sources.values()]
        start = dict(zip(sources, itertools.accumulate(sizes, initial=0), strict=False))
        units, first = Units(sum(sizes)), dict[Key, int]()
        for key, influence in found.items():
            for name, possible in influence.inputs.items():
                narrow = possible & ~wide[key]
                for place, channel in narrow.nonzero().tolist():
                    node = start[key] + channel
                    units.join(node, first.setdefault((name, place), node))
        # Key of a source -> the class of each channel; (module, place of its input) -> class.
        self._classes = {key: [units.find(start[key] + one) for one in range(sources[key].size)] for key in sources}
        self._reading = {place: units.find(node) for place, node in first.items()}

    def _members(self) -> dict[int, list[tuple[str, Side, int]]]:
        """Class -> (module, side, channel) of what goes with it."""
        members: dict[int, list[tuple[str, Side, int]]] = {}
        for key, classes in self._classes.items():
            for channel, root in enumerate(classes):
                members.setdefault(root, []).append((self._sources[key].name, "out", channel))
        for (name, place), root in self._reading.items():
            side: Side = "in" if reads_channels(self._modules[name]) else "out"
            members[root].append((name, side, place))
        return members

    def stays(self, blocked: Collection[str]) -> dict[int, str | None]:
        """Class that can't go -> the blocked source that it has channels of, if that is why."""
        stays: dict[int, str | None] = {}
        for key, classes in self._classes.items():
            for root, is_wide in zip(classes, self._wide[key].tolist(), strict=True):
                if key in blocked:
                    stays[root] = key
                elif is_wide:
                    stays.setdefault(root, None)
        return stays

    def classes_of(self, key: str) -> set[int]:
        """The classes of a source's channels."""
        return set(self._classes[key])

    def components(self, blocked: Mapping[str, str]) -> list[Coupled]:
        """The classes that can go, by the layers that they have channels of."""
        stays = self.stays(blocked)
        going = {root: sorted(own) for root, own in self._members().items() if root not in stays}
        read = [root for root, own in going.items() if any(side == "in" for _, side, _ in own)]
        keys = list(self._sources)
        together = Units(len(keys))
        owner: dict[int, int] = {}
        for number, key in enumerate(keys):
            for root in self.classes_of(key) & {*read}:
                together.join(number, owner.setdefault(root, number))
        components: dict[int, list[int]] = {}
        for root in read:
            components.setdefault(together.find(owner[root]), []).append(root)
        unread: dict[int, list[int]] = {}
        for number, key in enumerate(keys):
            for root in sorted(self.classes_of(key) & going.keys() - owner.keys()):
                unread.setdefault(together.find(owner.setdefault(root, number)), []).append(root)
        found = (self._coupled(roots, unread.get(one, []), going) for one, roots in components.items())
        return [one for one in found if one is not None]

    def _coupled(
        self, roots: Sequence[int], unread: Sequence[int], going: Mapping[int, list[tuple[str, Side, int]]]
    ) -> Coupled | None:
        members: Members = {}
        kinds: dict[tuple[tuple[str, str], ...], int] = {}
        numbers = []
        for number, root in enumerate([*roots, *unread]):
            for name, side, channel in going[root]:
                members.setdefault((name, side), {})[channel] = number
            numbers.append(kinds.setdefault(tuple((name, side) for name, side, _ in going[root]), len(kinds)))
        own = [source for key, source in self._sources.items() if not self.classes_of(key).isdisjoint(roots)]
        dims = {source.name: source.dim for source in own if source.name == source.parameter}
        layers = [source.name for source in own if source.parameter is None]
        # A parameter with channels along two dimensions is cut along one only.
        once = len(dims) == sum(source.name == source.parameter for source in own)
        if not layers or not once:
            return None
        return Coupled(layers, members, len(roots), torch.tensor(numbers, device="cpu"), dims)


def _why(name: str, influence: Influence, classes: _Classes, blocked: Mapping[str, str]) -> str:
    """Why no channel of a layer can go."""
    if name in blocked:
        return blocked[name]
    if not any(bool(one.any()) for one in influence.inputs.values()):
        return "no layer was seen to read it when the model ran"
    if (reader := next((one for one, mixed in influence.mixed.items() if mixed), None)) is not None:
        return f"one channel changes most of what {reader!r} reads: an operation between them mixes channels"
    stays = classes.stays(blocked)
    for root in classes.classes_of(name):
        if (other := stays.get(root)) is not None:
            return f"its channels go together with those of {other!r}: {blocked[other]}"
    return "which of its channels go together is not found by running the model"
