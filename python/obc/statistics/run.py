"""``obc.collect``: any set of statistics in one run over the batches."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from os import PathLike
from typing import Any, get_args

import torch
from torch import Tensor, nn

from obc.distribution import obc_version
from obc.model.arguments import iterable_batches, listed, no_batches, one_of, positive, refuse_uncallable
from obc.model.batches import RowKind, parts_of, refuse_empty, usable_in_autograd
from obc.model.evaluation import ForwardFn, LossFn, call_on_batch, evaluating, without_cache
from obc.model.functional_uses import calling_layers, other_use
from obc.model.groups import Side, by_name
from obc.model.layouts import is_compiled
from obc.model.processes import failing_together, gathered, notice
from obc.model.progress import ProgressLog, progress_bar
from obc.model.readable import readable
from obc.model.settings import every_submodule
from obc.model.usable import refuse_non_modules, refuse_unusable
from obc.model.usable_batches import UsableBatches, all_finite
from obc.scoring.batch_rows import BatchRows
from obc.scoring.coverage import Coverage, merged
from obc.scoring.results.report import PeakMemory, Report
from obc.scoring.scorer import JacobianScorer
from obc.statistics.block_run import BlockRun
from obc.statistics.by_block import ByBlock, options_of
from obc.statistics.checkpoint import StatisticsCheckpoint
from obc.statistics.errors import NothingToReadError, StatisticsError
from obc.statistics.loss import WatchedLoss, frozen, run_backward
from obc.statistics.memory import refuse_too_large, stated
from obc.statistics.names import Chosen, chosen_statistics, identity
from obc.statistics.part import Part
from obc.statistics.reader import Groups, Reader, Readers
from obc.statistics.results import Statistics
from obc.statistics.rows import Rows

logger = logging.getLogger("obc")


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    statistics: str | Chosen | Sequence[str | Chosen],
    groups: Groups = None,
    rows: RowKind = "batch",
    micro_batch: int | None = None,
    forward_fn: ForwardFn | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 10,
    by_block: bool | ByBlock = False,
    progress: bool | None = None,
    process_group: Any = None,
) -> Statistics:
    """Collect statistics of a model, all in one run over the batches.

    ==================== ===================== ======== ===========================================================
    name                 at                    needs    sums
    ==================== ===================== ======== ===========================================================
    "rows"               layers                loss     rows r[n] of the Jacobian Criterion, every one kept
    "moments"            consumers' inputs     forward  n, x, x^2, |x|, (mean |x| of a sample)^2, per channel
    "gram"               consumers' inputs     forward  omega x x^T and omega x, per pair of channels
    "gradient_moments"   consumers' inputs     loss     |g| and g^2 of g = dL/dx, per channel
    "weight_gradients"   weights               loss     dL/dw (and its square), per weight: of the model's size
    "experts"            mixtures of experts   forward  tokens, g, |f(x)|, g |f(x)|, per expert
    "blocks"             residual blocks       forward  cosine, angle, squared norms of input, output, difference
    ==================== ===================== ======== ===========================================================

    The model is in eval mode meanwhile and is restored afterwards, also after an exception. Sums are accumulated on the
    device of the activations: one batch in float32 (float64 for float64 models), all batches in float64. If a batch's
    summands for a statistic are not finite, the batch is left out of that statistic and named in ``left_out``. Modules
    that were never called are named in ``coverage`` and in a warning.

    Padding: if a batch is a mapping with an ``attention_mask`` (B, T) or (B, 1, 1, T), positions with 0, or in a mask
    that is added to attention scores those below 0, are ignored, except in rows and in the losses of gradients, which
    ``loss_fn`` masks. With a mask of another shape padding counts, and ``coverage`` says so.

    Models larger than the device: ``by_block=True`` runs one residual block on all batches before the next one, with
    only that block's weights on the device, for every statistic that needs no loss. The sums equal those of a normal
    run up to rounding and are held on the host. A batch that is not finite is left out from the first block where that
    shows.

    Args:
        model: any module that is not compiled; put the batches on its device yourself.
        batches: any iterable.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar, or with ``rows="sample"`` the vector (B,) of per-sample
            losses. If no statistic needs gradients, it may be None, or is run forward only, under ``inference_mode``.
        statistics: names, or objects with options such as ``obc.statistics.Gram(weight=...)``.
        groups: read only what these groups need, their consumers' inputs. None reads every layer.
        rows: "batch": a loss is a batch's. "sample": a loss is a sample's.
        micro_batch: run a batch in parts of at most this many samples; sums and batch rows stay those of the batch.
        forward_fn: ``forward_fn(model, batch)``, used without a loss; by default
            :func:`obc.model.evaluation.call_on_batch`.
        checkpoint: a file to which the state is written after every ``every`` batches; a run that was killed and is
            started again with the same arguments resumes from it, to the same bits (:func:`obc.score`).
        every: batches between checkpoints. With ``by_block`` one is written after each block, and a resumed run repeats
            the blocks before it without reading them.
        by_block: run block by block; :class:`obc.statistics.ByBlock` sets the device, the weights' files and where
            hidden states are stored. Batches are then kept in a list.
        progress: show a progress bar; None shows it in a terminal only.
        process_group: processes with the same model and their own batches: sums are added, and rows concatenated in the
            order of the processes. All of them return the same statistics.

    Raises:
        StatisticsError: an unknown statistic, a missing loss, a Gram matrix that the device can't hold, nothing to
            read, no batches, or no finite batch; with ``by_block``, blocks that don't follow each other, or missing
            weights.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        ValueError: a batch has no samples.
    """
    with failing_together(process_group, model):
        positive("every", every, StatisticsError)
        if micro_batch is not None:
            positive("micro_batch", micro_batch, StatisticsError)
        refuse_uncallable(loss_fn=loss_fn, forward_fn=forward_fn)
        groups = groups if groups is None else list(by_name(groups).values())
        one_of("rows", rows, get_args(RowKind), StatisticsError)
        refuse_non_modules(model)
        for name, module in model.named_modules():
            if is_compiled(module):
                raise StatisticsError(
                    f"{name or 'the model'} is compiled, so its hooks are not seen; collect, then compile"
                )
            if isinstance(module, torch.jit.ScriptModule):
                raise StatisticsError(
                    f"{name or 'the model'} is a ScriptModule, whose inside can't be read; put the module it was made "
                    "of in its place"
                )
        chosen, blockwise = chosen_statistics(statistics), options_of(by_block)
        if {"rows", "weight_gradients"} <= {one.name for one in chosen}:
            raise StatisticsError("rows freeze the weights: collect 'weight_gradients' in a run of its own")
        if loss_fn is None and (needy := [one.name for one in chosen if one.backward]):
            raise StatisticsError(f"{needy[0]!r} needs gradients: pass loss_fn, or obc.scoring.label_free_loss()")
        if blockwise is not None and (needy := [one.name for one in chosen if one.backward]):
            raise StatisticsError(
                f"{needy[0]!r} needs gradients, by_block runs forward only: collect it without by_block"
            )
        iterable_batches(batches)
        call = calling_layers(loss_fn or forward_fn or call_on_batch)
        run = _Run(model, chosen, groups, rows, micro_batch, process_group, blockwise, call.other_uses)  # type: ignore[union-attr]
        if any(one.backward for one in chosen):
            refuse_unusable(model)
        total = len(batches) if isinstance(batches, Sized) else None
        if checkpoint is not None:
            options: dict[str, Any] = {"batches": total, "rows": rows, "micro_batch": micro_batch}
            options |= {f"statistic {one.name}": identity(one) for one in chosen}
            options |= {"groups": None if groups is None else [group.name for group in groups]}
            options |= getattr(loss_fn, "identity", {})
            options |= {} if blockwise is None else {"by_block": blockwise.identity()}
            run.saved = StatisticsCheckpoint(checkpoint, model, options, run.readers, run.scorer)
        if blockwise is None:
            run.over(batches, call, total, every, progress)
        else:
            run.over_blocks(batches, call, progress)
        return run.statistics()


class _Run:
    """One call of :func:`collect`, or the rest of one that was killed."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Sequence[Chosen],
        groups: Groups,
        rows: RowKind,
        micro_batch: int | None,
        process_group: Any,
        by_block: ByBlock | None,
        other_uses: Mapping[str, str],
    ) -> None:
        self.by_block, self.other_uses = by_block, other_uses
        self.options = {one.name: identity(one) for one in chosen}
        if groups is None and Rows.name in self.options:  # every layer is read on both sides
            self.options[Rows.name] = identity(Rows("all"))
        self.model, self.rows, self.micro_batch, self.process_group = model, rows, micro_batch, process_group
        self.readers, self.done = Readers(Part()), 0
        self.backward = any(one.backward for one in chosen)
        self.scorer: JacobianScorer | None = None
        self._no_rows: dict[str, Coverage] = {}
        for one in chosen:
            if isinstance(one, Rows):
                wanted, self._no_rows = one.wanted(model, groups), one.unread(model, groups)
                if wanted is not None and not wanted:
                    raise NothingToReadError(one.name, f"these groups have nothing to read {one.name!r} from")
                self.scorer = self._scorer(wanted)
            else:
                self.readers[one.name] = one.reader(model, groups, self.readers.part)
        for name, reader in self.readers.items():
            if not any(how.scored for how in reader.coverage.values()):
                why = "; ".join(f"{module}: {how}" for module, how in reader.coverage.items())
                what = "this model has" if groups is None else "these groups have"
                raise NothingToReadError(name, f"{what} nothing to read {name!r} from{why and f' ({why})'}")
        if by_block is not None and by_block.runs_on(model).type != "cpu":
            for reader in self.readers.values():
                reader.sums.to = torch.device("cpu")
        refuse_too_large(self.readers.values(), by_block, model)
        logger.info("obc.collect holds %s", stated({name: reader.bytes() for name, reader in self.readers.items()}))
        self.report: Report | None = None
        self.saved: StatisticsCheckpoint | None = None
        self._losses: list[Tensor] = []  # losses of the last batch
        self._left_out = 0  # how often something was not finite so far

    def _scorer(self, wanted: Mapping[str, set[Side]] | None) -> JacobianScorer:
        options: dict[str, Any] = {"rows": self.rows, "keep_rows": True, "modules": wanted}
        if self.process_group is not None:
            options |= {"process_group": self.process_group, "combine": "scores"}
        return JacobianScorer(self.model, **options)

    def over(
        self, batches: Iterable[Any], call: Callable[..., Any], total: int | None, every: int, progress: bool | None
    ) -> None:
        earlier = 0.0
        if self.saved is not None and (state := self.saved.resume()) is not None:
            self.done, earlier = state["batches"], state["seconds"]
            logger.warning("resuming from %s: %d batches are done", self.saved.path, self.done)
        left = map(usable_in_autograd, batches) if self.saved is None else self.saved.place.left(batches)
        devices = {parameter.device for parameter in self.model.parameters()}
        memory, started = PeakMemory(devices), time.perf_counter()
        with self._attached(call) as read:
            log = ProgressLog("obc.collect", progress)
            for batch in progress_bar(progress, left, desc="collect", unit="batch", total=total, initial=self.done):
                notice()
                log.tick(self.done, total)
                refuse_empty(self.done, batch)
                read(batch)
                self.done += 1
                if isinstance(batches, UsableBatches):
                    self._judge(batches)
                if self.saved is not None and self.done % every == 0:
                    seconds = earlier + time.perf_counter() - started
                    self.saved.save({"batches": self.done, "seconds": seconds})
        kept = 0 if self.scorer is None else self.scorer.kept_bytes
        seconds = earlier + time.perf_counter() - started
        self.report = Report(seconds, self.done, memory.read(), self.readers.nbytes + kept)

    def over_blocks(self, batches: Iterable[Any], call: Callable[..., Any], progress: bool | None) -> None:
        assert self.by_block is not None
        done, earlier = 0, 0.0
        if self.saved is not None and (state := self.saved.resume()) is not None:
            done, earlier = state["blocks"], state["seconds"]
            logger.warning("resuming from %s: %d blocks are done", self.saved.path, done)
        parts = []
        read = map(usable_in_autograd, batches) if self.saved is None else self.saved.place.again(batches)
        for index, batch in enumerate(read):
            refuse_empty(index, batch)
            parts.append(self._parts(batch))
        self.done = len(parts)
        if not parts:
            return
        run = BlockRun(self.model, self.by_block, self.readers, call)
        memory, started = PeakMemory([run.device]), time.perf_counter()
        log = ProgressLog("obc.collect", progress)
        with self._hooked(), without_cache(self.model), progress_bar(progress, desc="collect", unit="block") as bar:

            def after(blocks: int, total: int) -> None:
                log.tick(blocks, total, "block")
                bar.total = total
                bar.update()
                if self.saved is not None and blocks > done:
                    self.saved.save({"blocks": blocks, "seconds": earlier + time.perf_counter() - started})

            stored = run.over(parts, done, after)
        logger.info("obc.collect stored %s of hidden states between blocks", readable(stored))
        seconds = earlier + time.perf_counter() - started
        self.report = Report(seconds, self.done, memory.read(), self.readers.nbytes + stored)

    def _judge(self, batches: UsableBatches) -> None:
        """Decide whether later passes may use the last batch. Reads from the device."""
        lines = [line for reader in self.readers.values() for line in reader.sums.settle()]
        rows = 0 if self.scorer is None else self.scorer.count_left_out()
        left_out, self._left_out = self._left_out, len(lines) + rows
        if self._left_out > left_out:
            batches.leave_out(lines[-1].partition(": ")[2].partition(";")[0] if lines else "its row is not finite")
        elif not all_finite(self._losses):
            batches.leave_out("its loss is not finite")

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(every_submodule.changed())
            if self.backward and self.scorer is None:
                stack.enter_context(frozen(self.model))
            for reader in self.readers.values():
                for handle in reader.attach():
                    stack.callback(handle.remove)
            yield

    @contextlib.contextmanager
    def _attached(self, call: Callable[..., Any]) -> Iterator[Callable[[Any], None]]:
        """Attach the hooks; the context yields a function that reads one batch."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._hooked())
            if not self.backward:
                yield lambda batch: self._forward_only(call, batch)
                return
            loss = WatchedLoss(call, self.readers)
            self._losses = loss.losses
            if self.scorer is None:
                yield lambda batch: self._with_backward(
                    lambda: run_backward(self.model, loss, self.done, batch, self.rows, self.micro_batch)
                )
                return
            stack.enter_context(self.scorer)
            rows = BatchRows(self.scorer, loss, self.micro_batch)
            yield lambda batch: self._with_backward(lambda: rows.batch(self.done, batch))

    def _forward_only(self, call: Callable[..., Any], batch: Any) -> None:
        self.readers.begin()
        for part in self._parts(batch):
            with self.readers.reading(part), torch.inference_mode():
                call(self.model, part)
        self.readers.commit(self.done)

    def _parts(self, batch: Any) -> list[Any]:
        return [part for part, _, _ in parts_of(batch, self.micro_batch)]

    def _with_backward(self, read: Callable[[], None]) -> None:
        try:
            read()
        finally:
            self.readers.part.reading = False
        self.readers.part_ends()
        self.readers.commit(self.done)

    def statistics(self) -> Statistics:
        if self.process_group is not None:
            for reader in self.readers.values():
                reader.sums.merge(self.process_group)
        everyone = self._of_all_processes()
        count = sum(facts["batches"] for facts in everyone)
        if count == 0:
            raise StatisticsError(no_batches("collect"))
        coverage = {name: merged([facts["coverage"][name] for facts in everyone]) for name in self.readers}
        left_out = [line for facts in everyone for line in facts["left_out"]]
        values: dict[str, dict[str, Any]] = {}
        for name, reader in self.readers.items():
            fields = reader.sums.take()
            values[name] = {module: reader.result(fields[module]) for module in reader.coverage if module in fields}
            if not values[name] or len(reader.sums.settle()) >= count:
                why = left_out[0] if left_out else next(iter(coverage[name].values()), "nothing was called")
                raise StatisticsError(f"no batch gave {name!r} anything to read: {why}")
        kept = None
        if self.scorer is not None:
            scores = self.scorer.scores()
            kept, coverage["rows"] = scores.rows, {**scores.coverage, **self._no_rows}
            left_out += [scores.metadata["left_out"]] if "left_out" in scores.metadata else []
        self._warn(coverage, left_out)
        metadata = {"model": type(self.model).__name__, "rows": self.rows, "obc": obc_version() or "unknown"}
        if self.saved is not None:
            self.saved.remove()
        return Statistics(
            values,
            rows=kept,
            num_batches=count,
            coverage=coverage,
            left_out=left_out,
            options=self.options,
            metadata=metadata,
            report=self.report,
        )

    def _coverage(self, reader: Reader) -> dict[str, Coverage]:
        """How modules were read, also of which uses were not."""
        found = reader.final_coverage()
        for module, function in self.other_uses.items():
            if module in found and found[module].how == "input":
                found[module] = Coverage(found[module].how, other_use(function))
        return found

    def _of_all_processes(self) -> list[dict[str, Any]]:
        facts = {
            "batches": self.done,
            "coverage": {name: self._coverage(reader) for name, reader in self.readers.items()},
            "left_out": [line for reader in self.readers.values() for line in reader.sums.settle()],
        }
        if self.process_group is None:
            return [facts]
        everyone: list[dict[str, Any]] = gathered(facts, self.process_group)
        for rank, one in enumerate(everyone):
            one["left_out"] = [f"process {rank}: {line}" for line in one["left_out"]]
        return everyone

    def _warn(self, coverage: Mapping[str, Mapping[str, Coverage]], left_out: Sequence[str]) -> None:
        lines = list(left_out[:3]) + ([f"and {len(left_out) - 3} more"] if len(left_out) > 3 else [])
        lines += [f"no rows of {name!r} ({how.reason})" for name, how in self._no_rows.items()]
        for name in self.readers:
            unread = [f"{module!r} ({how.reason})" for module, how in coverage[name].items() if not how.scored]
            lines += [f"no {name} of {listed(unread)}"] if unread else []
            partly = [
                f"{module!r} ({how.reason})"
                for module, how in coverage[name].items()
                if module in self.other_uses and how.how == "input"
            ]
            lines += [f"{name} of a part of the inputs of {listed(partly)}"] if partly else []
        for line in lines:
            warnings.warn(f"obc.collect: {line}", stacklevel=4)
