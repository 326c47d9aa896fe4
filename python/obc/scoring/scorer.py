"""The scorer: attaches to a model, reads one row per backward, adds up the squares, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from obc.distribution import obc_version
from obc.model.sharding import is_sharded
from obc.scoring.coverage import Coverage
from obc.scoring.errors import ChainError, InplaceError, RowError, ScoringError
from obc.scoring.reading import refusals
from obc.scoring.reading.attachment import Attachment
from obc.scoring.reading.checking_row import CheckingRow
from obc.scoring.reading.flat_row import FlatRow, Slot, end_row
from obc.scoring.reading.module_readers import Reading
from obc.scoring.reading.reading_plan import ModuleFilter, make_plan
from obc.scoring.reading.row_counter import RowCounter
from obc.scoring.reading.row_in_hand import RowInHand
from obc.scoring.results import merge
from obc.scoring.results.kept_rows import KeptRows
from obc.scoring.results.row_store import RowsTo, RowStore
from obc.scoring.results.scores import ChannelScores, Scores
from obc.scoring.sharding import SharedRows

logger = logging.getLogger("obc")

Rows = Literal["batch", "sample"]
Fallback = Literal["weight_grad", "skip"]
Combine = Literal["row", "scores"]

# Models that a scorer is attached to: a second scorer would put gates on gates.
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
        _check_arguments(rows, fallback, combine, process_group)
        refusals.refuse_unreadable(model)
        self.model, self.rows, self.strict = model, rows, strict
        self.process_group, self.combine = process_group, combine
        self._shared = SharedRows(model, process_group, combine == "row")
        per_sample, sharded = rows == "sample", is_sharded(model)
        if sharded and check:
            logger.info("no row is checked against weight gradients: no process has whole ones")
            check = False
        self._was_checked = check
        self._plan = make_plan(model, modules, per_sample, fold_groups)
        self._reading = Reading(per_sample, check, self._plan.chains, sharded)
        self._reading.candidates = self._plan.candidates() if chains and check else None
        self._counter = RowCounter(self._flats, per_sample, strict)
        self._check = CheckingRow(self._plan, self._reading, self._counter, fallback != "skip")
        self._store = RowStore(self._flats, rows_to) if keep_rows else None
        self._attachment: Attachment | None = None
        self._row: RowInHand | None = None
        self._looked_at_mode = False

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
            self._counter.name_faults()

    @property
    def _flats(self) -> list[FlatRow]:
        return list(self._plan.flats.values())

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
        if self._row is not None:
            raise ScoringError("rows can't be nested: leave the open `with scorer.row():` first")
        if loss_scale == 0:
            raise ValueError("loss_scale must not be 0")
        self._warn_train_mode()
        self._check.begin()
        self._row = RowInHand(self.model, self._plan, self._reading, self._attachment, samples)
        try:
            yield
            self._end_row(self._row, self._attachment, float(loss_scale))
        except BaseException as error:
            self._row.drop()
            if (repeatable := self._repeatable(error)) is not None:
                raise repeatable from error
            raise
        finally:
            self._row = None
            self._plan.chains.forget_row()

    def _end_row(self, row: RowInHand, attachment: Attachment, loss_scale: float) -> None:
        row.complete(may_be_empty=self.process_group is not None and self.combine == "row")
        # A checking row that is not finite is dropped, and the next one is checked.
        counts = not self._reading.checking or self._settle_check(attachment)
        if self._reading.pending is not None:
            self._check.confirm_pending(attachment)
        attachment.drop_gradients()
        self._shared.add_up(self._flats)
        samples = self._reading.samples or 1
        if self.rows == "sample":
            for flat in self._flats:  # where no gate was bound there are none, or those of an earlier row
                flat.sample_rows(samples)
        if self._store is not None and counts:
            self._store.make_room(samples)
        ended = end_row(self._flats, loss_scale, add=counts)
        self._counter.add(ended, dropped=not counts)
        if self._store is not None and counts:
            self._store.append(ended)
        self._reading.samples = None
        if self.strict or self.devices == {torch.device("cpu")}:
            self._counter.name_faults()

    @property
    def can_check_on_a_sample(self) -> bool:
        """Whether the next row is the checking one, and a backward of one sample can stand for it."""
        return (
            self._attachment is not None
            and self._reading.checking
            and self.rows == "batch"
            and self.process_group is None
        )

    @contextlib.contextmanager
    def check_on_a_sample(self) -> Iterator[None]:
        """Check how modules are read by the backward of one sample, which runs inside the block and is no row.

        Unless every module is read rightly on it, nothing is decided and the next row is the checking one. Chains that
        the sample suggests are used once a row of a whole batch has confirmed them.
        """
        if self._attachment is None or self._row is not None or not self.can_check_on_a_sample:
            raise ScoringError("the check on a sample comes before the first row of an attached scorer of batch rows")
        self._check.begin()
        self._row = RowInHand(self.model, self._plan, self._reading, self._attachment, None)
        settled = False
        try:
            yield
            self._row.complete(may_be_empty=False)
            settled = self._check.settle_on_a_sample(self._attachment)
        finally:
            if not settled:
                self._check.forget()
            self._row.drop()
            self._row = None
            self._plan.chains.forget_row()

    def _settle_check(self, attachment: Attachment) -> bool:
        settled = self._check.settle(attachment)
        if settled:
            self._refuse_unscored(later_rows=True)
        return settled

    def _repeatable(self, error: BaseException) -> RowError | None:
        """The error to raise after a change of how rows are read: the row can be repeated. None if nothing helps."""
        if isinstance(error, ChainError):
            self._plan.give_up_chains()
            row = self._leave_out(str(error))
            return ChainError(f"{row} was dropped: {error}; every row is read by gates from now on, so repeat this row")
        if refusals.is_inplace_error(error) and not self._reading.checking:
            for reader in self._plan.readers.values():
                reader.copy_from_now_on()
            why = "an activation was changed in place after a gate had read it"
            return InplaceError(
                f"{self._leave_out(why)} was dropped: {why}, which did not happen in the checking row; gates work on "
                "copies from now on, so repeat this row"
            )
        if isinstance(error, Exception) and not isinstance(error, ScoringError) and self._reading.spread:
            return self.unspread()
        return None

    def _leave_out(self, why: str) -> str:
        """Note why this row is left out; returns which row it is."""
        row = self._counter.row()
        self._counter.left_out.append(f"{row}: {why}")
        return row

    def _warn_train_mode(self) -> None:
        """Once each time the scorer is attached, at its first row: the mode may be set after attaching."""
        if not self._looked_at_mode:
            self._looked_at_mode = True
            refusals.warn_train_mode(self.model, stacklevel=4)

    def check_samples(self, losses: Tensor) -> None:
        """Check that dim 0 holds the samples: by their number, and in the checking row by backwards of single losses.

        Modules whose rows mix samples (BatchNorm in train mode, another layout) are read one sample at a time.

        Args:
            losses: (B,) per-sample losses with their graph; it is kept.
        """
        self._check.check_samples(losses)

    @property
    def spread(self) -> list[str]:
        """The look-ups made once for all samples that the checking row repeated for each."""
        return [reader.name for reader in self._reading.spread]

    def unspread(self) -> RowError:
        """Stop repeating these look-ups from now on; this row has to be repeated."""
        return self._check.unspread()

    def _refuse_unscored(self, later_rows: bool = False) -> None:
        """Raise if a module ends unscored; with ``later_rows`` to come, one that was not used so far is no fault."""
        if not self.strict:
            return
        unscored = {name: how for name, how in self._coverage().items() if not how.scored}
        if later_rows:
            readers = self._plan.readers
            unscored = {name: how for name, how in unscored.items() if name not in readers or not readers[name].scored}
        if unscored:
            raise ScoringError(f"strict: {'; '.join(f'{name!r} is {how}' for name, how in unscored.items())}")

    # --- results ----------------------------------------------------------------------------------------------

    @property
    def left_out(self) -> list[str]:
        """The rows that were left out so far, each with its reason."""
        return self._counter.left_out

    def count_rows(self) -> int:
        """Rows, or samples, that were added so far. Reads from the device."""
        return self._counter.count()

    def count_left_out(self) -> int:
        """Rows, or samples, that were left out so far because they were not finite. Reads from the device."""
        return self._counter.count_left_out()

    def _coverage(self) -> dict[str, Coverage]:
        return self._plan.coverage(self.model, self._was_checked)

    def scores(self) -> Scores:
        """The scores of all rows so far.

        Raises:
            ScoringError: no finite row was ended.
        """
        facts = merge.Facts(self.count_rows(), self._coverage(), self.left_out)
        sums = {flat: flat.scores for flat in self._flats}
        if self.combine == "scores":
            facts = merge.all_facts(facts, self.process_group)
            sums = {flat: merge.all_sums(scores, self.process_group) for flat, scores in sums.items()}
        if facts.num_rows == 0:
            how = "; call backward inside `with scorer.row():`"
            why = f"; left out: {facts.left_out[0]}" if facts.left_out else how
            raise ScoringError(f"there is no row to score{why}")
        self._refuse_unscored()
        slots = {name: self._plan.sides(name) for name in self._plan.readers if facts.coverage[name].scored}
        found = {
            name: {side: slot.of(sums[slot.flat]).detach().clone().float() for side, slot in sides.items()}
            for name, sides in slots.items()
        }
        channels = {name: ChannelScores(**({"out_channels": None} | sides)) for name, sides in found.items()}
        metadata = {"model": type(self.model).__name__, "rows": self.rows, "obc": obc_version() or "unknown"}
        if facts.left_out:
            metadata["left_out"] = "; ".join(facts.left_out)
        return Scores(
            channels,
            num_rows=facts.num_rows,
            coverage=facts.coverage,
            metadata=metadata,
            rows=self._kept_rows(slots),
        )

    def _kept_rows(self, slots: Mapping[str, Mapping[str, Slot]]) -> KeptRows | None:
        if self._store is None:
            return None
        rows = self._store.kept(slots)
        if self.combine == "scores":
            rows = KeptRows(merge.all_rows(rows.matrices, self.process_group), rows.columns)
        return rows

    @property
    def groups_in_step(self) -> list[Any]:
        """The process groups that read every row together."""
        return self._shared.groups

    @property
    def devices(self) -> set[torch.device]:
        """The devices that rows are read on."""
        return {flat.device for flat in self._flats}

    @property
    def kept_bytes(self) -> int:
        """What the scorer holds between rows: the row, its gates, the sums, and kept rows in memory."""
        norms = [] if self._attachment is None else self._attachment.norms
        store = 0 if self._store is None else self._store.memory_bytes
        gradients = sum(part.gradient.nbytes for part in norms)
        return sum(flat.nbytes for flat in self._flats) + self._counter.nbytes + gradients + store

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
        num_rows = self.count_rows()
        state = {
            "rows": self.rows,
            "num_rows": num_rows,
            "rows_ended": self._counter.read().ended,
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
        self._counter.load(state["rows_ended"], state["num_rows"], state["left_out"])
        self._reading.checking = state["checking"]


def _check_arguments(rows: str, fallback: str, combine: str, process_group: Any) -> None:
    for name, value, known in (
        ("rows", rows, ("batch", "sample")),
        ("fallback", fallback, ("weight_grad", "skip")),
        ("combine", combine, ("row", "scores")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    if combine == "scores" and process_group is None:
        raise ValueError("combine='scores' needs the processes: pass process_group, torch.distributed.group.WORLD")
