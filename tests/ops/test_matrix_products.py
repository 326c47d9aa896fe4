"""Products by oneDNN are those of torch.mm: in every memory layout, up to rounding, with the same bits on any number of
threads, and never where a derivative or a traced graph is wanted.

oneDNN is called here whatever the processor: on which of them it is faster is no question of right or wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import poison_heap
from tolerances import assert_sum_close
from torch import Tensor

from obc.backends import products

SHAPES = [(128, 64, 128), (64, 288, 192), (33, 1000, 77), (16, 8192, 16), (2304, 32, 16)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": Tensor.contiguous,
    "columns": lambda x: x.mT.contiguous().mT,
    "slice of rows": lambda x: torch.cat([x, x])[len(x) :],
    "slice of columns": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that oneDNN multiplied."""
    operator = torch.ops.mkldnn._linear_pointwise.default
    shapes: list[torch.Size] = []

    def counted(left: Tensor, *arguments: object) -> Tensor:
        shapes.append(left.shape)
        return operator(left, *arguments)

    monkeypatch.setattr(products, "_onednn", lambda: counted)
    return shapes


def operands(shape: tuple[int, int, int], left: str = "rows", right: str = "rows") -> tuple[Tensor, Tensor]:
    rows, terms, columns = shape
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(rows, terms, generator=generator), torch.randn(terms, columns, generator=generator)
    return LAYOUTS[left](factors[0])[None], LAYOUTS[right](factors[1])[None]


@pytest.mark.sampled
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
@torch.no_grad()
def test_every_layout_gives_the_product(left: str, right: str, calls: list[torch.Size]) -> None:
    for shape in SHAPES:
        a, b = operands(shape, left, right)
        truth, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        summand = torch.randn(2, *truth.shape)[1]
        target = torch.full((1, truth.shape[1], truth.shape[2] + 3), torch.nan)
        poison_heap()
        products.mm_into(target[..., 3:], a, b)
        for found, expected in (
            (products.mm(a, b), truth),
            (target[..., 3:], truth),
            (products.mm_added(summand, a, b), truth + summand.double()),
        ):
            assert_sum_close(found, expected, magnitude + summand.double().abs(), shape[1] + 1, torch.float32)
        assert target[..., :3].isnan().all()
    assert len(calls) == 3 * len(SHAPES)


@pytest.mark.skipif(not products.splits_alike(), reason="with this torch oneDNN is not used")
@torch.no_grad()
def test_threads_do_not_change_the_bits(threads: None, calls: list[torch.Size]) -> None:
    """Up to the longest sums that oneDNN gets: it splits those of 2^15 terms among the threads."""
    for shape in [*SHAPES, (64, products.MOST_TERMS, 64), (512, products.MOST_TERMS, 16)]:
        a, b = operands(shape)
        torch.set_num_threads(1)
        expected = products.mm(a, b)
        for count in (2, 3, 16):
            torch.set_num_threads(count)
            assert torch.equal(products.mm(a, b), expected), (shape, count)
    assert len(calls) == 4 * (len(SHAPES) + 2)


@pytest.mark.parametrize(
    "shape",
    [(64, 64, 64), (15, 512, 512), (512, 15, 512), (512, 512, 15), (64, products.MOST_TERMS + 1, 64)],
    ids=["small", "few-rows", "few-terms", "few-columns", "long-sums"],
)
@torch.no_grad()
def test_torch_multiplies_what_is_small_narrow_or_long(shape: tuple[int, int, int], calls: list[torch.Size]) -> None:
    a, b = operands(shape)
    assert torch.equal(products.mm(a, b)[0], a[0] @ b[0])
    assert not calls


def test_torch_multiplies_where_more_is_wanted_than_values(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = operands((128, 64, 128))
    a.requires_grad_()
    grad = torch.autograd.grad(products.mm(a, b).sum(), a)[0]
    torch.testing.assert_close(grad, b.sum(2, keepdim=True).mT.expand_as(a))
    with torch.no_grad():
        compiled = torch.compile(products.mm, backend="eager", fullgraph=True)
        assert torch.equal(compiled(a, b)[0], a[0] @ b[0])
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(products.mm(a, b)[0], a[0] @ b[0])
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
        products.mm(a.double(), b.double())
        assert not calls
        products.mm(a, b)
    assert len(calls) == 1
