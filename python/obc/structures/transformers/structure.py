"""Pruning transformers models by their own blocks: slicing, sizes, config and plan, without tracing."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from obc.model.arguments import several
from obc.model.costs import Costs
from obc.model.depth import BlockList, Depth, compact, expand, is_compact, original_names, outer_lists, with_lists
from obc.model.evaluation import call
from obc.model.groups import DEPTH_KINDS, ChannelGroup
from obc.model.names import is_within
from obc.model.plan import PruningPlan, refuse_non_plans
from obc.model.refusals import computed_weights, refuse_fresh_weights, refuse_unprunable
from obc.model.usable import refuse_non_modules
from obc.structures.memory import MemoryUse
from obc.structures.proof import Proof, prove
from obc.structures.protocol import Limits, Unit
from obc.structures.transformers.block import Block
from obc.structures.transformers.blocks import DEFAULT_KINDS, Finder, uncovered
from obc.structures.transformers.cache import CachedLayer, cached_layers
from obc.structures.transformers.calibration import Calibration, calibrate
from obc.structures.transformers.config import ModelConfig
from obc.structures.transformers.costs import TransformerCosts, macs_for_one_token
from obc.structures.transformers.depth import FoundDepth, find_depth, merged, without_unit
from obc.structures.transformers.family import kinds as known_kinds
from obc.structures.transformers.weights import BlockWeights, lies_in
from obc.structures.transformers.widths import Expressible, equal_widths, expressible_widths
from obc.structures.units import checked_units, layer_name
from obc.structures.varied import varied_inputs

# torch's grouped products want rows that begin at multiples of this many bytes.
_GROUPED_BYTES = 16


def transformer_groups(model: nn.Module, kinds: Sequence[str] = DEFAULT_KINDS) -> list[ChannelGroup]:
    """The coupled channels of a transformers model, in the order of its modules.

    =================== ==============================================================================================
    kind                one unit
    =================== ==============================================================================================
    "ffn"               a channel between the projections of a feed-forward block, plain or gated
    "heads"             a head of keys and values with the query heads that share it; without sharing a head. Where all
                        query heads share one, as "query_heads". Of latent attention, a head's rows of the second
                        projections
    "query_heads"       the j-th query head of every head of keys and values; not among the default kinds
    "experts"           an expert of a mixture, with its row of the router
    "expert_ffn"        the f-th inner channel of every expert of a mixture whose experts are one tensor
    "mamba"             an inner channel of Mamba's mixer
    "mixer_heads"       a head of a recurrent mixer: of Mamba-2 one head of every group, of the gated delta rule a key
                        head with its value heads; of Zamba, xLSTM, RecurrentGemma and MiniMax one head
    "mixer_channels"    an inner channel of a mixer without heads: RWKV, gated convolutions of LFM and of conformers
    "inverted_residual" a channel between the widening and the narrowing convolution of an inverted residual
    "embedding"         a channel of the residual stream, everywhere; not among the default kinds
    "layers"            a whole block; not among the default kinds (:mod:`obc.structures.transformers.depth`)
    "sublayers"         a residual branch: an attention, a feed-forward block, a mixer; not among the default kinds
    =================== ==============================================================================================

    Slices of tensors outside ordinary layers have the tensor's name as module. Experts stored as one tensor are one
    layer: whole experts are its outputs, their inner channels its inputs. Parts that the scorer has no rule for (up
    projections of such experts, Mamba's A_log and D) are named by ``scores.group``.

    Args:
        model: a model of the transformers library, or one built and named like it: Llama, Qwen, Mistral, Gemma, OPT,
            GPT-2, BERT, ViT, Mixtral, Mamba, DeepSeek and similar.
        kinds: kinds of groups to find.

    Raises:
        ValueError: an unknown kind, "query_heads" together with "heads", or a model that has groups neither of these
            kinds nor of the default ones.
    """
    refuse_non_modules(model)
    several("kinds", kinds)
    depth_kinds = _checked_depth(kinds, uniform=False)
    finder = _found(model, [kind for kind in kinds if kind not in DEPTH_KINDS])
    units = find_depth(model, finder.layers.modules, depth_kinds).units if depth_kinds else {}
    found = [block.group for block in finder.blocks.values()] + [unit.group for unit in units.values()]
    if not found and not (others := _found(model, DEFAULT_KINDS)).blocks:
        reasons = "".join(f"; {name}: {reason}" for name, reason in [*others.left_out.items()][:1])
        raise ValueError(
            f"{type(model).__name__} has no block of the transformers library{reasons}; for another model pass "
            "example_inputs to obc.prune, or take TorchPruningStructure(model, example_inputs).groups of "
            "obc.structures.traced"
        )
    return found


def _checked_depth(kinds: Sequence[str], uniform: bool) -> list[str]:
    """The kinds among these that are whole blocks and branches."""
    found = [kind for kind in kinds if kind in DEPTH_KINDS]
    others = [kind for kind in kinds if kind not in DEPTH_KINDS]
    if found and "embedding" in others:
        raise ValueError(f"{found[0]!r} and 'embedding' change the same weights; prune by one kind, then by the other")
    if found and others and uniform:
        raise ValueError(
            f"uniform=True keeps equal widths of {', '.join(map(repr, others))}, which do not compete with "
            f"{found[0]!r}; prune by one, then with plan= by the other"
        )
    return found


def _found(model: nn.Module, kinds: Sequence[str]) -> Finder:
    if unknown := set(kinds) - set(known_kinds()):
        known = ", ".join(map(repr, (*known_kinds(), *DEPTH_KINDS)))
        raise ValueError(f"kinds are {known}, got {sorted(unknown)[0]!r}")
    if {"heads", "query_heads"} <= set(kinds):
        raise ValueError("'heads' and 'query_heads' remove the same query heads; prune by one kind, then by the other")
    return Finder(model, kinds)


def _computed(model: nn.Module, finder: Finder) -> dict[str, str]:
    """Take groups with a computed weight out of the finder's blocks: group -> why it is left out."""
    reasons = computed_weights(model)
    found = {
        name: reason
        for name, unknown in finder.left_out.items()
        for layer, reason in reasons.items()
        if f"{layer}.parametrizations." in unknown
    }
    for name, block in list(finder.blocks.items()):
        inside = [layer for part in block.group.slices for layer in reasons if is_within(part.module, layer)]
        if inside:
            found[name] = reasons[inside[0]]
            del finder.blocks[name]
    return found


def _names_inside(modules: Mapping[str, nn.Module], layers: Sequence[nn.Module | str]) -> set[str]:
    """The names of these layers, of the modules inside them, and of their parameters."""
    several("ignored_layers", layers)
    found: set[str] = set()
    for name in (layer_name(modules, layer, "ignored_layers") for layer in layers):
        inside = [inner for inner in modules if is_within(inner, name)]
        found |= set(inside)
        found |= {f"{inner}.{key}" for inner in inside for key, _ in modules[inner].named_parameters()}
    return found


class TransformersStructure:
    """The prunable groups of a transformers model; see ``obc.pruning.Structure`` and :func:`transformer_groups`.

    A unit is removed from every weight, from the modules' own counts of heads, channels and experts, and, if all layers
    then agree, from the config, so that ``save_pretrained`` and ``from_pretrained`` round-trip. Otherwise, or if the
    architecture can't express the widths, the config keeps the unpruned model's values, ``config_refused`` and
    ``warnings`` say why, and :func:`save_pruned` saves the model. The model's own routing renormalises what remains of
    a router, as if the removed experts' logits were minus infinity. Norms over the residual stream ("embedding") cover
    what remains.

    Args:
        model: the model, pruned in place by :meth:`remove`.
        kinds: kinds of groups, see :func:`transformer_groups`.
        uniform: make ``obc.prune`` keep equal widths in all layers, and only widths that the config can express; units
            are ranked within each layer. If the config has no key for fewer units of a kind (heads of BERT, GPT-2,
            OPT), all of them stay, and ``left_out`` says so.
        round_to: make it keep channel widths that are multiples of this; heads and experts are never rounded. Channels
            of fused experts stay multiples of 16 bytes in any case, because grouped products need it.
        ignored_layers: modules, or names of modules, whose groups, including those of all modules inside, are left
            alone.
        sequence_length: number of tokens for which MACs count the products of queries, keys and values; 0 omits these
            products.
        example_inputs: if given, every group is tried on copies of the model and left out if its removal is wrong
            (:mod:`obc.structures.proof`). Otherwise ``obc.prune`` does this on its first batch.
        plan: the plan of earlier pruning of the same model by another structure; this structure continues it.

    Attributes:
        left_out: module that looks like a block -> why it can't be pruned; with all default kinds, also unknown modules
            of repeated blocks; with ``uniform``, also the first group of those whose number of units the config has no
            key for.
        uniform: the argument of that name.
        saved_with_plan: set it to True if :func:`save_pruned` will save the model: what ``save_pretrained`` would do is
            no warning then.
        weights: the blocks' weights, and the modules that hold them.
        config: the model's config, rewritten after every removal.
        proof: the result for every group; None if none was tried.

    Raises:
        PlanError: the model can't be pruned as it is (:mod:`obc.model.refusals`).
        ValueError: an unknown kind; a ``round_to`` below 1; an ignored layer that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Sequence[str] = DEFAULT_KINDS,
        *,
        uniform: bool = False,
        round_to: int | None = None,
        ignored_layers: Sequence[nn.Module | str] = (),
        sequence_length: int = 0,
        example_inputs: Any = None,
        plan: PruningPlan | None = None,
    ) -> None:
        refuse_unprunable(model, computed=False)
        depth_kinds = _checked_depth(kinds, uniform)
        if plan is not None:
            refuse_non_plans(plan)
            expand(model, plan.depth)
        if round_to is not None and round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {round_to}")
        self.model, self.uniform, self._sequence_length = model, uniform, sequence_length
        self._round_to = round_to or 1
        finder = _found(model, [kind for kind in kinds if kind not in DEPTH_KINDS])
        modules = finder.layers.modules
        found = find_depth(model, modules, depth_kinds) if depth_kinds else FoundDepth()
        every_kind = set(DEFAULT_KINDS) <= {*kinds}
        unknown = uncovered(finder.layers, finder.blocks, finder.left_out) if every_kind else {}
        self.left_out = finder.left_out | unknown | found.left_out | _computed(model, finder)
        ignored = _names_inside(modules, ignored_layers)
        self._depth_units = {
            name: unit for name, unit in found.units.items() if not any(unit.holds(layer) for layer in ignored)
        }
        self._depth = found.depth if plan is None else merged(found.depth, plan.depth)
        self._lists = outer_lists(model)
        blocks = {
            name: block
            for name, block in finder.blocks.items()
            if not any(part.side == "out" and part.module in ignored for part in block.group.slices)
        }
        self.weights = BlockWeights(modules, blocks, plan or {})
        self.config = ModelConfig(getattr(model, "config", None), list(blocks.values()))
        self._expressible = Expressible({}, {}, {})
        if uniform:
            self._expressible = expressible_widths(model, blocks, self.weights.axes, self._multiple)
            self.left_out = self.left_out | dict(self._expressible.refused)
        self._calibration: Calibration | None = None
        self._cached: list[CachedLayer] | None = None
        self.saved_with_plan = False
        self.proof: Proof | None = None
        if example_inputs is not None:
            varied = varied_inputs(example_inputs)
            self.proof = prove(self, lambda copied: call(copied, varied))

    @property
    def blocks(self) -> dict[str, Block]:
        """The blocks behind the groups, by name."""
        return self.weights.blocks

    @property
    def config_refused(self) -> str | None:
        """Why the config could not be adapted to the widths, or None."""
        return self.config.refused

    @property
    def plan(self) -> PruningPlan:
        """The channels that every layer kept so far, in terms of the unpruned model."""
        return PruningPlan(self.weights.kept, with_lists(self._depth, self._lists, self.weights.kept))

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The present model's groups, in the order of its modules; whole blocks and branches at the end."""
        return (*(block.group for block in self.blocks.values()), *(unit.group for unit in self._depth_units.values()))

    @property
    def limits(self) -> Limits:
        """The widths that ``obc.prune`` may choose: as many experts as tokens are routed to, rounding, equal widths."""
        multiples = {name: self._multiple(block) for name, block in self.blocks.items()}
        return Limits(
            {name: block.min_units for name, block in self.blocks.items()} | dict.fromkeys(self._depth_units, 0),
            {
                name: math.lcm(multiple, self._expressible.multiples.get(name, 1))
                for name, multiple in multiples.items()
            },
            [
                *(name for name, block in self.blocks.items() if known_kinds()[block.group.kind].whole),
                *self._depth_units,
            ],
            equal_widths(self.blocks) if self.uniform else (),
            self._expressible.widths,
        )

    @property
    def warnings(self) -> list[str]:
        """Warnings about the present model: what it can't do any more."""
        narrower = [block for block in self.blocks.values() if block.group.name in self.weights.kept]
        told = list(dict.fromkeys(block.warning for block in narrower if block.warning))
        if self.config_refused is None or self.saved_with_plan:
            return told
        storable = hasattr(self.model.config, "to_dict")  # configs of other libraries, such as diffusers', have none
        remedy = (
            "use obc.structures.transformers.save_pruned and load_pruned" if storable else "save state_dict and plan"
        )
        return [
            *told,
            "save_pretrained would write a folder that from_pretrained can't load, because the config is still the "
            f"unpruned model's ({self.config_refused}); {remedy}",
        ]

    def costs(self, unit: Unit) -> Costs:
        """Parameters, active parameters, or MACs, by ``unit``: for one token, or calibrated.

        See :mod:`obc.structures.transformers.costs`.
        """
        return self._counting().costs(unit, self._sequence_length, self._calibration)

    def memory(self, use: MemoryUse) -> Costs:
        """Bytes of weights, buffers and the cache: see :class:`obc.structures.memory.MemoryUse`.

        The first call that counts a cache makes the model fill one with one token.

        Raises:
            PruningError: the model does not run on one token, or returns no key/value cache.
        """
        counting = self._counting()
        if use.length and self._cached is None:
            found = cached_layers(self.model, counting.blocks)
            self._cached = [replace(layer, module=counting.names[layer.module]) for layer in found]
        cached = [layer for layer in self._cached or () if use.length and not self._depth.without(layer.module)]
        return counting.memory(use, cached)

    def _counting(self) -> TransformerCosts:
        blocks, depth = list(self.blocks.values()), list(self._depth_units.values())
        names = original_names(self.model, self._depth)
        return TransformerCosts(self.model, blocks, depth, self.weights.slices_by_axis(), names)

    def calibrate(self, counted: Mapping[str, float]) -> None:
        """Use the MACs that the model executes, if they differ from those for one token by more than a percent.

        Layers may see other numbers of positions than tokens (stages of an image model, convolutions, routed experts),
        and queries, keys and values are multiplied without a weight. Call it before anything is removed.

        Args:
            counted: the model's MACs on a batch, from :func:`obc.structures.counted_macs.counted_macs`.
        """
        self._calibration = calibrate(counted, macs_for_one_token(self.model), list(self.blocks.values()))

    def remove(self, units: Mapping[str, Tensor]) -> None:
        """Remove these units of each named group and record it in the plan; if this raises, nothing is removed.

        Raises:
            KeyError: no group has the name.
            IndexError: a group has no such unit.
            ValueError: too little would be left of a group, or :meth:`compact` was called before.
        """
        if self._depth and is_compact(self.model, self._depth):
            raise ValueError(
                "compact() deleted blocks from the model's lists, so groups have other names; continue with "
                "TransformersStructure(model, plan=structure.plan)"
            )
        if not (chosen := checked_units(self.groups, units, self.limits.min_units)):
            return
        vanishing = [self._depth_units[name] for name in chosen if name in self._depth_units]
        self.weights.remove(
            {
                name: indices
                for name, indices in chosen.items()
                if name in self.blocks and not lies_in(vanishing, self.blocks[name])
            }
        )
        for unit in sorted(vanishing, key=lambda one: one.group.kind != "layers"):
            if unit.group.name in self._depth_units:  # it may lie inside one removed just now
                self.weights.remove_module(self.model, unit)
                self._depth_units = {name: one for name, one in self._depth_units.items() if not unit.holds(name)}
                self._depth = without_unit(self._depth, unit)
        self.config.adapt(self.model, self.weights, self._depth)

    def compact(self) -> None:
        """Delete the removed blocks from their lists, where stand-ins kept their places until now.

        Caches and the config count what is left; modules after a removed block move up and are renamed. :attr:`plan`
        keeps the names of the unpruned model. ``obc.prune`` does this at its end. A removed branch keeps a stand-in
        that adds nothing, which no config can express: :func:`save_pruned` saves such a model, and ``save_pretrained``
        raises, because ``from_pretrained`` would fill the branch with fresh weights.
        """
        if not self._depth:
            return
        compact(self.model, self._depth)
        self.config.adapt(self.model, self.weights, self._depth)
        if self.config_refused is not None:
            refuse_fresh_weights(self.model, self.config_refused)

    def _multiple(self, block: Block) -> int:
        if known_kinds()[block.group.kind].whole:
            return 1
        if block.group.kind == "expert_ffn":
            weight = self.weights.tensor(self.weights.axes(block, block.group.slices[0])[0])
            return math.lcm(self._round_to, max(1, _GROUPED_BYTES // weight.element_size()))
        return self._round_to

    def twin(self, model: nn.Module) -> TransformersStructure:
        """The same groups on ``model``, a copy of this structure's present model."""
        twin = copy.copy(self)
        twin.model = model
        twin.weights, twin.config = self.weights.on(model), self.config.of_copy()
        twin.left_out, twin._depth_units = dict(self.left_out), dict(self._depth_units)
        twin._depth = Depth({name: BlockList(one.size, ()) for name, one in self._depth.lists.items()})
        return twin

    def leave_out(self, name: str, reason: str) -> None:
        """Remove a group, with ``uniform`` its whole family, from ``groups``; record the reason in ``left_out``."""
        if name in self._depth_units:
            del self._depth_units[name]
            self.left_out[name] = reason
            return
        family = next(family for family in equal_widths(self.blocks) if name in family) if self.uniform else [name]
        for member in family:
            del self.blocks[member]
            self.left_out[member] = reason if member == name else f"it keeps the width of {name}, left out: {reason}"
