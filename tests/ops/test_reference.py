"""obc.reference against explicit float64 autograd and einsum, so that two wrong copies can't agree."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from tolerances import assert_sum_close
from torch import Tensor, nn

from obc import reference

# name, module, input shape, channel dim of input and output
LAYERS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
    ("linear-2d", lambda: nn.Linear(5, 7), (3, 5), -1),
    ("linear-3d", lambda: nn.Linear(5, 7), (3, 4, 5), -1),
    ("linear-4d-no-bias", lambda: nn.Linear(5, 7, bias=False), (3, 2, 4, 5), -1),
    ("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9), 1),
    ("conv2d-stride-dilation", lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2), (2, 4, 9, 8), 1),
    ("conv2d-reflect", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 6), 1),
    ("conv2d-replicate", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 5, 6), 1),
    ("conv2d-circular", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6), 1),
    ("conv2d-groups", lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 5, 5), 1),
    ("conv2d-depthwise", lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5), 1),
    ("conv3d", lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 3, 5), 1),
    ("transposed1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), 1),
    ("transposed2d-groups", lambda: nn.ConvTranspose2d(6, 4, 3, groups=2, output_padding=1, stride=2), (2, 6, 4, 4), 1),
    ("transposed3d", lambda: nn.ConvTranspose3d(3, 4, 2, bias=False), (2, 3, 2, 3, 2), 1),
    ("batch-norm-eval", lambda: nn.BatchNorm2d(4).eval(), (3, 4, 5, 5), 1),
    ("layer-norm", lambda: nn.LayerNorm(5), (3, 4, 5), -1),
    ("rms-norm", lambda: nn.RMSNorm(5), (3, 4, 5), -1),
    ("group-norm", lambda: nn.GroupNorm(2, 4), (3, 4, 5), 1),
    ("instance-norm", lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 5), 1),
    ("embedding", lambda: nn.Embedding(11, 5), (3, 4), -1),
]


def _layer(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """A layer in float64 with no parameter at its initial 0 or 1, and an input."""
    module = make().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if isinstance(module, nn.Embedding):
        return module, torch.randint(module.num_embeddings, shape)
    return module, torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _backward(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A non-linear loss's gradients: (by the output, {weight, bias, x})."""
    y = module(x)
    weighting = torch.randn_like(y)
    wanted = dict(module.named_parameters()) | ({"x": x} if x.requires_grad else {})
    grad_y, *grads = torch.autograd.grad((y.sin() * weighting).sum(), [y, *wanted.values()])
    return grad_y, dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize(("make", "shape", "dim"), [layer[1:] for layer in LAYERS], ids=[layer[0] for layer in LAYERS])
def test_rows_match_autograd(make: Callable[[], nn.Module], shape: tuple[int, ...], dim: int) -> None:
    """The identity of the method: sums of activation x gradient, and of weight x gradient, are the oracle's rows."""
    module, x = _layer(make, shape)
    grad_y, grads = _backward(module, x)
    out, in_ = oracle.row(module, grads["weight"], grads.get("bias"))
    torch.testing.assert_close(reference.channel_dot(module(x).detach(), grad_y, dim), out)
    if in_ is None:
        return
    torch.testing.assert_close(reference.channel_dot(x.detach(), grads["x"], dim), in_)
    bias = None if module.bias is None else module.bias.detach()
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    dots = reference.weight_dot(
        module.weight.detach(), grads["weight"], bias, grads.get("bias"), getattr(module, "groups", 1), transposed
    )
    torch.testing.assert_close(dots[0], out)
    torch.testing.assert_close(dots[1], in_)


@pytest.mark.parametrize("dim", [1, -1])
def test_per_sample_rows_match_a_loop_over_samples(dim: int) -> None:
    activation, grad = torch.randn(2, 5, 4, 3, 6, dtype=torch.float64)
    looped = [reference.channel_dot(a, g, dim - 1 if dim > 0 else dim) for a, g in zip(activation, grad, strict=True)]
    torch.testing.assert_close(reference.channel_dot(activation, grad, dim, per_sample=True), torch.stack(looped))


def test_channel_dot_of_vectors_is_their_product() -> None:
    a, g = torch.randn(2, 7)
    assert torch.equal(reference.channel_dot(a, g, 0), a * g)


def test_weight_dot_list_is_weight_dot_of_each() -> None:
    weights = [torch.randn(4, 3), torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3)]
    grads = [torch.randn_like(w) for w in weights]
    biases, bias_grads = [torch.randn(4), None, torch.randn(4)], [torch.randn(4), None, torch.randn(4)]
    groups, transposed = [1, 3, 2], [False, False, True]
    outs, ins = reference.weight_dot_list(weights, grads, biases, bias_grads, groups, transposed)
    for n, layer in enumerate(zip(weights, grads, biases, bias_grads, groups, transposed, strict=True)):
        expected = reference.weight_dot(*layer)
        assert torch.equal(outs[n], expected[0])
        assert torch.equal(ins[n], expected[1])
    outs, ins = reference.weight_dot_list(weights, grads)
    for n, layer in enumerate(zip(weights, grads, strict=True)):
        assert torch.equal(outs[n], reference.weight_dot(*layer)[0])
        assert torch.equal(ins[n], reference.weight_dot(*layer)[1])


def test_weight_dot_list_of_lists_of_other_lengths_is_an_error() -> None:
    weight = torch.randn(4, 3)
    with pytest.raises(ValueError, match="shorter"):
        reference.weight_dot_list([weight, weight], [weight])


def test_weight_moments_match_explicit_sums() -> None:
    weight, grad = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    moments = reference.weight_moments(weight, grad)
    for o in range(4):
        pairs = list(zip(weight[o].flatten().tolist(), grad[o].flatten().tolist(), strict=True))
        explicit = [
            sum(w * g for w, g in pairs),
            sum((w * g) ** 2 for w, g in pairs),
            sum(abs(w * g) for w, g in pairs),
            sum(w**2 for w, _ in pairs),
            sum(abs(w) for w, _ in pairs),
        ]
        torch.testing.assert_close(torch.stack([m[o] for m in moments]), torch.tensor(explicit, dtype=torch.float64))


def _double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_fold_matches_einsum() -> None:
    weight, c, d = _double(6, 5, 3, 2), _double(4, 6), _double(5, 3)
    torch.testing.assert_close(reference.fold(weight, c, d), torch.einsum("ko,oihw,ij->kjhw", c, weight, d))
    torch.testing.assert_close(reference.fold(weight, c), torch.einsum("ko,oihw->kihw", c, weight))
    torch.testing.assert_close(reference.fold(weight, None, d), torch.einsum("oihw,ij->ojhw", weight, d))
    assert torch.equal(reference.fold(weight), weight)


def test_fold_of_diagonal_blocks_is_the_block_diagonal_fold() -> None:
    weight, c, d = _double(6, 4, 3), _double(2, 2, 3), _double(2, 2, 1)
    dense = reference.fold(weight, torch.block_diag(*c), torch.block_diag(*d))
    torch.testing.assert_close(reference.fold(weight, c, d), dense)


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "matrices"])
def test_fold_of_a_grouped_conv_commutes_with_the_conv(blocks: bool) -> None:
    """conv with C W D, applied to x', is C times conv with W applied to D x'."""
    groups, x = 3, _double(2, 6, 5, 5)  # x' has kept_in = 6 channels
    weight, c, d = _double(12, 5, 3, 3), _double(3, 2, 4), _double(3, 5, 2)
    dense_c, dense_d = torch.block_diag(*c), torch.block_diag(*d)
    folded = reference.fold(weight, *((c, d) if blocks else (dense_c, dense_d)), groups=groups)
    wide_x = torch.einsum("ij,njhw->nihw", dense_d, x)
    expected = torch.einsum("ko,nohw->nkhw", dense_c, nn.functional.conv2d(wide_x, weight, groups=groups))
    torch.testing.assert_close(nn.functional.conv2d(x, folded, groups=groups), expected)


def test_fold_reads_only_the_diagonal_blocks_of_a_matrix() -> None:
    weight, c = _double(4, 3), _double(2, 4)
    block_diagonal = torch.block_diag(c[:1, :2], c[1:, 2:])
    assert torch.equal(reference.fold(weight, c, groups=2), reference.fold(weight, block_diagonal, groups=2))


def test_fold_with_in_repeat_commutes_with_flatten() -> None:
    x, weight, c, d = _double(2, 3, 4), _double(7, 5 * 4), _double(6, 7), _double(5, 3)
    folded = reference.fold(weight, c, d, in_repeat=4)
    wide_x = torch.einsum("ij,njs->nis", d, x).flatten(1)
    torch.testing.assert_close(x.flatten(1) @ folded.T, wide_x @ weight.T @ c.T)


def test_end_row_adds_the_squares_of_every_group() -> None:
    scores, row, groups = _double(4), _double(6), torch.tensor([0, 0, 2, 2, 2, 3])
    expected = scores.clone()
    for channel, group in enumerate(groups.tolist()):
        expected[group] += (row[channel] / 8.0) ** 2
    assert reference.end_row(scores, row, 8.0, groups).item() is True
    torch.testing.assert_close(scores, expected)
    assert not row.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e300], ids=["nan", "inf", "square overflows"])
def test_end_row_leaves_out_a_row_that_is_not_finite(bad: float) -> None:
    scores, row = _double(4), _double(4)
    before = scores.clone()
    row[2] = bad
    assert reference.end_row(scores, row).item() is False
    assert torch.equal(scores, before)
    assert not row.any()


def test_the_tolerance_notices_one_missing_term() -> None:
    """The comparison itself: it accepts the rounding of float32 and refuses a sum that lacks one of its terms."""
    terms = 10_000
    products = torch.randn(terms, dtype=torch.float64) + 3
    truth, magnitude = products.sum()[None], products.abs().sum()[None]
    assert_sum_close(products.float().sum()[None], truth, magnitude, terms, torch.float32)
    for wrong in (products[1:].float().sum()[None], torch.tensor([torch.nan])):
        with pytest.raises(AssertionError, match="1 of 1 elements are off"):
            assert_sum_close(wrong, truth, magnitude, terms, torch.float32)
