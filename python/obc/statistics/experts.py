"""How the experts of a mixture are used, for REAP, frequency and activation norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.model.arguments import one_of
from obc.model.experts import fused_experts
from obc.model.names import joined, named_modules
from obc.scoring.coverage import Coverage
from obc.statistics.errors import StatisticsError
from obc.statistics.part import Part, is_running_again
from obc.statistics.reader import Groups, Handle, Reader
from obc.statistics.routed import expert_count, is_routed_call
from obc.statistics.sums import Sums

Gates = Literal["routed", "softmax"]
_ROUTERS = ("gate", "router")


@dataclass(frozen=True, eq=False)
class ExpertSums:
    """Sums over the tokens routed to each expert e; tensors are (experts,) float64.

    Attributes:
        count: tokens.
        gate: sum g_e.
        norm: sum |f_e(x)|_2.
        gate_norm: sum g_e |f_e(x)|_2.
    """

    count: Tensor
    gate: Tensor
    norm: Tensor
    gate_norm: Tensor


@dataclass(frozen=True)
class Experts:
    """Use of every expert: count, sum g, sum |f(x)|, sum g |f(x)| over the tokens routed to it. Forward only.

    Read from modules that hold all experts in one (as in the transformers library) and are called with hidden states
    (T, d), expert indices (T, k) and weights (T, k). The module recomputes the outputs of each token's k experts, which
    takes about as long as the experts took.

    Args:
        gates: "routed": g is the weight that the model multiplies with (among the top k, renormalised if the model does
            that). "softmax": the router's softmax over all experts, as in REAP's code.
    """

    gates: Gates = "routed"

    name: ClassVar[str] = "experts"
    backward: ClassVar[bool] = False

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        """The reader of the mixtures of this model."""
        one_of("Experts(gates=...)", self.gates, get_args(Gates), StatisticsError)
        return _Reader(Sums(self.name), part, model, groups, self.gates)


class _Reader(Reader):
    def __init__(self, sums: Sums, part: Part, model: nn.Module, groups: Groups, gates: Gates) -> None:
        super().__init__(sums, part)
        self._gates, self._again = gates, False
        modules = dict(named_modules(model))
        wanted = None if groups is None else {s.module for g in groups if g.kind == "experts" for s in g.slices}
        self.mixtures = {
            name: module
            for name, module in modules.items()
            if fused_experts(module) is not None and (wanted is None or name in wanted)
        }
        self.coverage = dict.fromkeys(self.mixtures, Coverage("calls"))
        self._routers = {name: self._router(name, modules) for name in self.mixtures}

    def _router(self, name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
        if self._gates == "routed":
            return None
        parent, count = name.rpartition(".")[0], expert_count(modules[name])
        for child in _ROUTERS:
            router = modules.get(joined(parent, child))
            weight = getattr(router, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == count:
                return router
        raise StatisticsError(f"{name!r} has no router with {count} rows beside it; use Experts(gates='routed')")

    def attach(self) -> list[Handle]:
        return [
            module.register_forward_pre_hook(partial(self._call, name), with_kwargs=True)
            for name, module in self.mixtures.items()
        ]

    def _call(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.part.reading and not self._again and not is_running_again():
            with torch.no_grad():
                self._read(name, module, [*args, *kwargs.values()])

    def _read(self, name: str, module: nn.Module, inputs: list[Any]) -> None:
        if not is_routed_call(inputs):
            shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in inputs]
            self.coverage[name] = Coverage.unread(f"called with {shapes}, not with states, expert indices and weights")
            return
        self.called.add(name)
        hidden, indices, weights = inputs[:3]
        experts = expert_count(module)
        valid = self.part.valid_positions(hidden, hidden.dim() - 1)
        # Experts of other processes and none at all have an index beyond the last, or a weight of zero.
        counted = (indices < experts) & (weights != 0)
        if valid is not None:
            counted = counted & valid.reshape(-1, 1)
        router = self._routers[name]
        gates = weights
        if router is not None:
            assert isinstance(router.weight, Tensor)
            logits = F.linear(hidden.float(), router.weight.float())
            gates = logits.softmax(-1).gather(1, indices.clamp_max(experts - 1))
        norms = torch.stack([self._norms(module, hidden, indices, weights, k) for k in range(indices.shape[1])], 1)
        values = torch.stack([torch.ones_like(norms), gates.to(norms), norms, gates.to(norms) * norms])
        values = values.masked_fill(~counted, 0).flatten(1).double()
        sums = values.new_zeros(4, experts)
        sums.index_add_(1, indices.clamp_max(experts - 1).flatten(), values)
        self.sums.add(name, "sums", sums)

    def _norms(self, module: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor, k: int) -> Tensor:
        """(T,) the norm of the output of each token's k-th expert, from running the module with that expert alone."""
        self._again = True
        try:
            output = module.forward(hidden, indices[:, k : k + 1], torch.ones_like(weights[:, k : k + 1]))
        finally:
            self._again = False
        return output.float().norm(dim=-1)

    def result(self, fields: Mapping[str, Tensor]) -> ExpertSums:
        return ExpertSums(*fields["sums"].unbind())

    def bytes(self) -> int:
        return sum(4 * 16 * expert_count(module) for module in self.mixtures.values())
