"""The scorer: attaches to a model, reads one row per backward, adds up the squares, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.distribution import obc_version
from obc.model.sharding import is_sharded
from obc.scoring.coverage import Coverage
from obc.scoring.errors import ChainError, InplaceError, RowError, SampleRowsError, ScoringError
from obc.scoring.reading import first_row, refusals
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.flat_row import FlatRow, Slot, find_faults, label_of
from obc.scoring.reading.gradients import NormGradients
from obc.scoring.reading.module_readers import Reader, Reading
from obc.scoring.reading.reading_plan import ModuleFilter, make_plan
from obc.scoring.reading.row_counter import Tally
from obc.scoring.results import merge
from obc.scoring.results.kept_rows import KeptRows
from obc.scoring.results.row_store import RowsTo, RowStore
from obc.scoring.results.scores import ChannelScores, Scores
from obc.scoring.sharding import RowParts, refuse_common_processes, tensor_parallel_group

logger = logging.getLogger("obc")

Rows = Literal["batch", "sample"]
Fallback = Literal["weight_grad", "skip"]
Combine = Literal["row", "scores"]

# Models that a scorer is attached to: a second one would put gates on gates.
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class JacobianScorer:
    """Scores of the Jacobian Criterion, row by row, for your own loop.

    S[c] = sum over rows n of (w_c . dL_n/dw_c)^2 for every out and in channel c of every conv, linear, norm and
    embedding (arXiv 2508.05521, eq. for the Jacobian Criterion), read from activation times gradient: no weight
    gradient is computed after the first row, and nothing of parameter size is kept.

    >>> scorer = obc.JacobianScorer(model)
    >>> with scorer:
    ...     for batch in batches:
    ...         with scorer.row():
    ...             loss_fn(model, batch).backward()
    >>> scores = scorer.scores()

    Put the model in eval mode first. Several backwards inside one ``row()`` add up to one row (micro-batches).
    Attach before ``torch.compile``.

    Args:
        model: any module. Parameters frozen before are scored too; everything is restored on exit.
        rows: "batch": each row is the gradient of one loss. "sample": each sample along dim 0 is a row of its own;
            call backward on the *sum* of per-sample losses, one backward a ``row()``.
        modules: the modules to score, all by default: names, a predicate (name, module) -> bool, or a mapping of names
            to what is read of each, "in" channels, "out" channels or both: ``{"conv2": ["in"]}``. Of what is not read
            no gate is placed and nothing is kept. (Tied weights are read where one of their uses is.)
        check: compare gates with weight gradients in the first row, and read the modules that disagree from their
            weight's gradient.
        strict: raise where a module ends unscored or a row is not finite.
        fallback: "weight_grad" reads modules that no gate serves from their weight's gradient; "skip" leaves them
            unscored.
        process_group: the processes that score together, each with a model of its own or a part of one. Tensor
            parallelism needs none: its processes are found in the model. Together with ``fully_shard``: those of the
            mesh's other dimensions.
        combine: "row": every process has a part of each row; parts are summed before they are squared. "scores": every
            process has rows of its own; their squares are summed in :meth:`scores`, which all processes call.
        fold_groups: add up the groups of a grouped convolution's in channels before squaring, as the paper's code
            does, so that ``in_channels`` has C_in / groups entries.
        keep_rows: also keep every row that counts: ``scores().rows``. ``rows_bytes(n)`` says beforehand what they take.
        rows_to: where they are kept. "device": beside the row. "host": in the host's memory, pinned where CUDA is
            there. A path: in a file, which later rows at the same path replace.
        chains: leave out gates whose rows follow from other rows, as the graph of the checking row suggests and its
            numbers confirm (:mod:`obc.scoring.reading.chains`).

    Raises:
        ValueError: no module can be scored, or an argument is not one of the values above.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: Rows = "batch",
        modules: ModuleFilter | None = None,
        check: bool = True,
        strict: bool = False,
        fallback: Fallback = "weight_grad",
        process_group: Any = None,
        combine: Combine = "row",
        fold_groups: bool = False,
        keep_rows: bool = False,
        rows_to: RowsTo = "device",
        chains: bool = True,
    ) -> None:
        if rows not in ("batch", "sample"):
            raise ValueError(f"rows must be 'batch' or 'sample', got {rows!r}")
        if fallback not in ("weight_grad", "skip"):
            raise ValueError(f"fallback must be 'weight_grad' or 'skip', got {fallback!r}")
        if combine not in ("row", "scores"):
            raise ValueError(f"combine must be 'row' or 'scores', got {combine!r}")
        if combine == "scores" and process_group is None:
            raise ValueError("combine='scores' needs the processes: pass process_group, torch.distributed.group.WORLD")
        refusals.refuse_unreadable(model)
        self.model, self.rows, self.strict, self.fallback = model, rows, strict, fallback
        self.process_group, self.combine = process_group, combine
        self.left_out: list[str] = []
        self._num_left_out = 0
        sharded, group = is_sharded(model), tensor_parallel_group(model)
        if sharded and check:
            logger.info("no row is checked against weight gradients: no process has whole ones")
            check = False
        if group is not None and process_group is not None:
            refuse_common_processes(process_group, group)
        self._row_parts = None if group is None else RowParts(group)
        self._checked = check
        self._plan = make_plan(model, modules, rows == "sample", fold_groups)
        self._reading = Reading(rows == "sample", check, self._plan.chains, sharded)
        self._reading.candidates = self._plan.candidates() if chains and check else None
        self._attachment: Attachment | None = None
        self._in_row = self._looked_at_mode = False
        self._tally = Tally(self._flats[0].device)
        self._store = RowStore(self._flats, rows_to) if keep_rows else None
        self._versions: dict[int, int] = {}
        self._reasons: dict[Reader, str | None] = {}  # as they were before the checking row
        if not check:
            first_row.settle_unchecked(self._plan, self.fallback != "skip")

    # --- attaching and detaching ------------------------------------------------------------------------------

    def __enter__(self) -> JacobianScorer:
        if self._attachment is not None:
            raise ScoringError("this scorer is attached already; leave its `with` block before entering it again")
        refusals.refuse_unreadable(self.model)
        if any(module in _attached for module in self.model.modules()):
            model = type(self.model).__name__
            raise ScoringError(f"another scorer is attached to this {model} or a part of it; leave its block first")
        refusals.refuse_changed(self.model, self._plan)
        attachment = Attachment(self.model, self._plan, self._reading)
        try:
            attachment.make()
            self._plan.chains.bind(attachment.norms)
            self._attachment, self._looked_at_mode = attachment, False
            _attached.update(attachment.modules)
            return self
        except BaseException:
            self._attachment = None
            _attached.difference_update(attachment.modules)
            attachment.undo()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        attachment, self._attachment = self._attachment, None
        assert attachment is not None
        _attached.difference_update(attachment.modules)
        attachment.undo()
        if kind is None:
            self._name_left_out()

    @property
    def _flats(self) -> list[FlatRow]:
        return list(self._plan.flats.values())

    @property
    def _norms(self) -> list[NormGradients]:
        return [] if self._attachment is None else self._attachment.norms

    # --- rows -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def row(self, loss_scale: float = 1.0, samples: int | None = None) -> Iterator[None]:
        """One row: every backward inside the block adds to it; leaving the block squares it and adds it to the scores.

        An exception inside drops the row and leaves the scorer as it was before it. On a GPU a row after the checking
        one reads nothing back: captured in a CUDA graph together with its forward, every replay is a row.

        Args:
            loss_scale: what the loss was multiplied by (``GradScaler.get_scale()``); rows are divided by it.
            samples: for sample rows, how many there are: compared with the activations. A compiled model needs it, with
                its forward inside the block.

        Raises:
            ScoringError: the scorer is not attached, rows are nested, gradients were replaced, or (``strict``) the row
                is not finite.
            RowError: an activation was changed in place, or the model took another way; the row can be repeated.
        """
        if self._attachment is None:
            raise ScoringError("the scorer is not attached: open rows inside `with scorer:`")
        if self._in_row:
            raise ScoringError("rows can't be nested: leave the open `with scorer.row():` first")
        self._begin_row(samples)
        try:
            yield
            self._end_row(float(loss_scale), samples)
        except BaseException as error:
            self._drop_row()
            if isinstance(error, ChainError):
                raise self._unchained_from_now_on(error) from error
            if refusals.is_inplace_error(error) and not self._reading.checking:
                raise self._copy_from_now_on() from error
            if isinstance(error, Exception) and not isinstance(error, ScoringError) and self._reading.spread:
                raise self.unspread() from error
            raise
        finally:
            self._in_row = False
            self._plan.chains.forget_row()

    def _begin_row(self, samples: int | None) -> None:
        self._in_row = True
        self._reading.begin_row(samples)
        if self._reading.checking:
            self._reasons = {reader: reader.reason for reader in self._plan.readers.values()}
        if samples is not None and self._reading.samples is None and self.rows == "sample":
            self._reading.samples = samples
            for reader in self._plan.readers.values():
                for slot in reader.slots:
                    slot.bind_samples(samples)
        self._warn_train_mode()
        for flat in self._flats:
            flat.zero()
            flat.reference.zero_()
        for norms in self._norms:
            norms.bind()
        for source in self._plan.sources:
            source.gradient.magnitude = 0.0
        self._versions = {id(tensor): tensor._version for tensor in self._accumulators()}

    def _accumulators(self) -> list[Tensor]:
        """Everything that a backward adds to."""
        flats = [tensor for flat in self._flats for tensor in (flat.row, flat.reference, flat.samples)]
        return [tensor for tensor in (*flats, *(norms.gradient for norms in self._norms)) if tensor is not None]

    def _verify_read(self) -> None:
        """A row into which no backward added is a mistake; only a process among others may have no part in it."""
        unchanged = all(tensor._version == self._versions.get(id(tensor), 0) for tensor in self._accumulators())
        if unchanged and (self.process_group is None or self.combine == "scores"):
            raise ScoringError("no backward reached a scored module in this row; call loss.backward() inside it")

    def _end_row(self, loss_scale: float, samples: int | None) -> None:
        if loss_scale == 0:
            raise ValueError("loss_scale must not be 0")
        refusals.refuse_replaced_gradients(self.model, self._flats, self._norms)
        self._verify_read()
        self._verify_samples(samples)
        for norms in self._norms:
            norms.add_to_row(norms.flat.row)
        # While the checking row is not finite, it is left out, and the next one is checked.
        if not self._reading.checking:
            self._plan.chains.refuse_unseen()
            self._plan.chains.fill()
        checked = not self._reading.checking or self._finish_check()
        assert self._attachment is not None
        self._attachment.drop_gradients()
        if self._row_parts is not None:
            for flat in self._flats:
                self._row_parts.add_up(flat)
        if self.process_group is not None and self.combine == "row":
            for flat in self._flats:
                row = flat.row if flat.samples is None else flat.samples
                torch.distributed.all_reduce(row, group=self.process_group)
        if self.rows == "sample":
            for flat in self._flats:  # where no gate was bound there are none, or those of an earlier row
                flat.sample_rows(self._reading.samples or 1)
        bad, entries = find_faults(self._flats, loss_scale)
        self._tally.add(bad, entries, all_left_out=not checked)
        if self._store is not None and checked:
            self._store.append(~bad, loss_scale)
        for flat in self._flats:
            flat.end_row(loss_scale if checked else float("nan"))
        self._reading.samples = None
        if self.strict or all(flat.device.type == "cpu" for flat in self._flats):
            self._name_left_out()

    def _drop_row(self) -> None:
        self._reading.samples = None
        if self._attachment is not None:
            self._attachment.drop_gradients()
        for flat in self._flats:
            flat.zero()

    def _unchained_from_now_on(self, error: ChainError) -> ChainError:
        self._plan.give_up_chains()
        row = f"row {self._tally.read().ended}"
        self.left_out.append(f"{row}: {error}")
        return ChainError(f"{row} was dropped: {error}; every row is read by gates from now on, so repeat this row")

    def _copy_from_now_on(self) -> InplaceError:
        for reader in self._plan.readers.values():
            reader.copy_from_now_on()
        row = f"row {self._tally.read().ended}"
        self.left_out.append(f"{row}: an activation was changed in place after a gate had read it")
        return InplaceError(
            f"{row} was dropped: an activation was changed in place after a gate had read it, which "
            "did not happen in the checking row; gates work on copies from now on, so repeat this row"
        )

    def _warn_train_mode(self) -> None:
        """Once each time the scorer is attached, at its first row: the mode may be set after attaching."""
        if self._looked_at_mode:
            return
        self._looked_at_mode = True
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                warnings.warn(
                    f"BatchNorm {name!r} is in train mode: a layer before it scores 0 up to rounding, and samples are "
                    "mixed; call model.eval() before scoring",
                    stacklevel=5,
                )
                return

    def _verify_samples(self, samples: int | None) -> None:
        seen = self._reading.samples
        if self.rows != "sample" or seen is None:
            return
        if samples is not None and samples != seen:
            raise ScoringError(
                f"the loss has {samples} samples, but the model's first activation has {seen} entries along dim 0; "
                "sample rows need the samples along dim 0: use rows='batch' with one sample a batch"
            )
        if not self._reading.checking and seen > 1:
            # Of those read so that no gradient reached yet, such as layers that are never called, no row is lost.
            fired = [reader for source in self._plan.sources if source.gradient.fired for reader in source.readers]
            if names := [reader.name for reader in fired if reader.how == "weight gradient" and reader.scored]:
                raise SampleRowsError.of(names)

    # --- the checking row -------------------------------------------------------------------------------------

    def check_samples(self, losses: Tensor) -> None:
        """Make sure that dim 0 is the samples: by their number, in the checking row by the first loss's backward alone.

        Modules whose rows mix samples (BatchNorm in train mode, another layout) are read one sample at a time.

        Args:
            losses: (B,) per-sample losses with their graph; it is kept.
        """
        if self._reading.samples is None:  # no gate was bound
            self._reading.samples, self._reading.begins = losses.numel(), False
        self._refuse_shared_count(losses.numel())
        self._verify_samples(losses.numel())
        if not self._reading.checking or losses.numel() < 2:
            return
        for sample in (0, losses.numel() - 1):
            losses[sample].backward(retain_graph=True)
            for reader in first_row.mixed_samples(list(self._plan.readers.values()), sample):
                reader.reason = "its activations along dim 0 are not one sample each"
            for flat in self._flats:
                flat.zero()
                flat.reference.zero_()

    def _refuse_shared_count(self, samples: int) -> None:
        """An output made once for all samples, and before all others, does not say how many there are."""
        reading, counted_by = self._reading, self._reading.counted_by
        if not reading.checking or counted_by is None or not reading.samples == 1 < samples:
            return
        if counted_by.rule.looks_up:
            counted_by.shared = True
            raise self._repeated(f"{counted_by.name!r} is looked up once for all samples")

    @property
    def spread(self) -> list[str]:
        """In the checking row: look-ups made once for all samples that were spread over them."""
        return [reader.name for reader in self._reading.spread]

    def unspread(self) -> RowError:
        """Hand on these look-ups as they are from now on; the row in hand has to be repeated."""
        names = self.spread
        for reader in self._reading.spread:
            reader.shared = True
        return self._repeated(f"the model does not run as before with {', '.join(names)} spread over the samples")

    def _repeated(self, why: str) -> RowError:
        """Forget what the checking row noted so far."""
        for reader, reason in self._reasons.items():
            reader.reason = reason
        return RowError(f"row {self._tally.read().ended} was dropped: {why}; repeat this row")

    def _finish_check(self) -> bool:
        """Compare, decide how every module is read, take the right values; False where the row is not finite."""
        for flat in self._flats:
            if not bool((flat.row if flat.samples is None else flat.samples).isfinite().all()):
                return False
        fallen = first_row.settle(self._plan, self.fallback != "skip")
        if self.rows == "sample" and (self._reading.samples or 1) > 1 and fallen:
            raise SampleRowsError.of(fallen)
        self._reading.checking = False
        if self._reading.candidates is not None:
            self._plan.confirm_chains(self._reading.candidates, self._norms)
            self._reading.candidates = None
        for flat in self._flats:
            flat.reference = torch.empty(0)
        assert self._attachment is not None
        self._attachment.set_weight_gradients()
        self._refuse_unscored(later_rows=True)
        return True

    def _refuse_unscored(self, later_rows: bool = False) -> None:
        """With ``later_rows`` to come, only what they can't change: a module not used so far may be used yet."""
        unscored = {name: how for name, how in self._coverage().items() if not how.scored}
        if later_rows:
            readers = self._plan.readers
            unscored = {name: how for name, how in unscored.items() if name not in readers or not readers[name].scored}
        if self.strict and unscored:
            raise ScoringError(f"strict: {'; '.join(f'{name!r} is {how}' for name, how in unscored.items())}")

    # --- results ----------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Rows, or samples, that were added so far. Reads from the device."""
        self._name_left_out()
        return self._tally.read().read - self._num_left_out

    @property
    def rows_left_out(self) -> int:
        """Rows, or samples, that were left out so far because they were not finite. Reads from the device."""
        self._name_left_out()
        return self._num_left_out

    def _name_left_out(self) -> None:
        """Name the rows that were not finite; they were left out of the sums already. Reads from the device."""
        count = self._tally.read()
        if not count.left_out:
            return
        self._tally.forget_left_out()
        self._num_left_out += count.left_out
        row = f"row {count.row}" if self.rows == "batch" else f"row {count.row}, sample {count.sample}"
        more = f" (and {count.left_out - 1} more)" if count.left_out > 1 else ""
        message = f"{row} is not finite, first in {label_of(self._flats, count.entry)!r}, and was left out{more}"
        self.left_out.append(message)
        if self.strict:
            raise ScoringError(f"strict: {message}")
        warnings.warn(message, stacklevel=6)

    def _coverage(self) -> dict[str, Coverage]:
        return self._plan.coverage(self.model, self._checked)

    def scores(self) -> Scores:
        """The scores of all rows so far.

        Raises:
            ScoringError: no finite row was ended.
        """
        facts = merge.Facts(self.num_rows, self._coverage(), self.left_out)
        sums = {flat: flat.scores for flat in self._flats}
        together = self.combine == "scores"
        if together:
            facts = merge.all_facts(facts, self.process_group)
            sums = {flat: merge.all_sums(scores, self.process_group) for flat, scores in sums.items()}
        if facts.num_rows == 0:
            how = "; call backward inside `with scorer.row():`"
            why = f"; left out: {facts.left_out[0]}" if facts.left_out else how
            raise ScoringError(f"there is no row to score{why}")
        self._refuse_unscored()
        channels = {}
        for name, reader in self._plan.readers.items():
            if facts.coverage[name].scored:
                channels[name] = ChannelScores(_of(sums, reader.out), _of(sums, reader.in_))
        metadata = {"model": type(self.model).__name__, "rows": self.rows, "obc": obc_version() or "unknown"}
        if facts.left_out:
            metadata["left_out"] = "; ".join(facts.left_out)
        rows = None
        if self._store is not None:
            readers = [self._plan.readers[name] for name in channels]
            rows = self._store.kept({r.name: {"out_channels": r.out, "in_channels": r.in_} for r in readers})
            if together:
                rows = KeptRows(merge.all_rows(rows.matrices, self.process_group), rows.columns)
        return Scores(channels, num_rows=facts.num_rows, coverage=facts.coverage, metadata=metadata, rows=rows)

    @property
    def groups_in_step(self) -> list[Any]:
        """The process groups that read every row together."""
        together = [self.process_group] if self.process_group is not None and self.combine == "row" else []
        return together + ([] if self._row_parts is None else [self._row_parts.group])

    @property
    def devices(self) -> set[torch.device]:
        """The devices that rows are read on."""
        return {flat.device for flat in self._flats}

    @property
    def kept_bytes(self) -> int:
        """What the scorer holds between rows: the row, its gates, the sums, and kept rows in memory."""
        norms = sum(norms.gradient.nbytes for norms in self._norms)
        store = 0 if self._store is None else self._store.memory_bytes
        return sum(flat.nbytes for flat in self._flats) + norms + store

    @property
    def row_store(self) -> RowStore | None:
        """Where rows are kept; None with ``keep_rows=False``."""
        return self._store

    def rows_bytes(self, num_rows: int) -> int:
        """What keeping ``num_rows`` rows takes, in bytes: four for every channel of every scored module."""
        return 4 * num_rows * sum(flat.size for flat in self._flats)

    def reserve_rows(self, num_rows: int) -> None:
        """Make room for ``num_rows`` more kept rows at once, instead of by doubling.

        Before a CUDA graph is captured this is needed, with the number of its replays.

        Raises:
            ScoringError: the scorer does not keep rows.
        """
        if self._store is None:
            raise ScoringError("this scorer keeps no rows: make it with keep_rows=True")
        self._store.reserve(num_rows)

    def state_dict(self, kept_rows: bool = True) -> dict[str, Any]:
        """Everything needed to go on exactly: the sums, how each module is read, the counts, and the kept rows.

        Args:
            kept_rows: False leaves the kept rows out.
        """
        num_rows, count = self.num_rows, self._tally.read()
        state = {
            "rows": self.rows,
            "num_rows": num_rows,
            "rows_ended": count.ended,
            "left_out": list(self.left_out),
            "checking": self._reading.checking,
            **self._plan.state_dict(),
        }
        if kept_rows and self._store is not None:
            state["kept_rows"] = self._store.matrices()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a scorer of the same model and options; call it outside the ``with`` block.

        Raises:
            ValueError: the state is of another model or of other options; nothing was loaded.
            ScoringError: the scorer is attached.
        """
        if self._attachment is not None:
            raise ScoringError("load the state before entering `with scorer:`")
        if missing := sorted(self.state_dict(kept_rows=False).keys() - state.keys()):
            raise ValueError(
                f"this is not the state of a scorer: it has no {missing[0]!r}; pass what state_dict() gave"
            )
        if state["rows"] != self.rows:
            raise ValueError(f"this state has rows={state['rows']!r}, this scorer rows={self.rows!r}")
        if ("kept_rows" in state) != (self._store is not None):
            kept = "kept" if "kept_rows" in state else "no kept"
            raise ValueError(f"this state has {kept} rows, this scorer keep_rows={self._store is not None}")
        self._plan.load_state_dict(state)
        if self._store is not None:
            self._store.load(state["kept_rows"])
        self._tally = Tally(self._flats[0].device, ended=state["rows_ended"], read=state["num_rows"])
        self._num_left_out = 0
        self.left_out = list(state["left_out"])
        self._reading.checking = state["checking"]


def _of(sums: Mapping[FlatRow, Tensor], slot: Slot | None) -> Tensor | None:
    return None if slot is None or not slot.read else slot.of(sums[slot.flat]).detach().clone().float()
