"""Every hazard of scoring: what must come out right all the same, and what must be said instead of guessed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import models
import nasty
import oracle
import pytest
import started
import torch
import torch.nn.functional as F
from models import Case, floats
from nasty import NASTY
from parity import assert_equal, assert_parity, eager_scores, error, expected_scores, score_in_a_loop
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import obc

pytestmark = pytest.mark.usefixtures("gates")

# Modules that no gate can serve, per family: their own forward is not called, or is not all that their weight does.
BEYOND_GATES = {
    "multihead-attention": ["attention.out_proj"],
    "encoder-layer-first": ["encoder.self_attn.out_proj"],
    "functional-weight": ["functional"],
    "partial-bypass": ["both"],
    "adapted": ["lora", "pair"],
}


def how(scores: obc.Scores, name: str) -> str:
    return str(scores.coverage[name])


# --- modules that break naive hooks --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", NASTY)
def test_nasty_modules_match_the_oracle(family: str, rows: str) -> None:
    case = NASTY[family]()
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    assert_parity(scores, expected_scores(case, rows))


@pytest.mark.parametrize("family", NASTY)
def test_only_what_no_gate_serves_falls_back(family: str) -> None:
    """One bad layer must not cost the others their gates."""
    case = NASTY[family]()
    scores = obc.score(case.model, case.batches, case.loss)
    fallen = [name for name in oracle.scorable(case.model) if how(scores, name).startswith("weight gradient")]
    assert fallen == BEYOND_GATES.get(family, [])


@pytest.mark.parametrize("family", [name for name in NASTY if name not in BEYOND_GATES])
def test_nasty_modules_without_the_checking_row(family: str) -> None:
    """Then in-place changes show only as version errors, and the row is repeated."""
    case = NASTY[family]()
    assert_parity(obc.score(case.model, case.batches, case.loss, check=False), expected_scores(case))


@pytest.mark.parametrize("family", NASTY)
def test_nasty_modules_in_micro_batches(family: str) -> None:
    case = NASTY[family]()
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for _ in range(2):
            with scorer.row():
                for batch in case.batches:
                    case.loss(case.model, batch).backward()

    def whole(model: nn.Module, _: int) -> Tensor:
        return torch.stack([case.loss(model, batch) for batch in case.batches]).sum()

    assert_parity(scorer.scores(), oracle.scores(case.oracle_model, [0, 1], whole))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_reentrant_checkpoint_that_no_gradient_enters_is_named_unscored() -> None:
    """Nothing scored lies before the segment: torch then gives no gradient inside it, with plain weights either."""
    case = NASTY["checkpoint-reentrant"]()
    scores = obc.score(case.model, case.batches, case.loss, modules=["blocks.0.0", "head"])
    assert how(scores, "blocks.0.0").startswith("unscored: no gradient reached it")
    assert "blocks.0.0" not in scores
    assert_parity(scores, expected_scores(case), ["head"])


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_embeddings_under_options(rows: str) -> None:
    """Gradients scaled by frequency are a matter of whole batches; a maximal norm changes the weight in forward."""
    case = models.embedding_by_frequency()
    if rows == "batch":
        assert_parity(obc.score(case.model, case.batches, case.loss), expected_scores(case))
    case = models.case(lambda: models.Embedded(max_norm=1.0), models.tokens(9, 7), models.token_losses)
    case.loss(case.model, torch.arange(9).expand(4, 9))  # every row has been looked up: the weight is settled
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    assert_parity(scores, expected_scores(case, rows))


def test_parametrised_weights_are_read_by_gates() -> None:
    """The weight is computed from other parameters, so it has no gradient of its own to check against."""
    case = models.linears()
    plain = copy.deepcopy(case.model)
    parametrizations.weight_norm(case.model.three)
    with torch.no_grad():
        case.model.three.parametrizations.weight.original0.mul_(1.7)
        plain.three.weight.copy_(case.model.three.weight)
    scores = obc.score(case.model, case.batches, case.loss)
    assert_parity(scores, oracle.scores(plain, case.batches, case.loss), ["four", "three", "two"])


class WithBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.pairs, self.head = nn.Linear(5, 6), nn.Bilinear(6, 6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc(x))
        return self.head(self.pairs(hidden, hidden))


def test_modules_without_a_rule_are_named_unscored() -> None:
    case = models.case(WithBilinear, floats(3, 5))
    scores = obc.score(case.model, case.batches, case.loss)
    assert_parity(scores, expected_scores(case))
    assert how(scores, "pairs").startswith("unscored")
    assert "Bilinear" in how(scores, "pairs")
    assert "pairs" not in scores
    with pytest.raises(KeyError, match=r"pairs.*Bilinear"):
        scores["pairs"]


# --- layers that are not always there ------------------------------------------------------------------------------


def test_unused_layers_are_named_unscored() -> None:
    case = nasty.branches(True, False, True)
    scores = obc.score(case.model, case.batches, case.loss)
    assert how(scores, "unused").startswith("unscored")
    assert "unused" not in scores
    assert_parity(scores, expected_scores(case), ["fc", "late", "late_norm", "head"])


def test_samples_are_read_together_beside_a_layer_that_is_never_called(caplog: pytest.LogCaptureFixture) -> None:
    case = nasty.branches(True, True, True)
    scores = obc.score(case.model, case.batches, case.loss_fn("sample"), rows="sample")
    assert "sample by sample" not in caplog.text
    assert_parity(scores, expected_scores(case, "sample"), ["fc", "late", "late_norm", "head"])


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("use_late", [(True, False, True), (False, False, True), (False, True, False)], ids=str)
def test_layers_used_in_some_rows_only(use_late: tuple[bool, ...], rows: str) -> None:
    """Also where the checking row does not use them: they are checked, or read safely, when they first come up."""
    case = nasty.branches(*use_late)
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    assert_parity(scores, expected_scores(case, rows), ["fc", "late", "late_norm", "head"])
    assert not how(scores, "late").startswith("unscored")


def test_layers_used_late_are_not_unscored_to_strict() -> None:
    case = nasty.branches(False, True)
    del case.model.unused
    scores = obc.score(case.model, case.batches, case.loss, strict=True)
    assert_parity(scores, expected_scores(case), ["fc", "late", "late_norm", "head"])


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("change", ["output", "input"])
@pytest.mark.parametrize("flags", [(False, True, True), (False, False, True, False), (True, False, True)], ids=str)
def test_in_place_changes_that_begin_in_a_later_row(flags: tuple[bool, ...], change: str, rows: str) -> None:
    case = nasty.late_in_place(change, *flags)
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    assert_parity(scores, expected_scores(case, rows))
    assert scores.num_rows == len(flags) * (models.BATCH if rows == "sample" else 1)


@pytest.mark.parametrize("change", ["output", "input"])
def test_an_own_loop_is_told_to_repeat_a_row_changed_in_place(change: str) -> None:
    case = nasty.late_in_place(change, False, True, True)
    scorer = obc.JacobianScorer(case.model)

    def row(batch: Any) -> None:
        with scorer.row():
            case.loss(case.model, batch).backward()

    with scorer:
        row(case.batches[0])
        with pytest.raises(RuntimeError, match=r"row 1 was dropped.*in place.*repeat"):
            row(case.batches[1])
        row(case.batches[1])
        row(case.batches[2])
    assert_parity(scorer.scores(), expected_scores(case))


def test_an_own_loop_that_does_not_repeat_loses_that_row_only() -> None:
    case = nasty.late_in_place("output", False, True, True)
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for batch in case.batches:
            try:
                with scorer.row():
                    case.loss(case.model, batch).backward()
            except RuntimeError:
                continue
    scores = scorer.scores()
    assert scores.num_rows == 2
    assert_parity(scores, oracle.scores(case.oracle_model, [case.batches[0], case.batches[2]], case.loss))


# --- tied and grouped weights --------------------------------------------------------------------------------------


def tied_scores(case: Case) -> dict[str, Tensor]:
    """Scores of the one parameter of an embedding and its head: per embedding dimension, and per vocabulary entry."""
    model = copy.deepcopy(case.model).double()
    weight = model.embedding.weight
    total = {"width": torch.zeros(weight.shape[1]), "vocabulary": torch.zeros(weight.shape[0])}
    for batch in case.batches:
        (grad,) = torch.autograd.grad(case.loss(model, batch), [weight])
        product = (weight * grad).detach()
        total["width"] = total["width"] + product.sum(0).square()
        total["vocabulary"] = total["vocabulary"] + product.sum(1).square()
    return total


def test_tied_weights_add_up_before_the_square() -> None:
    """Both modules report the row of the parameter: the embedding's use and the head's together."""
    case = models.tied()
    scores = obc.score(case.model, case.batches, case.loss)
    expected = tied_scores(case)
    assert error(scores["embedding"].out_channels, expected["width"]) <= 1e-4
    assert error(scores["head"].in_channels, expected["width"]) <= 1e-4
    assert error(scores["head"].out_channels, expected["vocabulary"]) <= 1e-4
    assert_parity(scores, expected_scores(case), ["norm", "mix"])


def test_tied_weights_in_sample_rows() -> None:
    case = models.tied()
    scores = obc.score(case.model, case.batches, case.losses, rows="sample")
    singles = Case(case.model, [b[i : i + 1] for b in case.batches for i in range(len(b))], case.losses, case.model)
    expected = tied_scores(singles)
    assert error(scores["embedding"].out_channels, expected["width"]) <= 1e-4
    assert error(scores["head"].in_channels, expected["width"]) <= 1e-4
    assert error(scores["head"].out_channels, expected["vocabulary"]) <= 1e-4
    assert_parity(scores, expected_scores(case, "sample"), ["norm", "mix"])


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_groups_folded_before_the_square(rows: str) -> None:
    """The authors' in channels of a grouped convolution: one per weight column, its groups added up."""
    case = models.convolutions(2)
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, fold_groups=True)
    truth = oracle.rows(case.model, case.batches, case.loss_fn(rows), rows=rows)
    checked = 0
    for name, module in case.model.named_children():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            _, in_rows = truth[name]
            assert in_rows is not None
            if not module.transposed:
                in_rows = in_rows.unflatten(1, (module.groups, -1)).sum(1)
            assert error(scores[name].in_channels, in_rows.square().sum(0)) <= 1e-4
            checked += 1
    assert checked == 6


# --- train mode ----------------------------------------------------------------------------------------------------


def test_batchnorm_in_train_mode_warns_once_and_a_conv_before_it_scores_zero() -> None:
    case = models.residual_cnn()
    evaluated = obc.score(case.model, case.batches, case.loss)
    case.model.train()
    scorer = obc.JacobianScorer(case.model)
    with pytest.warns(UserWarning, match=r"BatchNorm.*norm.*train mode.*eval") as caught:
        scores = score_in_a_loop(scorer, case)
    assert len([w for w in caught if "train mode" in str(w.message)]) == 1
    assert scores["stem"].out_channels.max() < 1e-6 * evaluated["stem"].out_channels.max()


def test_score_uses_eval_mode_and_does_not_warn() -> None:
    case = models.residual_cnn()
    case.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = obc.score(case.model, case.batches, case.loss)
    assert_parity(scores, expected_scores(case))
    assert all(module.training for module in case.model.modules())


def test_dropout_in_train_mode_sees_the_same_masks() -> None:
    """Neither the checking row nor the later ones draw a random number of their own."""
    case = models.case(nasty.Dropped, floats(6))
    case.model.train()
    torch.manual_seed(5)
    scores = score_in_a_loop(obc.JacobianScorer(case.model), case)
    torch.manual_seed(5)
    assert_parity(scores, oracle.scores(case.model, case.batches, case.loss, training=True))


def test_nn_dropout_in_train_mode() -> None:
    case = models.case(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.GELU(), nn.Linear(8, 4), nn.Dropout(0.2)), floats(6)
    )
    case.model.train()
    torch.manual_seed(5)
    scores = score_in_a_loop(obc.JacobianScorer(case.model), case)
    torch.manual_seed(5)
    assert_parity(scores, eager_scores(case, case.model))


# --- fallbacks and strictness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", BEYOND_GATES)
def test_fallback_skip_names_what_it_leaves_out(family: str, rows: str) -> None:
    case = NASTY[family]()
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, fallback="skip")
    for name in BEYOND_GATES[family]:
        assert how(scores, name).startswith("unscored")
        assert len(how(scores, name)) > len("unscored: ")
        assert name not in scores
    expected = expected_scores(case, rows)
    assert_parity(scores, expected, [name for name in expected if name not in BEYOND_GATES[family]])


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_strict_raises_where_something_ends_unscored(rows: str) -> None:
    case = NASTY["functional-weight"]()
    with pytest.raises(RuntimeError, match=r"'functional'.*unscored"):
        obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, fallback="skip", strict=True)
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, strict=True)
    assert_parity(scores, expected_scores(case, rows))


def test_strict_raises_for_an_unused_layer() -> None:
    case = nasty.branches(True, True)
    with pytest.raises(RuntimeError, match=r"'unused'.*unscored"):
        obc.score(case.model, case.batches, case.loss, strict=True)


# --- gates meddled with --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("row", [0, 1])
def test_create_graph_is_refused(row: int) -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        for index in range(row + 1):
            if index < row:
                with scorer.row():
                    case.loss(case.model, case.batches[index]).backward()
            else:
                with pytest.raises(RuntimeError, match="create_graph"), scorer.row():
                    case.loss(case.model, case.batches[index]).backward(create_graph=True)
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("row", [0, 1])
def test_a_gate_whose_gradient_was_taken_away_is_noticed(row: int) -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)

    def meddle(batch: Any) -> None:
        with scorer.row():
            loss = case.loss(case.model, batch)
            gate = next(slot.gate for flat in scorer._parts.flats for slot in flat.slots if slot.gate is not None)
            gate.grad = None
            loss.backward()

    with scorer:
        for batch in case.batches[:row]:
            with scorer.row():
                case.loss(case.model, batch).backward()
        with pytest.raises(RuntimeError, match=r"gradient.*replaced"):
            meddle(case.batches[row])


@pytest.mark.parametrize("row", [0, 1])
def test_zero_grad_between_backward_and_the_end_of_the_row_is_never_silently_wrong(row: int) -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)

    def meddle(batch: Any) -> None:
        with scorer.row():
            case.loss(case.model, batch).backward()
            case.model.zero_grad()

    with scorer:
        for batch in case.batches[:row]:
            with scorer.row():
                case.loss(case.model, batch).backward()
        with pytest.raises(RuntimeError, match="zero_grad"):
            meddle(case.batches[row])


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_forwards_and_backwards_outside_rows_do_not_count(rows: str) -> None:
    """A look at another loss between rows, with another batch size, with and without its backward."""
    case = models.norms()
    scorer = obc.JacobianScorer(case.model, rows=rows)
    stray = floats(4, 4, batch=7, batches=1)
    stray = [(torch.randn(7, 3, 4, 4), stray[0][1])]
    with scorer:
        for index, batch in enumerate(case.batches):
            loss = case.losses(case.model, stray[0]).mean()
            if index == 1:
                loss.backward()
            with scorer.row():
                losses = case.losses(case.model, batch)
                (losses.sum() if rows == "sample" else losses.mean()).backward()
    assert_parity(scorer.scores(), expected_scores(case, rows))


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_forward_before_the_row_that_its_backward_is_in(rows: str) -> None:
    case = models.norms()
    scorer = obc.JacobianScorer(case.model, rows=rows)
    with scorer:
        for batch in case.batches:
            losses = case.losses(case.model, batch)
            with scorer.row():
                (losses.sum() if rows == "sample" else losses.mean()).backward()
    assert_parity(scorer.scores(), expected_scores(case, rows))


# --- several processes ---------------------------------------------------------------------------------------------


def test_rows_of_several_processes_add_up_before_the_square(tmp_path: Any) -> None:
    """Each process has half of every batch; a row is the whole batch's."""
    case = models.residual_cnn()
    started.processes(_score_half, (str(tmp_path / "store"), str(tmp_path)), 2)
    expected = expected_scores(case)
    first, second = (obc.Scores.load(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert_parity(first, expected)
    assert_equal(first, second)


def _score_half(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    case = models.residual_cnn()
    halves = [(x.chunk(2)[rank], labels.chunk(2)[rank]) for x, labels in case.batches]

    def half_of_the_mean(model: nn.Module, batch: Any) -> Tensor:
        return case.losses(model, batch).sum() / models.BATCH

    group = torch.distributed.group.WORLD
    scores = obc.score(case.model, halves, half_of_the_mean, process_group=group)
    scores.save(f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()
