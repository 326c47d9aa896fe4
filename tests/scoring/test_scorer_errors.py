"""Bad input: a clear error that names what was wrong, its value and the remedy, and a model left as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from parity import assert_parity, expected_scores, score_in_a_loop
from snapshot import Snapshot, unusual
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import obc

Loss = Callable[[nn.Module, Any], Any]


def refused(kind: type[Exception], match: str, loss: Loss, **options: Any) -> None:
    """Scoring with this loss raises, and leaves an unusual model as it was."""
    case = models.residual_cnn()
    snapshot = Snapshot(unusual(case.model))
    with pytest.raises(kind, match=match):
        obc.score(case.model, case.batches, loss, **options)
    snapshot.assert_restored()


# --- losses --------------------------------------------------------------------------------------------------------


def losses(model: nn.Module, batch: Any) -> Tensor:
    return models.class_losses(model, batch)


def test_a_loss_that_is_a_vector() -> None:
    refused(ValueError, r"batch 0.*\(4,\).*scalar.*(mean|rows='sample')", losses)


def test_a_loss_that_is_a_matrix_for_sample_rows() -> None:
    refused(ValueError, r"batch 0.*\(2, 2\).*vector", lambda m, b: losses(m, b).reshape(2, 2), rows="sample")


def test_a_mean_loss_for_sample_rows() -> None:
    refused(
        ValueError,
        r"batch 0.*\(\).*vector.*per-sample.*reduction='none'",
        lambda m, b: losses(m, b).mean(),
        rows="sample",
    )


def test_losses_of_another_number_than_the_samples() -> None:
    refused(RuntimeError, r"2 samples.*4 entries along dim 0", lambda m, b: losses(m, b)[:2], rows="sample")


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_loss_without_a_graph(rows: str) -> None:
    def detached(model: nn.Module, batch: Any) -> Tensor:
        values = losses(model, batch).detach()
        return values if rows == "sample" else values.mean()

    refused(ValueError, "batch 0.*no graph.*detach", detached, rows=rows)


def test_a_loss_under_no_grad() -> None:
    case = models.residual_cnn()
    snapshot = Snapshot(case.model)
    with torch.no_grad(), pytest.raises(ValueError, match=r"no graph.*no_grad"):
        obc.score(case.model, case.batches, case.loss)
    snapshot.assert_restored()


@pytest.mark.parametrize("value", [1.5, None, "loss"])
def test_a_loss_that_is_no_tensor(value: object) -> None:
    refused(ValueError, f"batch 0.*tensor.*{type(value).__name__}", lambda m, b: value)


def test_a_bad_loss_in_a_later_batch_is_named_by_its_index() -> None:
    case = models.residual_cnn()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = case.losses(model, batch)
        return value if batch is case.batches[2] else value.mean()

    with pytest.raises(ValueError, match="batch 2"):
        obc.score(case.model, case.batches, loss)


def test_losses_that_are_never_finite() -> None:
    """Each row is left out with a warning; a run without any finite row is an error that says so."""
    with pytest.warns(UserWarning, match=r"row [012] .*not finite"):
        refused(RuntimeError, "no row.*not finite", lambda m, b: losses(m, b).mean() * float("nan"))


def test_a_nan_loss_is_an_error_to_strict() -> None:
    refused(RuntimeError, r"row 0.*not finite", lambda m, b: losses(m, b).mean() * float("nan"), strict=True)


def test_a_model_whose_input_shape_is_wrong_says_so_itself() -> None:
    refused(RuntimeError, "channels", lambda m, b: losses(m, (b[0][:, :2], b[1])).mean())


# --- models, batches, options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.Sequential(nn.Flatten(), nn.Dropout())], ids=repr)
def test_a_model_without_a_scorable_layer(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no module that can be scored [(]its modules"):
        obc.JacobianScorer(model)


@pytest.mark.parametrize("modules", [[], ["1"], lambda name, module: False], ids=["none", "other", "predicate"])
def test_a_choice_without_a_scorable_layer(modules: Any) -> None:
    with pytest.raises(ValueError, match="Sequential has no module that can be scored among those that modules= choo"):
        obc.JacobianScorer(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), modules=modules)


@pytest.mark.parametrize("batches", [[], iter([]), (x for x in ())], ids=["list", "iterator", "generator"])
def test_no_batches(batches: Any) -> None:
    case = models.residual_cnn()
    snapshot = Snapshot(unusual(case.model))
    with pytest.raises(ValueError, match="batches is empty"):
        obc.score(case.model, batches, case.loss)
    snapshot.assert_restored()


def test_a_generator_that_was_read_already() -> None:
    case = models.residual_cnn()
    batches = (batch for batch in case.batches)
    obc.score(case.model, batches, case.loss)
    with pytest.raises(ValueError, match=r"empty.*generator"):
        obc.score(case.model, batches, case.loss)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("rows", "samples", "'batch' or 'sample'"), ("fallback", "none", "'weight_grad' or 'skip'")],
)
def test_an_option_of_another_value(option: str, value: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"{option}.*{named}.*'{value}'"):
        obc.JacobianScorer(nn.Linear(2, 2), **{option: value})


def test_a_module_name_that_the_model_lacks() -> None:
    with pytest.raises(ValueError, match=r"'head2'.*named_modules"):
        obc.JacobianScorer(models.residual_cnn().model, modules=["head2"])


def test_a_choice_of_no_module() -> None:
    with pytest.raises(ValueError, match="no module"):
        obc.JacobianScorer(models.residual_cnn().model, modules=lambda name, module: False)


def test_parameters_that_are_not_initialised_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    batch = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match=r"'0'.*not initialised.*run one batch"):
        obc.score(model, [batch], lambda m, b: m(b).square().mean(), strict=True)


# --- the scorer's use ----------------------------------------------------------------------------------------------


def made_in_inference_mode(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        copied = tokens.clone()
    return model(copied).sum()


def run_in(mode: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        with mode():
            return model(tokens).sum()

    return loss


FOREIGN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "a batch of inference mode": (made_in_inference_mode, "tensor.clone()"),
    "no gradients": (run_in(torch.no_grad), "outside torch.no_grad()"),
    "inference mode": (run_in(torch.inference_mode), "outside torch.no_grad() and torch.inference_mode()"),
    "detached": (lambda model, tokens: model(tokens).detach().sum(), "detach nothing"),
}


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("fault", FOREIGN)
def test_errors_of_torch_in_a_loop_of_the_caller_carry_the_remedy(fault: str, rows: Any) -> None:
    loss, remedy = FOREIGN[fault]
    model, tokens = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), torch.tensor([[1, 2], [3, 4]])
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError) as raised, obc.JacobianScorer(model, rows=rows) as scorer, scorer.row():
        loss(model, tokens).backward()
    (note,) = vars(raised.value)["__notes__"]
    assert note.startswith("obc.JacobianScorer: ")
    assert remedy in note
    snapshot.assert_restored()


def test_a_scorer_of_the_model_inside_distributed_data_parallel_carries_the_remedy() -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # Norms are read by the gradients of their weights, so the reduction begins, and frozen weights never end it.
        inside = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
        x = torch.randn(2, 4)

        def rows(scorer: obc.JacobianScorer, model: nn.Module) -> obc.Scores:
            with scorer:
                for _ in range(4):
                    with scorer.row():
                        model(x).sum().backward()
            return scorer.scores()

        expected = rows(obc.JacobianScorer(inside), inside)
        model = nn.parallel.DistributedDataParallel(inside)
        found = rows(obc.JacobianScorer(model), model)
        for name, scores in expected.items():
            torch.testing.assert_close(found[f"module.{name}"].out_channels, scores.out_channels)
        model = nn.parallel.DistributedDataParallel(inside)
        with pytest.raises(RuntimeError, match="reduction in the prior iteration") as raised:
            rows(obc.JacobianScorer(inside), model)
        assert "of the DistributedDataParallel model itself" in vars(raised.value)["__notes__"][0]
    finally:
        dist.destroy_process_group()


def one_row(scorer: obc.JacobianScorer, case: models.Case) -> None:
    with scorer.row():
        case.loss(case.model, case.batches[0]).backward()


def test_a_row_outside_the_context() -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    with pytest.raises(RuntimeError, match=r"not attached.*with scorer"):
        one_row(scorer, case)
    with scorer:
        one_row(scorer, case)
    with pytest.raises(RuntimeError, match="not attached"):
        one_row(scorer, case)
    assert scorer.scores().num_rows == 1


def test_a_scorer_entered_twice() -> None:
    case = models.residual_cnn()
    snapshot = Snapshot(unusual(case.model).eval())
    scorer = obc.JacobianScorer(case.model)
    with scorer:
        with pytest.raises(RuntimeError, match=r"attached already.*leave"):
            scorer.__enter__()
        score_rest(scorer, case)
    snapshot.assert_restored()
    assert_parity(scorer.scores(), expected_scores(case))


def score_rest(scorer: obc.JacobianScorer, case: models.Case) -> None:
    for batch in case.batches:
        with scorer.row():
            case.loss(case.model, batch).backward()


def test_a_second_scorer_on_the_same_model() -> None:
    case = models.residual_cnn()
    snapshot = Snapshot(case.model)
    first, second = obc.JacobianScorer(case.model), obc.JacobianScorer(case.model)
    with first:
        with pytest.raises(RuntimeError, match=r"another scorer.*ResidualCNN.*leave"):
            second.__enter__()
        score_rest(first, case)
    snapshot.assert_restored()
    assert_parity(first.scores(), expected_scores(case))
    assert_parity(score_in_a_loop(second, case), expected_scores(case))


def test_a_scorer_on_a_part_of_an_attached_model() -> None:
    """Two sets of gates on one layer must not disturb one another, or be refused."""
    case = models.residual_cnn()
    whole, part = obc.JacobianScorer(case.model), obc.JacobianScorer(case.model.conv1)
    with whole:
        with pytest.raises(RuntimeError, match=r"another scorer.*Conv2d"):
            part.__enter__()
        score_rest(whole, case)
    assert_parity(whole.scores(), expected_scores(case))


def test_nested_rows() -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)

    def nested() -> None:
        with scorer.row(), scorer.row():
            pass

    with scorer:
        with pytest.raises(RuntimeError, match="nested"):
            nested()
        score_rest(scorer, case)
    assert_parity(scorer.scores(), expected_scores(case))


@pytest.mark.parametrize("inside", [True, False], ids=["in the row", "between rows"])
@pytest.mark.parametrize("scaled", [True, False], ids=["GradScaler", "plain"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_steps_while_the_scorer_is_attached(
    kind: type[torch.optim.Optimizer], scaled: bool, inside: bool
) -> None:
    """Norms keep their gradients, so a step would train them, and every row would be of another model."""
    case = models.residual_cnn()
    before = copy.deepcopy(case.model.state_dict())
    optimizer, other = kind(case.model.parameters(), lr=0.1), kind(nn.Linear(2, 2).parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)

    def read() -> None:
        with (scorer := obc.JacobianScorer(case.model)):
            with scorer.row(scaler.get_scale()):
                scaler.scale(losses(case.model, case.batches[0]).mean()).backward()
                if inside:
                    scaler.step(optimizer)
            other.step()  # of another model
            scaler.step(optimizer)

    with pytest.raises(obc.scoring.ScoringError, match=rf"^{kind.__name__}\.step\(\) inside .* outside the block"):
        read()
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    optimizer.zero_grad()
    losses(case.model, case.batches[0]).mean().backward()
    optimizer.step()  # after the block
    assert not all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())


def test_a_row_without_a_backward() -> None:
    """Nothing is read: not a row of zeros, which would count."""
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)

    def empty() -> None:
        with scorer.row():
            case.loss(case.model, case.batches[0])

    with scorer:
        with pytest.raises(RuntimeError, match="backward"):
            empty()
        score_rest(scorer, case)
        with pytest.raises(RuntimeError, match="backward"):
            empty()
    assert scorer.scores().num_rows == len(case.batches)
    assert_parity(scorer.scores(), expected_scores(case))


def test_scores_before_any_row() -> None:
    with pytest.raises(RuntimeError, match=r"no row.*scorer\.row"):
        obc.JacobianScorer(models.residual_cnn().model).scores()


def test_a_loss_scale_of_zero() -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)

    def row() -> None:
        with scorer.row(loss_scale=0.0):
            case.loss(case.model, case.batches[0]).backward()

    with scorer, pytest.raises(ValueError, match="loss_scale must not be 0"):
        row()


def replace_module(model: nn.Module) -> None:
    model.conv1 = copy.deepcopy(model.conv1)


def replace_weight(model: nn.Module) -> None:
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach().clone())


def replace_norm_weight(model: nn.Module) -> None:
    model.norm1.weight = nn.Parameter(model.norm1.weight.detach().clone())


def widen(model: nn.Module) -> None:
    model.conv1.weight.data = torch.randn(20, 8, 3, 3)


@pytest.mark.parametrize("change", [replace_module, replace_weight, replace_norm_weight, widen])
def test_a_layer_that_changed_since_the_scorer_was_made(change: Callable[[nn.Module], None]) -> None:
    """Such a layer would go unread, or into scores of another width."""
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    change(case.model)
    snapshot = Snapshot(case.model)
    with pytest.raises(RuntimeError, match=r"'(conv1|norm1)'.*since this scorer was made.*new scorer"):
        scorer.__enter__()
    snapshot.assert_restored()


# --- states --------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    return obc.JacobianScorer(model, **options).state_dict()


@pytest.mark.parametrize(
    "other",
    [
        state_of(models.residual_cnn().model, rows="sample"),
        state_of(models.residual_cnn().model, modules=["conv1"]),
        state_of(models.ResidualCNN(width=6)),
        state_of(nn.Linear(3, 2)),
    ],
    ids=["other-rows", "fewer-modules", "other-widths", "other-model"],
)
def test_a_state_of_another_scorer(other: dict[str, Any]) -> None:
    case = models.residual_cnn()
    scorer = obc.JacobianScorer(case.model)
    expected = copy.deepcopy(scorer.state_dict())
    with pytest.raises(ValueError, match=r"this state.*(model|rows=)"):
        scorer.load_state_dict(other)
    assert str(scorer.state_dict()) == str(expected)
    assert_parity(score_in_a_loop(scorer, case), expected_scores(case))


@pytest.mark.parametrize("state", [{}, {"scores": []}, nn.Linear(3, 2).state_dict()], ids=["empty", "part", "model"])
def test_a_state_that_is_none(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not the state of a scorer.*state_dict\(\)"):
        obc.JacobianScorer(nn.Linear(3, 2)).load_state_dict(state)


def test_a_state_loaded_while_attached() -> None:
    scorer = obc.JacobianScorer(nn.Linear(3, 2))
    state = scorer.state_dict()
    with scorer, pytest.raises(RuntimeError, match="before entering"):
        scorer.load_state_dict(state)


# --- FullyShardedDataParallel --------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_model_in_flat_shards_is_refused_by_name(use_orig_params: bool, part: bool, one_process: None) -> None:
    """Its layers' weights are pieces of one parameter: sample rows, norms and the check would fail without a reason."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    shards = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
    if part:
        model[0] = FullyShardedDataParallel(model[0], **shards)
    wrapped = model if part else FullyShardedDataParallel(model, **shards)
    batches = [torch.randn(5, 4)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    calls: list[Callable[[], Any]] = [
        lambda: obc.score(wrapped, batches, loss),
        lambda: obc.collect(wrapped, batches, loss, statistics=["rows"]),
        lambda: obc.memory_estimate(wrapped, batches[0], loss),
        lambda: obc.JacobianScorer(wrapped),
    ]
    for call in calls:
        with pytest.raises(obc.scoring.errors.ScoringError, match=r"\(FSDP1\).*before it is wrapped.*fully_shard"):
            call()
    whole = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="compensate first, then shard it"):
        obc.compensate(wrapped, whole, obc.PruningPlan({}), batches)


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_model_with_a_scorer_attached_is_not_copied(how: Callable[[Any], Any], rows: Any) -> None:
    """A copy would have hooks that read into the scorer of the original; "cannot pickle 'module' object" came."""
    case = models.residual_cnn()
    snapshot = Snapshot(unusual(case.model))
    with obc.JacobianScorer(case.model, rows=rows) as scorer:
        for one in (case.model, scorer):
            with pytest.raises(obc.scoring.ScoringError, match=r"has hooks of a scorer.*outside of `with scorer:`"):
                how(one)
    snapshot.assert_restored()
    how(models.residual_cnn().model)
