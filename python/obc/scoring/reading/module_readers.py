"""One reader per scored module, which puts gates on the module's input and output while the scorer is attached."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from obc.backends import native_gates
from obc.model.hooks import hook_before_others
from obc.model.rules import Rule
from obc.model.sharding import is_dtensor
from obc.model.watched_weights import WatchedWeight
from obc.scoring.errors import ScoringError
from obc.scoring.reading.chain_candidates import Candidates, Pending
from obc.scoring.reading.chains import Chains
from obc.scoring.reading.flat_row import Slot
from obc.scoring.reading.gates import CheckGate, TokenGate, pass_gate
from obc.scoring.sharding import LocalPart

# Names of the activation in modules' forwards, where it is passed by keyword.
_ACTIVATION_KEYWORDS = ("input", "x", "hidden_states")
# How exactly an output follows its parameters, relative to the largest entry; half precision rounds to 4e-3.
_PROPORTIONAL = 3e-2


class RowReading:
    """The state shared by all readers of a scorer: which kind of row is being read.

    Attributes:
        per_sample: sample rows are read.
        checking: the checking row is not over yet.
        samples: number of samples of the current row, known from its first activation.
        begins: the current row has no activation yet, so ``samples`` stems from a pass outside it.
        counted_by: the reader whose activation told ``samples``; None if the caller told it.
        spread: readers whose output was spread over the samples of this row.
        sharded: parameters lie on several processes; no row is checked, and only gates read.
        candidates: collects chains in the checking row, or None.
        pending: chains that a whole batch has to confirm, or None.
        chains: the slots whose rows follow from others, which need no gate.
        native: the library of gates in C++, or None if the current row is read by gates in Python.
    """

    def __init__(self, per_sample: bool, checking: bool, chains: Chains, sharded: bool = False) -> None:
        self.per_sample, self.checking, self.chains, self.sharded = per_sample, checking, chains, sharded
        self.samples: int | None = None
        self.begins = False
        self.counted_by: ModuleReader | None = None
        self.spread: list[ModuleReader] = []
        self.candidates: Candidates | None = None
        self.pending: Pending | None = None
        self.native: Any | None = None

    def begin_row(self, samples: int | None) -> None:
        """Begin a row of ``samples`` samples; None if their number is not known yet."""
        self.begins = samples is None
        self.counted_by, self.spread = None, []
        self.native = native_gates.library()
        if self.pending is not None:
            self.pending.begin_row()

    def native_serves(self, activation: Tensor) -> bool:
        """Whether a gate in C++ serves this tensor: in batch rows after the checking row, if the library is built."""
        return (
            self.native is not None
            and self.pending is None
            and not (self.checking or self.per_sample or self.sharded or is_compiling())
            and type(activation) is Tensor
        )

    def native_gate(self, slot: Slot, channel_dim: int, fold: int, *, links: bool, **copies: bool) -> Any:
        """A gate in C++ for a module's input (``links=True``: it checks the chains seen there) or output."""
        chains = self.chains
        assert self.native is not None
        return self.native.Gate(
            slot=slot,
            gate=None if slot in chains.slots else slot.gate,
            channel_dim=channel_dim,
            channels=slot.local_size * fold,
            fold=fold,
            outputs=chains.outputs,
            held=chains.held,
            links=chains.links(slot) if links else (),
            **copies,
        )


class _Watch:
    """The tensor that a :class:`CheckGate` keeps, and the changes that it noticed; ``slot`` holds its row."""

    def __init__(self, slot: Slot | None, keeps_received: bool) -> None:
        self.slot, self.keeps_received = slot, keeps_received
        self.input_changed = self.output_changed = self.reached = self.differentiated = False


class ModuleReader:
    """Reads one module's rows.

    Attributes:
        how: "gate", "norm gradient" or "weight gradient": how rows are read after the checking row.
        reason: why gates don't read the module, or why nothing does.
        scored: False if the module is left out.
        called: its forward ran with a gate.
        used: its gradient was seen in at least one row.
        activation_dtypes: of its input and output in the checking row.
        watched: its weight and bias while uses of them beside its calls are watched.
        shared: its output is computed once for all samples, and the model fails if it is spread over them.
        doubted: nothing else shows that its parameters scale and shift its output, which its gate takes for granted.
    """

    def __init__(self, name: str, module: nn.Module, rule: Rule, out: Slot, in_: Slot | None, fold: int) -> None:
        self.name, self.module, self.rule, self.out, self.in_, self.fold = name, module, rule, out, in_, fold
        self.tokens: Slot | None = None
        self.how = "gate"
        self.reason: str | None = None
        self.scored = True
        self.called = False
        self.used = False
        self.copy_input = self.copy_output = self.shared = self.doubted = False
        self.activation_dtypes: set[torch.dtype] = set()
        self.watched: Sequence[Tensor] = ()
        self._watch_in, self._watch_out = _Watch(in_, keeps_received=False), _Watch(out, keeps_received=True)
        self._reading: RowReading
        self._native_in: Any = None  # the gate in C++, made in the first row after the checking row
        self._native_out: Any = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ScoringError(
            f"{self.name!r} has hooks of a scorer, which can't be copied or saved with it; copy or save the model "
            "outside of `with scorer:`, or its state_dict()"
        )

    @property
    def slots(self) -> list[Slot]:
        """The slots that are read."""
        return [slot for slot in (self.out, self.in_, self.tokens) if slot is not None and slot.read]

    @property
    def weight(self) -> Tensor:
        """The module's weight."""
        weight: Tensor = getattr(self.module, self.rule.weight)
        return weight

    @property
    def reached(self) -> bool:
        """Whether a gradient came to its output, and through it to its input, in the checking row."""
        sides = ((self.out, self._watch_out), (self.in_, self._watch_in))
        return all(watch.reached for slot, watch in sides if slot is not None and slot.read)

    @property
    def noted(self) -> tuple[str | None, bool, bool, bool]:
        """The notes of a checking row about gates: the reason against them, whether they were called, the copies."""
        return self.reason, self.called, self.copy_input, self.copy_output

    @noted.setter
    def noted(self, noted: tuple[str | None, bool, bool, bool]) -> None:
        self.reason, self.called, self.copy_input, self.copy_output = noted
        for watch in (self._watch_in, self._watch_out):
            watch.input_changed = watch.output_changed = watch.reached = watch.differentiated = False

    def attach(self, reading: RowReading) -> None:
        """Put the gates on, in hooks next to the module's own forward, so that they see what it sees.

        They stay until :meth:`detach`, even if ``how`` changes, because a compiled model does not notice removed hooks.
        """
        self._reading = reading
        # The watch of weights would also see the layer's own call, which takes longer than these hooks.
        if self.in_ is not None:
            self._handles.append(self.module.register_forward_pre_hook(self._before, with_kwargs=True))
        else:
            self._handles.append(self.module.register_forward_pre_hook(self._call))
        # A look-up in a table split over processes is only a part of the output until a hook adds the parts up.
        last = self.rule.looks_up and is_dtensor(self.weight)
        if self.out.read or self.tokens is not None:
            register = self.module.register_forward_hook if last else partial(hook_before_others, self.module)
            self._handles.append(register(self._after, with_kwargs=True))
        else:
            self._handles.append(hook_before_others(self.module, self._return))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget_native()

    def forget_native(self) -> None:
        """Drop the gates in C++ because what they depend on has changed; they are rebuilt."""
        self._native_in = self._native_out = None

    def copy_from_now_on(self) -> None:
        """Make gates keep and return copies from now on."""
        self.copy_output = self.copy_input = True
        self.forget_native()

    def notice_changes(self) -> None:
        """Note the in-place changes that the checking row's gates saw, so that later gates return or keep copies."""
        self.copy_output |= self._watch_out.output_changed
        self.copy_input |= self._watch_in.input_changed
        if self._watch_in.output_changed:
            self.reason = "it changes its input in place"
        if self._watch_in.differentiated or self._watch_out.differentiated:
            self.reason = "its gradient is differentiated again, so the loss depends on its weight in a backward too"

    def _call(self, module: nn.Module, args: Any) -> None:
        if not is_compiling():
            for weight in self.watched:
                weight.__class__ = nn.Parameter

    def _return(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_compiling():
            for weight in self.watched:
                weight.__class__ = WatchedWeight

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._call(module, args)
        if self._native_in is not None and self._reading.native is not None and not is_compiling():
            result = self._native_in.before(args, kwargs)
            if result is not NotImplemented:
                return result
        if not self._reads() or self.in_ is None or self.rule.in_dim is None:
            return None
        if not (self.called or self.out.read):  # otherwise its output's hook notes it
            self.called = True
        if args and isinstance(args[0], Tensor):
            gated = self._gate(args[0], self.in_, self.rule.in_dim, self.copy_input, self._watch_in, self.fold)
            self._take_over_input(args[0])
            return (gated, *args[1:]), kwargs
        if args and isinstance(args[0], PackedSequence):
            gated = self._gate(args[0].data, self.in_, self.rule.in_dim, self.copy_input, self._watch_in, self.fold)
            return (args[0]._replace(data=gated), *args[1:]), kwargs
        for name in _ACTIVATION_KEYWORDS:
            if isinstance(kwargs.get(name), Tensor):
                gated = self._gate(kwargs[name], self.in_, self.rule.in_dim, self.copy_input, self._watch_in, self.fold)
                return args, {**kwargs, name: gated}
        return None

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.doubted and self._reads() and isinstance(output, Tensor) and not is_compiling():
            self._doubt(args, kwargs, output)
        self._return(module, args, output)
        if self._native_out is not None and self._reading.native is not None and not is_compiling():
            result = self._native_out.after(output)
            if result is not NotImplemented:
                return result
        if not self._reads() or not isinstance(output, Tensor) or self.rule.out_dim is None:
            return None
        if not output.requires_grad and self.out in self._reading.chains.slots:
            # Nothing before it is read and weights are frozen, so only its own gate brings a gradient here.
            self._reading.chains.drop(self.out)
        # A compiler's graph is not autograd's, so chains can't be checked and every slot has its gate.
        if self.out in self._reading.chains.slots and not is_compiling():
            self._reading.chains.outputs[self.out] = output.grad_fn
            self._take_over_output(output)
            return None
        if not self.called:
            self.called = True
        if self.rule.looks_up:
            output = self._spread_over_samples(output)
            if self.tokens is not None:
                tokens = args[0] if args else kwargs["input"]
                output = self._gate_tokens(output, tokens, self.tokens)
        gated = self._gate(output, self.out, self.rule.out_dim, False, self._watch_out, 1)
        if self._reading.pending is not None and not is_compiling():
            self._reading.chains.outputs[self.out] = gated.grad_fn
        self._take_over_output(output)
        # A compiler sees no version counters, and removes a copy that it considers needless.
        copy = (self.copy_output and not self._reading.checking) or is_compiling()
        return gated.clone() if copy else gated

    def _doubt(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Call the module once more, with other parameters, and note if a gate can't read it.

        y . dL/dy is the row if y is multiplied, channel by channel, by what its parameters are multiplied by (Euler).
        """
        own, dim = dict(self.module._parameters), self.rule.out_dim
        assert dim is not None
        factors = 1 + torch.ones_like(self.weight.detach()).cumsum(0) / len(self.weight)
        try:
            self.module._parameters.update(
                {key: nn.Parameter(one.detach() * factors) for key, one in own.items() if one is not None}
            )
            with torch.no_grad():
                found = self.module.forward(*args, **kwargs)
        finally:
            self.module._parameters.update(own)
        expected = output.detach() * factors.view(-1, *[1] * (output.dim() - 1 - dim % output.dim()))
        if is_dtensor(expected):
            found, expected = found.to_local(), expected.to_local()  # type: ignore[attr-defined]
        self.doubted = not bool((found - expected).abs().max() <= _PROPORTIONAL * expected.abs().max())
        if self.doubted:
            self.reason = "its parameters do not scale and shift its output, and no gradient of theirs can be read"
            self.scored = self._reading.checking  # which then decides

    def _reads(self) -> bool:
        return self.how == "gate" and self.scored and torch.is_grad_enabled() and not _in_transform()

    def _gate(self, activation: Tensor, slot: Slot, channel_dim: int, copy: bool, watch: _Watch, fold: int) -> Tensor:
        reading = self._reading
        if not slot.read:
            # Only in the checking row does the layer save its input, which must then be a separate clone.
            return activation.clone() if reading.checking and slot is self.in_ else activation
        if not (reading.checking or is_compiling()) and slot is self.in_:
            if reading.pending is not None:
                reading.pending.look(activation, slot, reading.chains.outputs)
            reading.chains.look(activation, slot)
            if slot in reading.chains.slots:
                return activation
        if type(activation) is not Tensor and is_dtensor(activation):
            part = LocalPart(activation, channel_dim)
            slot.see(part.first, part.tensor.shape[channel_dim] // fold)
            return part.back(self._gate(part.tensor, slot, channel_dim, copy, watch, fold))
        channels = slot.local_size * fold
        if not activation.is_floating_point() or not self._bind(slot, activation, channel_dim, channels):
            return activation
        gate = slot.gate
        assert gate is not None
        if reading.checking:
            self.activation_dtypes.add(activation.dtype)
        if reading.checking and not is_compiling():
            if slot is self.in_ and reading.candidates is not None:
                reading.candidates.walk(activation, slot)
            return CheckGate.apply(activation, gate, channel_dim, reading.per_sample, fold, watch)  # type: ignore[no-any-return]
        if copy:
            activation = activation.clone()
        return pass_gate(
            None if is_compiling() else reading.native, activation, gate, channel_dim, reading.per_sample, fold
        )

    def _take_over_input(self, activation: Tensor) -> None:
        if self.in_ is not None and self.in_.read and self._reading.native_serves(activation):
            assert self.rule.in_dim is not None
            self._native_in = self._reading.native_gate(
                self.in_, self.rule.in_dim, self.fold, links=True, copy_before=self.copy_input, copy_after=False
            )

    def _take_over_output(self, output: Tensor) -> None:
        if self.out.read and self._reading.native_serves(output) and not self.rule.looks_up:
            assert self.rule.out_dim is not None
            self._native_out = self._reading.native_gate(
                self.out, self.rule.out_dim, 1, links=False, copy_before=False, copy_after=self.copy_output
            )

    def _gate_tokens(self, output: Tensor, tokens: Tensor, slot: Slot) -> Tensor:
        if not self._bind(slot, output, -1, output.shape[-1]):
            return output
        return TokenGate.apply(output, slot.gate, tokens, self._reading.per_sample)  # type: ignore[no-any-return]

    def _bind(self, slot: Slot, activation: Tensor, channel_dim: int, channels: int) -> bool:
        """Give the slot a gate of the right shape; False if this activation has another shape."""
        reading, shape = self._reading, tuple(activation.shape)
        if not -len(shape) <= channel_dim < len(shape) or shape[channel_dim] != channels:
            self._refuse(f"its activation of shape {shape} does not have {channels} channels along dim {channel_dim}")
            return False
        if not reading.per_sample:
            if slot.gate is None:  # it saw other channels of a distributed activation before
                slot.bind()
            return True
        if channel_dim % len(shape) == 0:
            self._refuse(f"its activation of shape {shape} has no sample dimension")
            return False
        if reading.samples is None or reading.begins:
            if self.shared:
                self._refuse("its output is made once for all samples")
                return False
            reading.samples, reading.begins, reading.counted_by = shape[0], False, self
        if shape[0] != reading.samples:
            self._refuse(f"its activation has {shape[0]} entries along dim 0, but there are {reading.samples} samples")
            return False
        if slot.gate is None or slot.gate.shape[0] != reading.samples:
            if is_compiling():
                raise RuntimeError(
                    "a compiled model needs its gates before its forward: use scorer.row(samples=B) around it"
                )
            slot.bind_samples(reading.samples)
        return True

    def _refuse(self, reason: str) -> None:
        """Note why gates can't read this module in the checking row; raise in a later row."""
        self.reason = reason
        if self._reading.sharded:
            self.scored = False
        elif not self._reading.checking:
            self._reading.samples = None
            raise ValueError(
                f"module {self.name!r} can't be read by gates any more: {reason}, other than in the checking row; "
                "score batches of one kind, or batches of one sample"
            )

    def _spread_over_samples(self, output: Tensor) -> Tensor:
        """Repeat a look-up made once for all samples, such as positions, so that each sample has its own row."""
        reading = self._reading
        samples = reading.samples
        if not reading.per_sample or samples is None or samples == 1 or self.shared:
            return output
        if output.dim() < 2 or output.shape[0] != 1:
            return output
        if reading.checking:
            reading.spread.append(self)
        return output.expand(samples, *output.shape[1:])


def _in_transform() -> bool:
    """Whether a transform of ``torch.func`` such as ``vmap`` is running, which gates can't pass."""
    return not is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
