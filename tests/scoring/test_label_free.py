"""label_free_loss: rows of v . z with the model's output z, reproducible, however the batches are split."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from parity import TOLERANCE, assert_equal, errors
from test_kept_rows import assert_rows_equal
from torch import Tensor, nn

import obc
from obc.model.autocast import in_present_autocast
from obc.scoring import InplaceError, label_free_loss


class Outputs(nn.Module):
    """Returns its input through a linear layer, in the form ``wrap``."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(4, 5), wrap

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return self.wrap(self.fc(input_ids))


class Record:
    """A transformers output has its tensors as attributes."""

    def __init__(self, **tensors: Tensor) -> None:
        vars(self).update(tensors)


def projection(loss: Any, output: Tensor, wrap: Callable[[Tensor], Any] = lambda z: z, batch: Any = None) -> Tensor:
    """v, read from the gradient of the loss by the output."""
    z = output.clone().requires_grad_()
    (v,) = torch.autograd.grad(
        loss.__class__(lambda m, b: wrap(z), "sample", loss.seed, loss.centre, loss.metric)(None, batch).sum(), z
    )
    return v


def test_the_loss_is_v_times_z_with_v_standard_normal() -> None:
    v = projection(label_free_loss(centre=False), torch.zeros(50, 400))
    # 20,000 draws: mean and variance are within five standard errors, 5 / sqrt(n) and 5 sqrt(2 / n).
    assert abs(float(v.mean())) < 5 / 20000**0.5
    assert abs(float(v.var()) - 1) < 5 * (2 / 20000) ** 0.5
    # Samples are independent: a correlation of 400 pairs has the standard error 1 / 20.
    correlation = torch.corrcoef(v) - torch.eye(50)
    assert float(correlation.abs().max()) < 6 / 20


@pytest.mark.parametrize(("shape", "classes"), [((6, 7), 1), ((6, 3, 7), 2), ((6, 7, 4, 4), 1)], ids=str)
def test_v_is_centred_over_the_classes(shape: tuple[int, ...], classes: int) -> None:
    v = projection(label_free_loss(), torch.zeros(shape))
    raw = projection(label_free_loss(centre=False), torch.zeros(shape))
    assert torch.allclose(v.mean(classes), torch.zeros(()), atol=1e-6)
    assert torch.equal(v, raw - raw.mean(classes, keepdim=True))


@pytest.mark.parametrize(("shape", "classes"), [((6, 7), 1), ((6, 3, 7), 2), ((6, 7, 4, 4), 1)], ids=str)
def test_v_of_the_kl_metric_has_the_covariance_of_the_scores(shape: tuple[int, ...], classes: int) -> None:
    """E[v v^T] = E_y[s s^T] with s = d log p(y)/dz, exact for the map from raw draws to v."""
    z = 2 * torch.randn(shape, dtype=torch.float64)
    raw = projection(label_free_loss(centre=False), z)
    v = projection(label_free_loss(metric="kl"), z)
    place = (0, *(0 for _ in shape[2:])) if classes == 1 else (0, 0)
    last = lambda tensor: tensor.movedim(classes, -1)[place]  # noqa: E731

    def log_probabilities(logits: Tensor) -> Tensor:
        return logits - logits.exp().sum().log()

    scores = torch.autograd.functional.jacobian(log_probabilities, last(z))  # (y, class)
    probabilities = log_probabilities(last(z)).exp()
    root = probabilities.sqrt()[:, None] * scores  # the sum over y of its rows' outer products is the covariance
    assert torch.allclose(last(v), root.T @ last(raw), atol=1e-12)
    assert torch.allclose(root.T @ root, torch.diag(probabilities) - probabilities.outer(probabilities), atol=1e-12)


@pytest.mark.slow
def test_rows_of_the_kl_metric_are_twice_the_divergence_of_what_a_channel_does() -> None:
    """The mean of r^2 over projections is 2 KL / h^2, when a channel's weights shrink by the small share h."""
    torch.manual_seed(0)
    model, x, share, projections = nn.Linear(4, 5).double(), torch.randn(1, 4).double(), 1e-4, 4000
    rows = obc.score(model, [x] * projections, label_free_loss(metric="kl"), keep_rows=True).rows[""].in_channels
    squares = rows.double().square()
    before = model(x).detach().log_softmax(-1)
    for channel in range(4):
        with torch.no_grad():
            weight = model.weight.clone()
            weight[:, channel] *= 1 - share
            after = torch.nn.functional.linear(x, weight, model.bias).log_softmax(-1)
        wanted = 2 * float((before.exp() * (before - after)).sum()) / share**2
        error = float(squares[:, channel].std()) / projections**0.5
        # h shifts KL / h^2 by about h, far less than the standard error.
        assert abs(float(squares[:, channel].mean()) - wanted) < 4 * error < 0.2 * wanted


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_rows_of_the_kl_metric_do_not_count_classes_whose_logit_is_minus_infinity(
    rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of a model that lacks these classes, for the same draws."""
    torch.manual_seed(0)
    x, draws, kept = torch.randn(3, 4).double(), torch.randn(3, 7).double(), [0, 2, 3, 5, 6]
    whole, fewer = nn.Linear(4, 7).double(), nn.Linear(4, 5).double()
    fewer.load_state_dict({key: tensor[kept] for key, tensor in whole.state_dict().items()})
    lacking = torch.tensor([1, 4])
    masked = label_free_loss(lambda model, x: model(x).index_fill(1, lacking, -torch.inf), metric="kl", rows=rows)
    monkeypatch.setattr(masked, "_draw", lambda like, sample: draws[sample])
    without = label_free_loss(metric="kl", rows=rows)
    monkeypatch.setattr(without, "_draw", lambda like, sample: draws[sample, kept])
    got, wanted = (
        obc.score(model, [x], loss, keep_rows=True, rows=rows).rows[""]
        for model, loss in ((whole, masked), (fewer, without))
    )
    torch.testing.assert_close(got.in_channels, wanted.in_channels)
    torch.testing.assert_close(got.out_channels[:, kept], wanted.out_channels)
    assert not got.out_channels[:, lacking].any()
    assert bool((wanted.in_channels != 0).all())


@pytest.mark.parametrize("output", [torch.zeros(6, 1), torch.zeros(6), {"last_hidden_state": torch.zeros(6, 5)}])
def test_the_kl_metric_needs_classes(output: Any) -> None:
    with pytest.raises(ValueError, match=r"metric='kl' needs logits of two classes or more, got .* of shape"):
        label_free_loss(lambda model, batch: output, metric="kl")(nn.Linear(3, 2), None)


def test_metrics_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="metric must be 'euclidean' or 'kl', got 'KL'; did you mean 'kl'"):
        label_free_loss(metric="KL")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave out centre"):
        label_free_loss(metric="kl", centre=False)


def test_autocast_around_a_run_keeps_each_rows_projections() -> None:
    model, batch, loss = nn.Linear(4, 5), torch.randn(6, 4), label_free_loss()
    with torch.autocast("cpu", torch.bfloat16):
        wrapped = in_present_autocast(loss)
        assert wrapped is not loss
        found = []
        for function in (loss, wrapped):
            function.seek(3, 1)
            found.append(function(model, batch))
    assert torch.equal(*found)
    assert wrapped.identity == loss.identity  # type: ignore[attr-defined]


def test_a_shift_of_all_logits_does_not_count() -> None:
    """The bias of a classifier's last layer shifts the logits of one class; that of a common shift has no row."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.shift = nn.Linear(4, 5), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.shift(x)

    batches = [torch.randn(6, 4) for _ in range(3)]
    scores = obc.score(Shifted(), batches, label_free_loss())
    # v sums to zero up to the rounding of five terms.
    assert float(scores["shift"].in_channels.max()) < 1e-10 * float(scores["head"].in_channels.max())


@pytest.mark.parametrize(
    ("wrap", "centred"),
    [
        (lambda z: z, True),
        (lambda z: (z, z.exp()), True),
        (lambda z: {"hidden": z.detach().long(), "other": z}, True),
        (lambda z: {"last_hidden_state": z}, False),
        (lambda z: Record(loss=z.sum(), last_hidden_state=z.exp(), logits=z), True),
        (lambda z: Record(last_hidden_state=z, pooler_output=z.exp()), False),
    ],
    ids=["tensor", "tuple", "mapping", "hidden-mapping", "logits", "hidden"],
)
def test_outputs_of_every_form(wrap: Callable[[Tensor], Any], centred: bool) -> None:
    z = torch.randn(6, 5)
    assert torch.equal(
        projection(label_free_loss(), z, wrap), projection(label_free_loss(centre=centred), z, lambda z: z)
    )


@pytest.mark.parametrize("output", [torch.zeros(()), torch.zeros(0, 3), torch.zeros(3).long(), "text"], ids=str)
def test_outputs_that_cannot_be_projected(output: Any) -> None:
    with pytest.raises(ValueError, match=r"samples along dim 0|expected a floating tensor"):
        label_free_loss(lambda model, batch: output)(nn.Linear(3, 2), None)


def test_a_loss_in_place_of_outputs_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="return the model's outputs, not a loss"):
        obc.score(nn.Linear(3, 2), [torch.randn(4, 3)], lambda model, x: model(x).mean(), labels=False)


def test_one_output_is_not_centred_away() -> None:
    assert float(projection(label_free_loss(), torch.zeros(6, 1)).abs().min()) > 0
    assert float(projection(label_free_loss(), torch.zeros(6)).abs().min()) > 0


@pytest.mark.parametrize("labelled", [False, True], ids=["inputs", "(inputs, labels)"])
@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("added", [False, True])
def test_padding_does_not_count(kind: Any, labelled: bool, added: bool) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    given = (1 - mask) * -1e9 if added else mask
    inputs = kind({"input_ids": torch.randn(2, 3, 4), "attention_mask": given})
    batch = (inputs, "labels") if labelled else inputs
    model = Outputs(lambda z: Record(last_hidden_state=z))
    loss = label_free_loss()
    before = loss(model, batch)
    inputs["input_ids"] = inputs["input_ids"] + 9 * (1 - mask).unsqueeze(-1)
    loss.seek(0)
    assert torch.equal(loss(model, batch), before)


@pytest.mark.parametrize(
    "batch", [torch.ones(6, 4), (torch.ones(6, 4), "labels"), {"input_ids": torch.ones(6, 4)}], ids=type
)
def test_the_default_forward(batch: Any) -> None:
    losses = label_free_loss(rows="sample")(Outputs(lambda z: z), batch)
    assert losses.shape == (6,)


# --- reproducible --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_scores_are_reproducible_and_leave_the_generator_alone(rows: str) -> None:
    case = models.residual_cnn()
    before = torch.get_rng_state()
    first = obc.score(case.model, case.batches, label_free_loss(rows=rows, seed=4), rows=rows, keep_rows=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second = obc.score(case.model, case.batches, label_free_loss(rows=rows, seed=4), rows=rows, keep_rows=True)
    assert_rows_equal(first, second)
    other = obc.score(case.model, case.batches, label_free_loss(rows=rows, seed=5), rows=rows)
    assert not torch.equal(first["conv1"].out_channels, other["conv1"].out_channels)


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_score_without_labels(rows: str) -> None:
    case = models.residual_cnn()
    expected = obc.score(case.model, case.batches, label_free_loss(rows=rows, seed=4), rows=rows)
    assert_equal(obc.score(case.model, case.batches, labels=False, rows=rows, seed=4), expected)
    forward = obc.score(case.model, case.batches, lambda model, batch: model(batch[0]), labels=False, rows=rows, seed=4)
    assert_equal(forward, expected)
    with pytest.raises(ValueError, match="loss_fn is missing; pass one, or labels=False"):
        obc.score(case.model, case.batches, rows=rows)


def test_rows_draw_afresh() -> None:
    case = models.residual_cnn()
    rows = obc.score(case.model, case.batches[:1] * 3, label_free_loss(), keep_rows=True).rows["conv1"].out_channels
    assert not torch.allclose(rows[0], rows[1])
    assert not torch.allclose(rows[1], rows[2])


def test_the_same_loss_scores_twice_the_same() -> None:
    case, loss = models.residual_cnn(), label_free_loss()
    assert_equal(obc.score(case.model, case.batches, loss), obc.score(case.model, case.batches, loss))


def test_a_batch_row_is_the_mean_of_its_sample_rows() -> None:
    case = models.residual_cnn()
    batch = obc.score(case.model, case.batches, label_free_loss(rows="batch"), keep_rows=True)
    sample = obc.score(case.model, case.batches, label_free_loss(rows="sample"), rows="sample", keep_rows=True)
    for name in batch:
        means = sample.rows[name].out_channels.unflatten(0, (3, -1)).mean(1)
        largest = means.abs().max()
        assert float((batch.rows[name].out_channels - means).abs().max()) <= TOLERANCE * float(largest), name


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_split_batch_draws_the_same(rows: str, micro_batch: int) -> None:
    case = models.residual_cnn()
    whole = obc.score(case.model, case.batches, label_free_loss(rows=rows), rows=rows)
    split = obc.score(case.model, case.batches, label_free_loss(rows=rows), rows=rows, micro_batch=micro_batch)
    expected = {name: (channels.out_channels, channels.in_channels) for name, channels in whole.items()}
    assert max(errors(split, expected).values()) <= 1e-5


def test_a_repeated_row_draws_the_same() -> None:
    case, fails = models.residual_cnn(), iter([False, False, True, False, False])

    class Failing:
        loss = label_free_loss()
        seek = loss.seek

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            value = self.loss(model, batch)
            if next(fails):
                raise InplaceError("row 1 was dropped")
            return value

    assert_equal(obc.score(case.model, case.batches, Failing()), obc.score(case.model, case.batches, label_free_loss()))


def test_half_precision_outputs_are_projected_in_float32() -> None:
    v = projection(label_free_loss(), torch.zeros(6, 9, dtype=torch.bfloat16))
    assert v.dtype == torch.bfloat16  # what autograd casts the gradient to
    losses = label_free_loss(lambda m, b: torch.ones(6, 9, dtype=torch.bfloat16), rows="sample")(nn.Linear(1, 1), None)
    assert losses.dtype == torch.float32


def test_rows_of_another_kind() -> None:
    with pytest.raises(ValueError, match="rows must be 'batch' or 'sample', got 'batches'"):
        label_free_loss(rows="batches")  # type: ignore[arg-type]
    case = models.residual_cnn()
    with pytest.raises(ValueError, match=r"needs the vector \(B,\)"):
        obc.score(case.model, case.batches, label_free_loss(rows="batch"), rows="sample")
