"""Scoring a model that lies on several processes gives what one process gives."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate
import pytest
import started
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import obc

WORDS, WIDTH, HIDDEN = 11, 8, 16  # words do not divide evenly by the processes

Batch = Tensor
Group = dist.ProcessGroup | None


class Block(nn.Module):
    """A feed-forward block with a norm before and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))


class Net(nn.Module):
    """A tiny language model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, WORDS, (4, 8), generator=generator) for _ in range(4)]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch).transpose(1, 2), batch, reduction="none").mean(1)


COLUMNS_ROWS = {"up": ColwiseParallel(), "down": RowwiseParallel()}
SEQUENCES = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}


def one_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def two_meshes() -> DeviceMesh:
    """Pairs of processes share layers; the pairs have batches of their own."""
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))


def split_columns_rows(model: Net, mesh: DeviceMesh | None = None) -> nn.Module:
    """Feed-forward layers by columns and rows, the head by columns, everything else whole on every process."""
    mesh = mesh or one_mesh()
    for block in model.blocks:
        parallelize_module(block, mesh, dict(COLUMNS_ROWS))
    return parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})


def split_sequences(model: Net, mesh: DeviceMesh | None = None) -> nn.Module:
    """The words by rows of their table, and norms and residuals by positions."""
    mesh = mesh or one_mesh()
    for block in model.blocks:
        parallelize_module(block, mesh, dict(SEQUENCES))
    whole = {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, whole)


def shard_fully(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def shard_with_replicas(model: Net) -> nn.Module:
    return shard_fully(model, two_meshes())


def split_and_shard(model: Net) -> nn.Module:
    mesh = two_meshes()
    return shard_fully(split_columns_rows(model, mesh["tensor"]), mesh["data"])


def split_sequences_and_shard(model: Net) -> nn.Module:
    mesh = two_meshes()
    return shard_fully(split_sequences(model, mesh["tensor"]), mesh["data"])


def wrap_data_parallel(model: Net) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def prepare_with_accelerate(model: Net) -> nn.Module:
    prepared: nn.Module = accelerate.Accelerator(cpu=True).prepare(model)
    return prepared


def share(items: list[Batch], group: Group) -> list[Batch]:
    """This process's batches."""
    return items[dist.get_rank(group) :: dist.get_world_size(group)]


def batch_rows(model: nn.Module) -> obc.Scores:
    return obc.score(model, batches(), mean_loss, progress=False)


def sample_rows(model: nn.Module) -> obc.Scores:
    return obc.score(model, batches(), sample_losses, rows="sample", progress=False)


def own_rows(model: nn.Module, group: Group = None) -> obc.Scores:
    group = group or dist.group.WORLD
    return obc.score(model, share(batches(), group), mean_loss, process_group=group, combine="scores")


def own_sample_rows(model: nn.Module, group: Group = None) -> obc.Scores:
    group = group or dist.group.WORLD
    mine = share(batches(), group)
    return obc.score(model, mine, sample_losses, rows="sample", process_group=group, combine="scores")


def rows_over_processes(model: nn.Module, group: Group = None) -> obc.Scores:
    group = group or dist.group.WORLD

    def mean_over_processes(model: nn.Module, batch: Batch) -> Tensor:
        parts = dist.get_world_size(group)
        return mean_loss(model, batch.chunk(parts)[dist.get_rank(group)]) / parts

    return obc.score(model, batches(), mean_over_processes, process_group=group)


def rows_of_each(model: nn.Module) -> obc.Scores:
    group = dist.group.WORLD
    mine = share(batches(), group)
    return obc.score(model, mine, mean_loss, process_group=group, combine="scores", keep_rows=True)


def pair_groups(score: Callable[[nn.Module, Group], obc.Scores]) -> Callable[[nn.Module], obc.Scores]:
    """Each pair of processes has batches of its own."""
    return lambda model: score(model, two_meshes().get_group("data"))


@dataclass(frozen=True)
class Scenario:
    """A model spread over processes, how it is scored, and what one process would see."""

    prepare: Callable[[Net], nn.Module]
    score: Callable[[nn.Module], obc.Scores]
    alone: Callable[[nn.Module], obc.Scores]


SCENARIOS = {
    "tensor parallel, batch rows": Scenario(split_columns_rows, batch_rows, batch_rows),
    "tensor parallel, sample rows": Scenario(split_columns_rows, sample_rows, sample_rows),
    "sequence parallel, batch rows": Scenario(split_sequences, batch_rows, batch_rows),
    "sequence parallel, sample rows": Scenario(split_sequences, sample_rows, sample_rows),
    "fully sharded, rows over all processes": Scenario(shard_fully, rows_over_processes, batch_rows),
    "fully sharded, rows of each process": Scenario(shard_fully, own_rows, batch_rows),
    "fully sharded, sample rows of each process": Scenario(shard_fully, own_sample_rows, sample_rows),
    "fully sharded with replicas, rows of each process": Scenario(shard_with_replicas, own_rows, batch_rows),
    "split and sharded, rows over the pairs": Scenario(split_and_shard, pair_groups(rows_over_processes), batch_rows),
    "split and sharded, rows of each pair": Scenario(split_and_shard, pair_groups(own_rows), batch_rows),
    "split and sharded, sample rows of each pair": Scenario(split_and_shard, pair_groups(own_sample_rows), sample_rows),
    "sequences split and sharded, rows of each pair": Scenario(
        split_sequences_and_shard, pair_groups(own_rows), batch_rows
    ),
    "data parallel, rows over all processes": Scenario(wrap_data_parallel, rows_over_processes, batch_rows),
    "data parallel, rows of each process": Scenario(wrap_data_parallel, own_rows, batch_rows),
    "data parallel, sample rows of each process": Scenario(wrap_data_parallel, own_sample_rows, sample_rows),
    "accelerate, rows of each process": Scenario(prepare_with_accelerate, own_rows, batch_rows),
}


# Four processes show what two do, and have two dimensions to share.
@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario's scores, of every process: one start of the processes serves all tests."""
    where = tmp_path_factory.mktemp("scores")
    started.processes(_process, (request.param, str(where)), request.param)
    return where


def _process(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "1"}  # for accelerate
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        for name, scenario in SCENARIOS.items():
            scenario.score(scenario.prepare(net())).save(Path(folder) / f"{name} {rank}")
        _training_is_as_it_was(Path(folder) / f"trained {rank}")
        rows_of_each(net()).save(Path(folder) / f"kept rows {rank}")
        (Path(folder) / f"refused {rank}").write_text(json.dumps(refused()))
        (Path(folder) / f"not scaling {rank}").write_text(json.dumps(not_scaling()))
    finally:
        gc.collect()  # wrapped models go before their group: destroying both at once can wait for ever (torch 2.13)
        dist.destroy_process_group()


def whole_group(folder: Path, name: str) -> list[obc.Scores]:
    found = sorted(folder.glob(f"{name} *"))
    assert len(found) >= 2
    return [obc.Scores.load(path) for path in found]


def assert_equal_scores(scores: obc.Scores, expected: obc.Scores, prefix: str = "") -> None:
    assert scores.num_rows == expected.num_rows
    assert set(scores) == {prefix + name for name in expected}
    for name, values in expected.items():
        for side in ("out_channels", "in_channels"):
            there, here = getattr(values, side), getattr(scores[prefix + name], side)
            if there is None:
                assert here is None
            else:
                largest = float(there.max())
                torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5 * largest, msg=f"{name}.{side}")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_scores_of_a_model_on_several_processes_are_those_of_one(folder: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    expected = scenario.alone(net())
    wrapped = scenario.prepare in (wrap_data_parallel, prepare_with_accelerate)
    for scores in whole_group(folder, name):
        assert_equal_scores(scores, expected, "module." if wrapped else "")
        assert not any(how.startswith("unscored") for how in scores.coverage.values())


def test_rows_of_each_process_are_gathered_in_the_order_of_the_processes(folder: Path) -> None:
    processes = whole_group(folder, "kept rows")
    alone = obc.score(net(), batches(), mean_loss, keep_rows=True, progress=False)
    order = [index for rank in range(len(processes)) for index in range(rank, len(batches()), len(processes))]
    for scores in processes:
        assert scores.num_rows == alone.num_rows
        for name, rows in alone.rows.items():
            expected = rows.out_channels[order]
            torch.testing.assert_close(scores.rows[name].out_channels, expected, rtol=1e-5, atol=1e-6)


def refused() -> dict[str, str]:
    """Messages about processes that would count rows twice, and about layers sharded by only a part of the mesh."""
    mesh = two_meshes()
    blocks_alone, layers_alone = (split_columns_rows(net(), mesh["tensor"]) for _ in range(2))
    for block in blocks_alone.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh["data"])
    for block in layers_alone.get_submodule("blocks").children():
        for layer in (block.up, block.down):
            fully_shard(layer, mesh=mesh["data"])
    said = {}
    for name, model, score in (
        ("common", split_columns_rows(net()), own_rows),
        ("blocks alone", blocks_alone, batch_rows),
        ("layers alone", layers_alone, batch_rows),
    ):
        try:
            score(model)
        except ValueError as error:
            said[name] = str(error)
    return said


class OneMore(nn.Module):
    """A norm whose scale is one more than its parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


def not_scaling() -> dict[str, str]:
    """How modules are read whose parameters do not scale their outputs, and a norm, if no gradient can check it."""
    modules = (nn.PReLU(WIDTH), OneMore(WIDTH), nn.LayerNorm(WIDTH))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *modules, nn.Linear(WIDTH, WIDTH))
    fully_shard(model)
    inputs = [torch.randn(4, WIDTH)]
    group = dist.group.WORLD
    scores = obc.score(model, inputs, lambda m, x: m(x).square().mean(), process_group=group, combine="scores")
    return {name: str(coverage) for name, coverage in scores.coverage.items()}


def test_without_gradients_to_check_only_what_scales_its_output_is_read_by_gates(folder: Path) -> None:
    for path in folder.glob("not scaling *"):
        said = json.loads(path.read_text())
        for name in ("1", "2"):
            assert "do not scale and shift its output" in said[name]
        assert said["3"] == said["0"] == "gate (unchecked)"


def test_what_cannot_be_scored_is_refused_with_the_way_out(folder: Path) -> None:
    found = [json.loads(path.read_text()) for path in folder.glob("refused *")]
    assert len(found) >= 2
    for said in found:
        assert "of process_group have parts of the same layers" in said["common"]
        assert "pass the group of processes with other batches" in said["common"]
        for name in ("blocks alone", "layers alone"):
            assert "DeviceMesh((tensor=2)" in said[name]
            assert "then pass the rest of its dimensions to fully_shard for the whole model" in said[name]


def _training_is_as_it_was(path: Path) -> None:
    """A step of training after scoring, of fully_shard, which fixes what requires a gradient at its first forward."""
    model = shard_fully(net())
    own_rows(model)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mean_loss(model, batches()[0]).backward()
    optimizer.step()
    torch.save({name: p.full_tensor().detach() for name, p in model.named_parameters()}, path)  # type: ignore[attr-defined]


def test_fully_sharded_models_train_on_after_scoring(folder: Path) -> None:
    model = net()
    mean_loss(model, batches()[0]).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for path in folder.glob("trained *"):
        trained = torch.load(path, weights_only=True)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-5, atol=1e-6)
