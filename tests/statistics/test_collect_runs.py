"""Runs of obc.collect: stopped, resumed, saved, over processes; and bad input."""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import started
import torch
import transformers_families as families
from collected import ALL, FORWARD, assert_same, forward
from torch import Tensor, nn
from torch import distributed as dist

import obc
from obc.statistics import Blocks, Gram, StatisticsError, memory, sums
from obc.statistics.run import collect


class KilledError(Exception):
    pass


@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_stopped_run_resumes_to_the_same_bits(place: int, tmp_path: Path) -> None:
    case = models.llama()
    batches = case.batches * 2

    def until(count: int) -> Iterator[Any]:
        yield from itertools.islice(batches, count)
        raise KilledError

    def run(batches: Any, **options: Any) -> obc.Statistics:
        return collect(case.model, batches, case.loss, statistics=ALL, **options)

    path = tmp_path / "state"
    with pytest.raises(KilledError):
        run(until(place), checkpoint=path, every=2)
    assert path.exists() == (place > 1)
    resumed, whole = run(iter(batches), checkpoint=path, every=2), run(iter(batches))
    assert not path.exists()
    assert resumed.num_batches == whole.num_batches == 6
    for one in ALL[1:]:
        assert_same(resumed, whole, one)
    for module in whole.rows:
        for a, b in zip(vars(whole.rows[module]).values(), vars(resumed.rows[module]).values(), strict=True):
            assert a is b is None or torch.equal(a, b)
    assert resumed.coverage == whole.coverage


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    case, path = models.llama(), tmp_path / "state"

    def stopped() -> Iterator[Any]:
        yield from case.batches
        raise KilledError

    with pytest.raises(KilledError):
        collect(case.model, stopped(), statistics="moments", checkpoint=path, every=1)
    with pytest.raises(obc.scoring.CheckpointError, match="to another run"):
        collect(case.model, iter(case.batches), statistics=["gram"], checkpoint=path)
    other = models.seeded(lambda: copy.deepcopy(case.model), seed=5)
    with pytest.raises(obc.scoring.CheckpointError, match="other weights"):
        collect(other, iter(case.batches), statistics="moments", checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(obc.scoring.CheckpointError, match="damaged"):
        collect(case.model, iter(case.batches), statistics="moments", checkpoint=path)


def test_files_give_back_what_was_saved(tmp_path: Path) -> None:
    case = families.FAMILIES["mixtral"]()
    got = collect(case.model, case.batches, case.loss, statistics=[*ALL, "experts"])
    got.save(tmp_path / "file")
    back = obc.Statistics.load(tmp_path / "file")
    assert back.collected == got.collected
    for one in (*ALL[1:], "experts"):
        assert_same(back, got, one)
    assert torch.equal(back.rows["lm_head"].in_channels, got.rows["lm_head"].in_channels)
    assert (back.coverage, back.num_batches, back.report) == (got.coverage, got.num_batches, got.report)
    (tmp_path / "bad").write_bytes((tmp_path / "file").read_bytes()[:-8])
    obc.score(case.model, case.batches[:1], case.loss).save(tmp_path / "scores")
    for name in ("bad", "scores"):
        with pytest.raises(StatisticsError, match="not a file of statistics"):
            obc.Statistics.load(tmp_path / name)


def _process(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    case = families.FAMILIES["mixtral"]()
    mine = case.batches[rank::2]
    got = collect(case.model, mine, case.loss, statistics=[*ALL, "experts"], process_group=dist.group.WORLD)
    got.save(Path(folder) / f"{rank}")
    forward_only = [one for one in FORWARD if one != "experts"]
    by_block = collect(
        case.model, mine, statistics=forward_only, process_group=dist.group.WORLD, by_block=True, progress=False
    )
    by_block.save(Path(folder) / f"{rank}-by-block")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    started.processes(_process, (str(tmp_path),), 2)
    case = families.FAMILIES["mixtral"]()
    order = case.batches[::2] + case.batches[1::2]
    whole = collect(case.model, order, case.loss, statistics=[*ALL, "experts"])
    for rank in range(2):
        got = obc.Statistics.load(tmp_path / f"{rank}")
        by_block = obc.Statistics.load(tmp_path / f"{rank}-by-block")
        assert got.num_batches == by_block.num_batches == 3
        for one in by_block.collected:
            assert_same(by_block, whole, one, exact=False)
        for one in (*ALL[1:], "experts"):
            assert_same(got, whole, one, exact=False)
        for module in whole.rows:
            for a, b in zip(vars(whole.rows[module]).values(), vars(got.rows[module]).values(), strict=True):
                assert a is b is None or torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_groups_limit_what_is_read_to_their_consumers() -> None:
    case = models.llama()
    groups = obc.transformer_groups(case.model, ["ffn"])
    got = collect(case.model, case.batches, case.loss, statistics=["moments", "rows"], groups=groups)
    consumers = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert set(got.moments) == set(got.rows) == consumers
    whole = collect(case.model, case.batches, case.loss, statistics="moments")
    for name in consumers:
        assert torch.equal(got.moments[name].sum, whole.moments[name].sum)
    with pytest.raises(KeyError, match="not among the modules"):
        got.moments["lm_head"]


def test_a_batch_that_is_not_finite_is_left_out_and_named() -> None:
    case = models.residual_cnn()
    bad = (case.batches[0][0].clone(), case.batches[0][1])
    bad[0][1, 0, 0, 0] = float("nan")
    batches = [case.batches[0], bad, case.batches[1]]
    for statistics in (["moments", "gram"], ["moments", "gram", "gradient_moments", "rows"]):
        with pytest.warns(UserWarning, match="batch 1: moments of .* not finite"):
            got = collect(case.model, batches, case.loss, statistics=statistics)
        good = collect(case.model, [batches[0], batches[2]], case.loss, statistics=statistics)
        for one in ("moments", "gram"):
            assert_same(got, good, one)
        assert any("batch 1: gram" in line for line in got.left_out)
    with pytest.raises(StatisticsError, match=r"batch 0: moments of .* is not finite"):
        collect(case.model, [bad], case.loss, statistics="moments")


@pytest.mark.parametrize("backward", [False, True])
def test_a_device_that_is_not_waited_for_leaves_the_same_batches_out(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Non-finite values become zero without being read, as on a GPU, and are named at the end."""
    case = models.residual_cnn()
    bad = (case.batches[0][0].clone().index_fill(0, torch.tensor([1]), float("inf")), case.batches[0][1])
    batches = [case.batches[0], bad, case.batches[1]]
    names = ["moments", "gram", *(["gradient_moments"] if backward else [])]
    loss = case.loss if backward else None

    def run(batches: list[Any]) -> obc.Statistics:
        return collect(case.model, batches, loss, statistics=names, forward_fn=forward)

    with pytest.warns(UserWarning, match="not finite"):
        at_once = run(batches)
    monkeypatch.setattr(sums, "reads_at_once", lambda device: False)
    with pytest.warns(UserWarning, match="not finite"):
        later = run(batches)
    assert later.left_out == at_once.left_out
    for name in names:
        assert_same(later, at_once, name)
    with pytest.raises(StatisticsError, match=r"batch 0: moments of .* is not finite"):
        run([bad])


def run_until_killed(folder: Path) -> None:
    """Collect in a process that kills itself in the middle of the fourth batch."""

    def batches() -> Iterator[Any]:
        for index, batch in enumerate(models.residual_cnn().batches * 2):
            if index == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    case = models.residual_cnn()
    collect(case.model, batches(), case.loss, statistics=["rows", "moments"], checkpoint=folder / "state", every=2)


def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    process = started.context().Process(target=run_until_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    case = models.residual_cnn()
    options: dict[str, Any] = {"statistics": ["rows", "moments"]}
    assert (tmp_path / "state").exists()
    resumed = collect(case.model, iter(case.batches * 2), case.loss, checkpoint=tmp_path / "state", **options)
    whole = collect(case.model, iter(case.batches * 2), case.loss, **options)
    assert_same(resumed, whole, "moments")
    assert torch.equal(resumed.rows["head"].in_channels, whole.rows["head"].in_channels)


def test_modules_that_are_never_called_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.borrowed = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.borrowed.weight[:2])

    with pytest.warns(UserWarning, match=r"no moments of 'borrowed' \(never called"):
        got = collect(Net(), [torch.randn(2, 3)], statistics="moments")
    assert got.coverage["moments"]["borrowed"].startswith("unread")
    with pytest.raises(KeyError, match="never called"):
        got.moments["borrowed"]


def test_a_gram_matrix_too_large_for_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.llama()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
    with pytest.raises(StatisticsError, match=r"take .* KiB on cpu, where 97\.7 KiB are free .*pass groups= for fewer"):
        collect(case.model, case.batches, statistics="gram")
    with pytest.raises(StatisticsError, match=r"KiB on meta, .*Gram\(to='host'\) or by_block=True"):
        collect(copy.deepcopy(case.model).to("meta"), case.batches, statistics="gram")


def test_products_outside_the_blocks_count_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Sequential(*blocks), nn.Linear(32, 2))
    needed = 8 * (3 * 4**2 + 32**2) + 4 * 32**2  # all sums, and the products of the last layer
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(StatisticsError, match="the largest, of '1' with 32 channels"):
        collect(model, [torch.zeros(2, 4)], statistics="gram", by_block=True)


def test_bytes_are_known_before_the_run() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(6, 2, 1, groups=2))
    assert memory.memory_estimate(model, ["rows", "gram", "moments"]) == {
        "gram": 12 * (5 * 5 + 6 * 6),
        "moments": 4 * 12 * (5 + 6),
    }


def test_gram_on_the_host_is_the_same() -> None:
    case = models.llama()
    one, other = (collect(case.model, case.batches, statistics=[Gram(to=to)]) for to in ("host", "device"))
    assert_same(one, other, "gram")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"statistics": "grams"}, "statistics are 'rows', 'moments', 'gram'"),
    "twice": ({"statistics": ["gram", Gram()]}, "asked for twice"),
    "empty": ({"statistics": []}, "statistics is empty"),
    "no loss": ({"statistics": "rows"}, "pass loss_fn"),
    "no loss for gradients": ({"statistics": "gradient_moments"}, "pass loss_fn"),
    "no experts": ({"statistics": "experts"}, "nothing to read 'experts'"),
    "rows": ({"statistics": "gram", "rows": "token"}, "rows must be"),
    "every": ({"statistics": "gram", "every": 0}, "every must be a positive integer, got 0"),
    "span": ({"statistics": [Blocks(span=3)]}, "between 1 and 2"),
    "block": ({"statistics": [Blocks(modules=["x"])]}, "no module 'x'"),
    "object": ({"statistics": [object()]}, "a statistic is a name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused(name: str) -> None:
    case = models.llama()
    options, message = REFUSED[name]
    with pytest.raises(StatisticsError, match=message):
        collect(case.model, case.batches, **options)


def test_no_batches_and_what_was_not_collected() -> None:
    case = models.llama()
    with pytest.raises(StatisticsError, match="batches is empty"):
        collect(case.model, [], statistics="gram")
    got = collect(case.model, case.batches, statistics="moments")
    with pytest.raises(StatisticsError, match=r"'gram' was not collected \(there are moments\)"):
        _ = got.gram
    with pytest.raises(StatisticsError, match="obs needs the statistic 'gram'"):
        got.require(["gram"], "obs")
    with pytest.raises(StatisticsError, match="compiled"):
        collect(torch.compile(case.model), case.batches, statistics="moments")
    with pytest.raises(StatisticsError, match="1 is a ScriptModule"):
        collect(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))), [], statistics="gram")
    with pytest.raises(StatisticsError, match=r"returned shape \(4,\)"):
        collect(case.model, case.batches, case.losses, statistics="gradient_moments")
