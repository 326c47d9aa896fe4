"""The benchmark of many statistics: every provider of a case computes what its check expects."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from benchmarks.bench_statistics import TOGETHER, one_run


def test_every_way_gives_the_same_gram_matrices() -> None:
    case = one_run("ViT-S", batches=1)
    for provider in case.providers:
        result = provider.call()
        if provider.name not in case.unchecked:
            case.check(result)
    together = next(provider.call() for provider in case.providers if provider.name == TOGETHER)
    assert set(together.collected) == {"rows", "gram", "moments", "blocks"}
    together.gram["classifier"].total.mul_(1.01)
    with pytest.raises(AssertionError, match="relative error"):
        case.check(together)
