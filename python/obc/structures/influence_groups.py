"""Groups of layers whose coupled channels tracing does not find, by what each channel influences.

Channels belong together if an input of a layer depends on both. A channel on which most of what a layer reads depends
(the states of a state-space model, a gate for all channels) is not one of that layer's channels, and stays. Channels
that something but a layer reads also stay, with everything that goes together with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from obc.model.evaluation import Run
from obc.model.groups import Side
from obc.model.layouts import (
    attention_parts,
    has_several_weights,
    is_depthwise,
    is_joint_attention,
    layout_of,
    loose_buffers,
)
from obc.model.names import joined, named_modules
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule, rule_for
from obc.structures.contractions import Contractions, contraction_of, is_contraction
from obc.structures.influence import Influence, Source, TooManyPassesError, influences, weight_products
from obc.structures.probing import reads_channels
from obc.structures.removal import size_of
from obc.structures.units import Members, Units
from obc.structures.weight_products import WeightProducts, is_product

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
        in_dims: parameter outside layers -> the dimension along which products read channels.
        gates: of classes that products of activations read, the channels at which all that reads them is seen once;
            of the others, those that layers read. Empty if channels do not end at such products.
    """

    layers: list[str]
    members: Members
    size: int
    kinds: Tensor
    dims: dict[str, int] = field(default_factory=dict)
    in_dims: dict[str, int] = field(default_factory=dict)
    gates: Members = field(default_factory=dict)


@dataclass
class Findings:
    """What running the model shows of the layers that tracing leaves out.

    Attributes:
        coupled: what may be pruned.
        reasons: layer -> why none of its channels can be.
        read_elsewhere: those whose channels something but a layer reads.
        passes: number of forward passes.
        ranks: for so many ranks other channels of weights outside layers may be found.
    """

    coupled: list[Coupled] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    read_elsewhere: set[str] = field(default_factory=set)
    passes: int = 0
    ranks: int = 0


def coupled_channels(
    model: nn.Module,
    run: Run,
    layers: Collection[str],
    fixed: Mapping[str, str],
    taken: Collection[str | tuple[str, Side]],
    rank: int = 0,
    contracted: bool = False,
    other_vectors: Collection[str] = (),
) -> Findings:
    """What running ``model`` shows of ``layers``.

    Args:
        model: it is not changed.
        run: ``run(model)`` calls it, always on the same inputs.
        layers: names of linear and convolutional layers.
        fixed: layer -> why its outputs keep their widths.
        taken: layers and parameters whose channels belong to other groups: by name, or one side of them.
        rank: where weights outside layers share several dimensions with what they multiply, which of them counts.
        contracted: channels end at products of activations that sum over them, and at other sums over them.
        other_vectors: see :func:`obc.structures.norm_axis.other_vectors`.
    """
    products = weight_products(model, run, rank, other_vectors)
    sources = _sources(model, layers, taken, products, other_vectors)
    contractions = Contractions() if contracted else None
    try:
        found, passes = influences(model, run, sources, products, contractions, other_vectors)
    except TooManyPassesError as error:
        return Findings(reasons=dict.fromkeys(layers, str(error)))
    if not found:  # nothing ends at such products
        return Findings(passes=passes)
    _keep_one_dimension(sources, found, rank)
    _number_by_weights(sources, found)
    findings = Findings(passes=passes, ranks=products.ranks)
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
    components = classes.components(blocked)
    findings.coupled = [part for one in components for part in _one_by_one(one, model, sources, found, wide)]
    free = {layer for one in findings.coupled for layer in one.layers}
    for name in layers:
        if name not in free:
            findings.reasons[name] = _why(name, found[name], classes, blocked)
    return findings


def _sources(
    model: nn.Module,
    layers: Collection[str],
    taken: Collection[str | tuple[str, Side]],
    products: WeightProducts,
    other_vectors: Collection[str],
) -> dict[str, Source]:
    """Layers by name, and embeddings and each dimension of parameters and buffers outside layers by other keys.

    Also the dimensions of layers' weights that products use without calling the layers.
    """
    modules = dict(named_modules(model))
    sources = {}
    for name in layers:
        module = modules[name]
        if is_recurrent(module):
            size = module.hidden_size
        else:
            size = size_of(module, "in" if is_joint_attention(module) else "out")
        sources[name] = Source(name, size)
    used = {name for one in products.found for name in one.weights}
    for name, module in modules.items():
        rule, layout = rule_for(module), layout_of(module)
        if has_several_weights(module) or name in taken:
            continue
        own = dict(module.named_parameters(recurse=False))
        for key, tensor in (*own.items(), *loose_buffers(module)):
            full = joined(name, key)
            if isinstance(module, nn.Embedding) and full not in used:
                sources[f"{full}:1"] = Source(name, module.embedding_dim, full, 1)
            elif layout is not None and not used.isdisjoint(joined(name, one) for one in own):
                for dim, side in _sides(module, layout, key).items():
                    if (name, side) not in taken:
                        sources[f"{full}:{dim}"] = Source(name, tensor.shape[dim], full, dim, side)
            elif isinstance(rule, Rule) and name not in other_vectors:
                continue
            elif full not in taken and type(tensor) in (nn.Parameter, Tensor):
                for dim, size in enumerate(tensor.shape):
                    one = f"{full}:{dim}"
                    side = "in" if products.reads(one) else "out"
                    if size > 1 and (full, side) not in taken:
                        sources[one] = Source(full, size, full, dim, side)
    return sources


def _sides(module: nn.Module, layout: Rule, key: str) -> dict[int, Side]:
    """The dimensions of a layer's weight or bias that are its channels -> their side; none of other grouped ones."""
    if key == layout.bias or is_depthwise(module):
        return {0: "out"}
    return {layout.out_axis: "out", layout.in_axis: "in"} if key == layout.weight and layout.groups == 1 else {}  # type: ignore[dict-item]


def _keep_one_dimension(sources: Mapping[str, Source], found: Mapping[str, Influence], rank: int) -> None:
    """Of the dimensions of a tensor whose channels reach the same inputs, forget all but that of this rank.

    Of a spline's coefficients, and of its knots, every dimension but the channels' would join all channels.
    """
    rivals: dict[tuple[str, Side], list[str]] = {}
    for key, source in sources.items():
        if source.name == source.parameter and found[key].inputs and not bool(_wide(found[key], source.size).any()):
            rivals.setdefault((source.name, source.side), []).append(key)
    for keys in rivals.values():
        shared = [
            key
            for key in keys
            if any(found[key].inputs.keys() & found[one].inputs.keys() for one in keys if one != key)
        ]
        for place, key in enumerate(shared):
            if place != min(rank, len(shared) - 1):
                found[key].inputs.clear()


def _number_by_weights(sources: Mapping[str, Source], found: Mapping[str, Influence]) -> None:
    """Of products, let the channels of their weights stand for the places that they read.

    Where each channel has several places, as the coefficients of a spline, a source that changes some places of all
    channels is a wide one.
    """
    weights: dict[str, Tensor] = {}
    for key, source in sources.items():
        weights = {
            name: one for name, one in found[key].inputs.items() if source.side == "in" and is_product(name)
        } | weights
    for name, places in weights.items():
        reading = [influence for influence in found.values() if name in influence.inputs]
        if not any(bool(one.inputs[name][~places.any(1)].any()) for one in reading):
            for one in reading:
                one.inputs[name] = places.T.float() @ one.inputs[name].float() > 0


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
                    units.join(node, first.setdefault((contraction_of(name), place), node))
        same: dict[tuple[str, Side, int], int] = {}
        for key, source in sources.items():  # a layer's weight and bias, and what it reads when it is called
            goes_with_read = source.side == "in" or is_joint_attention(self._modules.get(source.name))
            for channel in range(source.size if source.name != source.parameter else 0):
                node = start[key] + channel
                units.join(node, same.setdefault((source.name, source.side, channel), node))
                if goes_with_read and (source.name, channel) in first:
                    units.join(node, first[source.name, channel])
        # Key of a source -> the class of each channel; (module, place of its input) -> class.
        self._classes = {key: [units.find(start[key] + one) for one in range(sources[key].size)] for key in sources}
        self._reading = {place: units.find(node) for place, node in first.items()}
        self._found = found
        self._contracted = {root for (name, _), root in self._reading.items() if is_contraction(f"{name} ")}

    def _members(self) -> dict[int, list[tuple[str, Side, int]]]:
        """Class -> (module, side, channel) of what goes with it."""
        members: dict[int, list[tuple[str, Side, int]]] = {}
        for key, classes in self._classes.items():
            parts = self._parts(self._sources[key])
            for channel, root in enumerate(classes):
                own = members.setdefault(root, [])
                own += ((name, side, one + channel) for name, side, numbers in parts for one in numbers)
        for (name, place), root in self._reading.items():
            if name not in self._modules:  # a product
                continue
            side: Side = "in" if reads_channels(self._modules[name]) else "out"
            members[root].append((name, side, place))
        return members

    def _parts(self, source: Source) -> list[tuple[str, Side, list[int]]]:
        """(module, side, numbers of that channel) of what goes with channel 0 of a source."""
        module = self._modules.get(source.name)
        if is_joint_attention(module):
            return attention_parts(source.name, module)
        return [(source.name, source.side, [0])]

    def stays(self, blocked: Collection[str]) -> dict[int, str | None]:
        """Class that can't go -> the blocked source that it has channels of, if that is why."""
        read = {root for key, source in self._sources.items() if source.side == "in" for root in self._classes[key]}
        # A weight whose columns are not those of a parameter can't be cut along them.
        stays: dict[int, str | None] = dict.fromkeys(
            root for (name, _), root in self._reading.items() if is_product(name) and root not in read
        )
        for key, classes in self._classes.items():
            if is_joint_attention(self._modules.get(name := self._sources[key].name)):
                # What it reads of the data keeps its width.
                for channel, root in enumerate(classes):
                    if (name, channel) not in self._reading:
                        stays.setdefault(root, None)
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
        read = [root for root, own in going.items() if root in self._contracted or _is_read(own)]
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
        outside = [source for source in own if source.name == source.parameter]
        dims: dict[Side, dict[str, int]] = {
            side: {source.name: source.dim for source in outside if source.side == side} for side in ("out", "in")
        }
        producers = [source for source in own if source.side == "out" and not self._looks_up(source)]
        layers = [source.name for source in producers if source not in outside] or [one.name for one in producers]
        # A parameter is cut along one dimension of each side.
        once = sum(map(len, dims.values())) == len(outside)
        if not once or not layers:
            return None
        names = list(dict.fromkeys(layers))
        gates: Members = {}
        for number, root in enumerate(roots if not self._contracted.isdisjoint(roots) else ()):
            for name, side, channel in self._gates(root, going[root]):
                gates.setdefault((name, side), {})[channel] = number
        return Coupled(names, members, len(roots), torch.tensor(numbers, device="cpu"), dims["out"], dims["in"], gates)

    def _gates(self, root: int, own: Sequence[tuple[str, Side, int]]) -> Iterator[tuple[str, Side, int]]:
        """Where activation times gradient shows all that reads a class: of queries and keys at one of both."""
        if root not in self._contracted:
            yield from (one for one in own if one[1] == "in")
            return
        seen: dict[str, dict[str, list[tuple[str, int]]]] = {}  # source -> what reads it -> (as which operand, channel)
        for key, classes in self._classes.items():
            channels = torch.tensor([one == root for one in classes], device="cpu") & ~self._wide[key]
            for name, inputs in self._found[key].inputs.items() if self._sources[key].parameter is None else ():
                if name not in self._modules or reads_channels(self._modules[name]):
                    places = (inputs & channels).any(0).nonzero()[:, 0].tolist()
                    if places:
                        seen.setdefault(key, {}).setdefault(contraction_of(name), []).extend((name, c) for c in places)
        missing = {name for readers in seen.values() for name in readers}  # what only parameters reach has no rows
        while missing:
            key = max(seen, key=lambda one: len(missing & seen[one].keys()))
            for name in missing & seen[key].keys():
                operand = min(seen[key][name])[0]
                channels_read = {channel for one, channel in seen[key][name] if one == operand}
                yield from self._behind(key, channels_read)
            missing -= seen[key].keys()

    def _behind(self, key: str, channels: Collection[int]) -> Iterator[tuple[str, Side, int]]:
        """These channels of a source, or behind the last norm that they pass before anything else reads them."""
        norm = None
        for name in self._found[key].inputs:
            if name not in self._modules or reads_channels(self._modules[name]):
                break
            norm = name if next(self._modules[name].parameters(recurse=False), None) is not None else norm
        if norm is None:
            yield from ((self._sources[key].name, "out", channel) for channel in channels)
        else:
            reached = self._found[key].inputs[norm][:, list(channels)].any(1)
            yield from ((norm, "out", place) for place in reached.nonzero()[:, 0].tolist())

    def _looks_up(self, source: Source) -> bool:
        return isinstance(self._modules.get(source.name), nn.Embedding)


def _one_by_one(
    coupled: Coupled,
    model: nn.Module,
    sources: Mapping[str, Source],
    found: Mapping[str, Influence],
    wide: Mapping[str, Tensor],
) -> list[Coupled]:
    """The channels of each layer alone if all go together, as where every pair of two layers' channels is multiplied.

    Of an outer product one layer's channels can go while those of the other stay.
    """
    own = [key for key in sources if sources[key].name in coupled.layers]
    if coupled.size > 1 or len(own) < 2:
        return [coupled]
    return [
        one
        for key in own
        for one in _Classes(model, {key: sources[key]}, {key: found[key]}, {key: wide[key]}).components({})
    ]


def _is_read(members: Sequence[tuple[str, Side, int]]) -> bool:
    return any(side == "in" for _, side, _ in members)


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
