"""A collection block by block: each block runs on all batches before the next one does."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from obc.files import os_errors
from obc.model.evaluation import first_floating, stream_of
from obc.model.functional_uses import calling_layers
from obc.model.hooks import Reached, hooked, replaced
from obc.statistics.block_weights import WeightsOnDevice
from obc.statistics.by_block import ByBlock
from obc.statistics.errors import StatisticsError
from obc.statistics.reader import Readers

# A block run alone may differ by rounding from what it returned inside the model.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3}
_AGREEMENT_OF_HALF = 5e-2

Parts = Sequence[Sequence[Any]]  # for every batch its parts


class _RefusedError(BaseException):
    """Carries the message of an error through the model's callers, which may turn errors into others."""


def _run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)


class BlockRun:
    """One pass of all batches through all blocks.

    Args:
        model: the model in eval mode, with the readers' hooks attached.
        call: ``call(model, part)`` runs the model.

    Attributes:
        chain: the blocks in the order in which they ran on the first part of the first batch.
        outputs: block -> the hidden states that it returned there, on the host.
        lengths: block -> the length of the tuple that contained them, or None if they were returned alone.
    """

    def __init__(
        self, model: nn.Module, options: ByBlock, readers: Readers, call: Callable[[nn.Module, Any], Any]
    ) -> None:
        self.model, self.options, self.readers, self.call = model, options, readers, call
        self.device, self.blocks = options.runs_on(model), options.names(model)
        self.weights = WeightsOnDevice(model, self.blocks, self.device, options.weights)
        self.chain: list[str] = []
        self.outputs: dict[str, Tensor] = {}
        self.lengths: dict[str, int | None] = {}
        self.span = 1

    def over(self, batches: Parts, done: int, after: Callable[[int, int], None]) -> int:
        """Read every block on every batch; returns the most bytes of hidden states stored at once.

        Args:
            batches: for every batch its parts.
            done: this many blocks were read before; they run without being read.
            after: called with the number of finished blocks and their total.
        """
        with torch.inference_mode(), HiddenStates(self.options.states) as states, self.weights.on_device():
            self._watch(batches[0][0])
            chain = self.chain
            self.span = self._span()
            for place, name in enumerate(chain):
                run = calling_layers(_run)
                with self.weights.on_device(name):
                    for batch, parts in enumerate(batches):
                        self._read_block(place, run, batch, parts, states, reading=place >= done)
                        for index in range(len(parts)):
                            states.drop((place - self.span, batch, index))
                for reader in self.readers.values():
                    reader.sums.free_memory()
                after(place + 1, len(chain) + 1)
            for batch, parts in enumerate(batches):
                self._read_rest(batch, parts, states, reading=len(chain) >= done)
            after(len(chain) + 1, len(chain) + 1)
            return states.bytes

    # --- the whole model once --------------------------------------------------------------------------------------

    def _watch(self, part: Any) -> None:
        """Run the model on one part, with one block's weights on the device at a time, and record what blocks do."""
        last: list[Tensor] = []
        resident = contextlib.ExitStack()

        def before(name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            if name in self.chain:
                raise _RefusedError(f"{name!r} runs more than once: leave it out of ByBlock(blocks=...)")
            stream = first_floating(args, kwargs)
            if last and (stream is None or not _equal(stream, last[0])):
                raise _RefusedError(
                    f"the model changes what {self.chain[-1]!r} returns before it reaches {name!r}: name "
                    "blocks that follow each other, ByBlock(blocks=[...]), or collect without by_block"
                )
            self.chain.append(name)
            resident.enter_context(self.weights.on_device(name))

        def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
            resident.pop_all().close()
            stream = stream_of(output)
            if stream is None:
                raise _RefusedError(f"the block {name!r} returns {type(output).__name__} instead of a tensor")
            last[:] = [stream]
            self.lengths[name] = len(output) if isinstance(output, (tuple, list)) else None
            self.outputs[name] = stream.detach().to("cpu", copy=True)

        handles: list[Any] = []
        for name, block in ((name, self.model.get_submodule(name)) for name in self.blocks):
            handles.append(block.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(after, name)))
        with hooked(handles), resident:
            try:
                self.call(self.model, part)
            except _RefusedError as refused:
                raise StatisticsError(*refused.args) from None
        if not self.chain:
            raise StatisticsError(
                f"the first batch reaches none of the blocks {self.blocks[0]!r} to {self.blocks[-1]!r}"
            )

    def _span(self) -> int:
        """The number of places for which hidden states are needed."""
        chain, longest = self.chain, 1
        for reader in self.readers.values():
            for place, name in enumerate(chain):
                first = reader.window(name)
                if first is None:
                    continue
                if first not in chain:
                    raise StatisticsError(
                        f"the window from {first!r} to {name!r} begins outside the blocks that are run"
                    )
                longest = max(longest, place - chain.index(first) + 1)
        return longest

    # --- one block, and what lies outside -----------------------------------------------------------------------

    def _read_block(
        self, place: int, run: Callable[..., Any], batch: int, parts: Sequence[Any], states: HiddenStates, reading: bool
    ) -> None:
        name = self.chain[place]
        self.readers.begin()
        for index, part in enumerate(parts):
            args, kwargs = self._arrival(place, part)
            arrived = first_floating(args, kwargs)
            assert arrived is not None
            stream = arrived if place == 0 else states.get((place - 1, batch, index), self.device)
            if place == 0 and self.span > 1:
                states.put((-1, batch, index), stream)
            self._hand_windows(name, batch, index, states)
            args = tuple(stream if value is arrived else value for value in args)
            kwargs = {key: stream if value is arrived else value for key, value in kwargs.items()}
            with self.readers.reading(part, reading):
                output = stream_of(run(self.model.get_submodule(name), *args, **kwargs))
            assert output is not None
            if batch == index == 0:
                self._compare(name, output)
            states.put((place, batch, index), output)
        self.readers.commit(batch)

    def _read_rest(self, batch: int, parts: Sequence[Any], states: HiddenStates, reading: bool) -> None:
        """Read the layers outside the blocks: the model runs with a stand-in for every block."""
        last = len(self.chain) - 1
        self.readers.begin()
        for index, part in enumerate(parts):

            def result(stream: Tensor | None, batch: int = batch, index: int = index) -> Tensor:
                return states.get((last, batch, index), self.device)

            with self._stand_ins(last, result), self.readers.reading(part, reading):
                self.call(self.model, part)
        self.readers.commit(batch)

    def _arrival(self, place: int, part: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's arguments; the hidden states among them are those before the first block."""

        def stop(*arrived: Any) -> Any:
            raise Reached(*arrived)

        with self._stand_ins(place - 1, lambda stream: stream), self._replaced(place, stop):
            try:
                self.call(self.model, part)
            except Reached as reached:
                return reached.args  # type: ignore[return-value]
        raise StatisticsError(f"a batch does not reach {self.chain[place]!r}, which the first batch reached")

    @contextlib.contextmanager
    def _stand_ins(self, last: int, result: Callable[[Tensor | None], Tensor | None]) -> Iterator[None]:
        """Inside, the first blocks return their inputs, and the one at ``last`` returns ``result`` of its input."""
        with contextlib.ExitStack() as stack:
            for place in range(last + 1):
                length = self.lengths[self.chain[place]]

                def answer(
                    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int = place, length: int | None = length
                ) -> Any:
                    stream = first_floating(args, kwargs)
                    stream = result(stream) if place == last else stream
                    return stream if length is None else (stream, *[None] * (length - 1))

                stack.enter_context(self._replaced(place, answer))
            yield

    def _replaced(self, place: int, answer: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
        """Inside, the block at this place returns ``answer(args, kwargs)``, and none of its hooks runs."""

        def answered(*args: Any, **kwargs: Any) -> Any:
            return answer(args, kwargs)

        return replaced(self.model.get_submodule(self.chain[place]), forward=answered, _compiled_call_impl=answered)

    def _hand_windows(self, name: str, batch: int, index: int, states: HiddenStates) -> None:
        """Pass the input of the first block to windows of several blocks that end here."""
        for reader in self.readers.values():
            first = reader.window(name)
            if first is not None and first != name:
                place = self.chain.index(first) - 1
                reader.take_window(first, states.get((place, batch, index), self.device))

    def _compare(self, name: str, output: Tensor) -> None:
        """Raise unless the block alone returns what it returned inside the model."""
        seen = self.outputs.pop(name).to(output.device)
        allowed = _AGREEMENT.get(output.dtype, _AGREEMENT_OF_HALF)
        if output.shape == seen.shape:
            distance, norm = (output.double() - seen.double()).norm(), seen.double().norm()
            if not bool(norm.isfinite()) or bool(distance <= allowed * norm):
                return
        raise StatisticsError(
            f"{name!r}, run alone, does not return what it returns inside the model: it needs something that "
            "another block makes; name the blocks up to there, ByBlock(blocks=[...]), or collect without by_block"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()))


Key = tuple[int, int, int]  # position among the blocks, batch, part of the batch


class HiddenStates:
    """Stores tensors by key until the ``with`` statement ends.

    Args:
        where: "host", or a folder.

    Attributes:
        bytes: the most that was stored at once.
    """

    def __init__(self, where: str | PathLike[str]) -> None:
        self._held: dict[Key, Tensor] = {}
        self._sizes: dict[Key, int] = {}
        self._folder = None if where == "host" else tempfile.TemporaryDirectory(prefix="obc-states-", dir=where)
        self.bytes = self._now = 0

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: Key, states: Tensor) -> None:
        """Store ``states``; they may be changed afterwards."""
        self._now += states.nbytes - self._sizes.get(key, 0)
        self._sizes[key] = states.nbytes
        self.bytes = max(self.bytes, self._now)
        if self._folder is None:
            self._held[key] = states.detach().to("cpu", copy=True)
        else:
            with os_errors(path := self._path(key)):
                save_file({"states": states.detach().cpu().contiguous()}, path)

    def get(self, key: Key, device: torch.device) -> Tensor:
        """The stored states, on the device; the caller may change them."""
        if self._folder is None:
            return self._held[key].to(device, copy=True)
        with safe_open(str(self._path(key)), framework="pt") as file:
            return file.get_tensor("states").to(device)

    def drop(self, key: Key) -> None:
        """Forget the stored states, if any."""
        self._now -= self._sizes.pop(key, 0)
        self._held.pop(key, None)
        if self._folder is not None:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{'-'.join(map(str, key))}.safetensors"
