"""Settings of the whole process are the caller's again after the last of several calls, whichever ends first."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import class_loss
from torch import nn
from torch.utils import checkpoint
from torch_pruning.dependency import index_mapping

import obc
from obc.model.settings import Setting, every_submodule, float32_products
from obc.structures import traced_graph

SETTINGS: dict[str, tuple[Setting, Callable[[], Any]]] = {
    "fast path": (every_submodule, torch.backends.mha.get_fastpath_enabled),
    "precision": (float32_products, torch.get_float32_matmul_precision),
    "checkpoints": (traced_graph._CHECKPOINTS, lambda: checkpoint.CheckpointFunction),
    "concatenations": (traced_graph._MAPPING, lambda: index_mapping.update_concat_index_mapping),
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_last_of_two_blocks_restores_the_callers(name: str, first: int) -> None:
    setting, read = SETTINGS[name]
    torch.set_float32_matmul_precision("medium")
    try:
        before = read()
        blocks = [contextlib.ExitStack(), contextlib.ExitStack()]
        for block in blocks:
            block.enter_context(setting.changed())
        inside = read()
        blocks[first].close()
        assert read() == inside != before
        blocks[1 - first].close()
        assert read() == before
        with pytest.raises(KeyError), setting.changed():
            raise KeyError
        assert read() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 5)).eval()


BATCHES = [(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(n)), torch.arange(2)) for n in range(4)]


@pytest.mark.parametrize("call", ["score", "collect", "scorers"])
def test_calls_that_overlap_read_all_and_restore_the_fast_path(call: str) -> None:
    """The second call begins inside the first, which ends while the second still runs."""
    begun, ended = threading.Event(), threading.Event()
    seen: list[bool] = []

    def run(model: nn.Module, loss: Any) -> Any:
        if call == "collect":
            found = obc.collect(model, BATCHES, loss, statistics="gram", progress=False)
            return found.gram["0.linear2"].total
        return obc.score(model, BATCHES, loss, progress=False)["0.linear1"].out_channels

    def slow(model: nn.Module, batch: Any) -> Any:
        begun.set()
        assert ended.wait(60)
        seen.append(torch.backends.mha.get_fastpath_enabled())
        return class_loss(model, batch)

    expected = run(_encoder(), class_loss)
    assert torch.backends.mha.get_fastpath_enabled()
    if call == "scorers":
        one, other = obc.JacobianScorer(_encoder()), obc.JacobianScorer(_encoder())
        with contextlib.ExitStack() as second:
            with one:
                second.enter_context(other)
            assert not torch.backends.mha.get_fastpath_enabled()
            with other.row():
                class_loss(other.model, BATCHES[0]).backward()
    else:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(run(_encoder(), slow)))

        def starting(model: nn.Module, batch: Any) -> Any:
            if not begun.is_set():
                thread.start()
                assert begun.wait(60)
            return class_loss(model, batch)

        assert torch.equal(run(_encoder(), starting), expected)
        ended.set()
        thread.join(60)
        assert torch.equal(results[0], expected)
        assert seen
        assert not any(seen)
    assert torch.backends.mha.get_fastpath_enabled()
