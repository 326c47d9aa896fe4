"""``obc prune`` with budgets of latency and memory, with kinds, and with the speed measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")
pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

import transformers
from counted_seconds import counted_seconds

from obc import LatencyTable, cli

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ENTRY = """
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(40)]
    return net, batches, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])


def llama():
    model = LlamaForCausalLM.from_pretrained("llama").eval()
    batches = [torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(n)) for n in range(6)]
    return model, batches, lambda model, batch: model(input_ids=batch, labels=batch).loss
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with entry points, a model, its data, and no clock."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("obc.structures.latency._median", counted_seconds)
    monkeypatch.setattr(
        "obc.pruning.measured.median_seconds",
        lambda calls, device: [counted_seconds(call, device) for call in calls],
    )
    Path("recipes_of_mine.py").write_text(ENTRY)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    generator = torch.Generator().manual_seed(0)
    lines = [json.dumps({"input_ids": torch.randint(20, (8,), generator=generator).tolist()}) for _ in range(60)]
    Path("data.jsonl").write_text("\n".join(lines))
    yield tmp_path
    sys.modules.pop("recipes_of_mine", None)


def prune(*arguments: object) -> int:
    return cli.main(["prune", *map(str, arguments)])


def report() -> dict:
    found: dict = json.loads(next(Path("out").glob("*report.json")).read_text())
    return found


@pytest.fixture
def scored() -> Callable[..., list[object]]:
    """Arguments of a directory with its scores, or statistics."""

    def make(*more: str) -> list[object]:
        arguments = ["score", "llama", "--data", "data.jsonl", "--out", "scores.safetensors", "--batches", "12"]
        assert cli.main([*arguments, "--seq-len", "8", "--device", "cpu", "--batch-size", "1", *more]) == 0
        return ["llama", "--scores", "scores.safetensors", "--device", "cpu", "--out", "out"]

    return make


def test_an_entry_point_by_latency_writes_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["recipes_of_mine:small", "--steps", 1, "--latency", 0.7]
    assert prune(*arguments, "--measure", "--out", "out") == 0
    latency = report()["known"]["latency"]
    assert latency["after"] <= 0.7 * latency["before"]
    assert report()["speed"]["after"] < report()["speed"]["before"]
    assert "measured speed-up: " in capsys.readouterr().out
    table = LatencyTable.load("out/latency_table.json")
    assert sum(table.seconds["0"].values()) > 0
    # The table serves again: nothing is measured then.
    pytest.MonkeyPatch().setattr("obc.structures.latency._median", None)
    assert prune(*arguments, "--latency-table", "out/latency_table.json", "--out", "out") == 0
    assert report()["known"]["latency"] == latency


def test_an_entry_point_by_memory_and_kinds() -> None:
    arguments = ["recipes_of_mine:llama", "--steps", 1, "--memory", 0.8, "--cache-length", 64, "--cache-batch", 2]
    assert prune(*arguments, "--memory-dtype", "bf16", "--kinds", "heads", "ffn", "layers", "--out", "out") == 0
    memory = report()["known"]["memory"]
    assert memory["after"] <= 0.8 * memory["before"]
    assert memory["counted"] == "bytes: weights and a cache of 2 x 64 tokens, bfloat16"
    assert "model.layers.1" in report()["widths"]


def test_a_directory_by_latency(scored: Callable[..., list[object]], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = scored("--keep-rows")
    assert prune(*arguments, "--latency", 0.7, "--data", "data.jsonl", "--seq-len", 8, "--measure") == 0
    latency = report()["known"]["latency"]
    assert latency["after"] <= 0.7 * latency["before"]
    assert "inputs 1x8" in latency["counted"]
    assert "measured speed-up: " in capsys.readouterr().out
    assert prune(*arguments, "--latency", 0.6, "--latency-table", "out/latency_table.json") == 0
    assert report()["known"]["latency"]["before"] == latency["before"]


def test_whole_blocks_of_a_directory_go_by_statistics(scored: Callable[..., list[object]]) -> None:
    arguments = scored("--statistics", "blocks")
    assert prune(*arguments, "--criterion", "block_influence", "--kinds", "layers", "--memory", 0.8) == 0
    assert sorted(report()["widths"].values()) == [[1, 0], [1, 1]]
    assert len(transformers.LlamaForCausalLM.from_pretrained("out").model.layers) == 2


def test_what_a_criterion_needs_is_collected_by_its_name(
    scored: Callable[..., list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    angle = ("--criterion", "angular_distance", "--kinds", "layers", "--memory", 0.8)
    assert prune(*scored("--statistics", "blocks"), *angle) == 2
    refused = capsys.readouterr().err
    assert "needs the statistic 'blocks' with tokens='last', which was collected with tokens='all'" in refused
    assert "or collect them by obc score MODEL_DIR --statistics angular_distance" in refused
    arguments = scored("--statistics", "moments,angular_distance")
    assert prune(*arguments, *angle) == 0
    assert prune(*arguments, "--criterion", "flap", "--kinds", "layers", "--memory", 0.8) == 2
    refused = capsys.readouterr().err
    assert "'flap' scores no group of this model: it scores channels, heads, the groups are of layers" in refused


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--latency 0.7", "--latency without --latency-table needs --data"),
        ("--measure", "--measure needs --data"),
        ("--latency 0.7 --latency-table data.jsonl", "--latency-table: data.jsonl is not a latency table"),
        ("--latency 0.7 --latency-table none.json", "--latency-table: "),
        ("--memory 0.5 --cache-batch 2", "--cache-batch needs --cache-length"),
        ("--memory 1e9", "more than the"),
        ("--kinds wings", "kinds are"),
        ("--memory 0.001", "--memory 0.001 is out of reach: 0."),
        ("--memory 100", "--memory 100 is out of reach: "),
    ],
)
def test_what_is_refused(
    arguments: str, message: str, scored: Callable[..., list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(*scored(), *arguments.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
