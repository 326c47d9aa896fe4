"""JacobianImportance in Torch-Pruning: every group against slices of explicit float64 gradients, then a step.

Runs with whichever Torch-Pruning is imported. For the last 1.5, put that into a folder of its own first:
``pip install --target DIR --no-deps torch-pruning==1.5.3``, then
``OBC_TORCH_PRUNING_15=DIR pytest tests/integrations -k test_older_version``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import Case
from parity import TOLERANCE, error
from torch import Tensor, nn

import obc

tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from pruned_families import FAMILIES, FILLS, Truth, fill_score, graph, make_pruner, residual, scored  # noqa: E402

from obc.integrations.torch_pruning import JacobianImportance  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")

OLDER = os.environ.get("OBC_TORCH_PRUNING_15", "")


@pytest.mark.sampled(members=10)
@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_groups_match_explicit_slices(name: str, fill: Callable[[JacobianImportance, Case], None]) -> None:
    family = FAMILIES[name]
    case = family.build()
    importance = JacobianImportance(strict=True)
    fill(importance, case)
    before = sum(parameter.numel() for parameter in case.model.parameters())
    truth = Truth(case, importance)
    make_pruner(family, case, truth).step()
    assert truth.groups > 0
    assert truth.compared == family.compared
    assert sum(parameter.numel() for parameter in case.model.parameters()) < before
    case.loss(case.model, case.batches[0])  # the pruned model still runs


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_the_pruner_may_remove_is_read(name: str) -> None:
    """The pruner asks for the same importances as where everything was read, and no layer that it keeps is read."""
    family = FAMILIES[name]
    case = family.build()
    everything, importance = JacobianImportance(), JacobianImportance(strict=True)
    everything.score(case.model, case.batches, case.loss)
    pruner = make_pruner(family, case, importance)
    scores = importance.score(case.model, case.batches, case.loss, pruner=pruner)
    groups = list(
        pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)
    )
    assert groups
    pruned = {id(item[0].target.module) for group in groups for item in group}
    for group in groups:
        expected = everything(group)
        assert error(importance(group), expected.double()) <= TOLERANCE
    for layer, module in case.model.named_modules():
        if id(module) not in pruned and isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
            assert layer not in scores or layer.endswith("out_proj")
    pruner.step()


def test_a_pruner_of_another_model_is_refused() -> None:
    family, case = residual()
    importance = JacobianImportance()
    pruner = make_pruner(family, case, importance)
    other = family.build()
    with pytest.raises(ValueError, match="none of its groups has a module of this ResidualCNN"):
        importance.score(other.model, other.batches, other.loss, pruner=pruner)
    with pytest.raises(ValueError, match="pass pruner or modules, not both"):
        importance.score(case.model, case.batches, case.loss, pruner=pruner, modules=["head"])


def test_order_of_indices_is_the_groups() -> None:
    """A group of some channels in any order: each place of the result is its own channel's, and no list changes."""
    family, case, importance = scored("flatten")
    dependencies = graph(family, case)
    first = case.model.features[0]
    every = importance(dependencies.get_pruning_group(first, tp.prune_conv_out_channels, list(range(6))))
    group = dependencies.get_pruning_group(first, tp.prune_conv_out_channels, [5, 0, 3])
    lists = [(list(item[1]), list(item.root_idxs)) for item in group]
    assert torch.equal(importance(group), every[[5, 0, 3]])
    assert [(list(item[1]), list(item.root_idxs)) for item in group] == lists
    last = case.model.features[4]
    every = importance(dependencies.get_pruning_group(last, tp.prune_conv_out_channels, list(range(8))))
    some = importance(dependencies.get_pruning_group(last, tp.prune_conv_out_channels, [7, 1]))
    torch.testing.assert_close(some, every[[7, 1]])


REDUCED = {
    "sum": lambda layers, present: layers.sum(0),
    "mean": lambda layers, present: layers.mean(0),
    "max": lambda layers, present: layers.max(0).values,
    "prod": lambda layers, present: torch.where(present, layers, torch.ones(())).prod(0),
    "first": lambda layers, present: layers[0],
    "gate": lambda layers, present: layers[-1],
    None: lambda layers, present: layers,
}


@pytest.mark.parametrize("reduction", REDUCED)
def test_reductions(reduction: str | None) -> None:
    """A group in which some layers have slices of only some root channels, and one has several of each."""
    family, case, summed = scored("concatenated")
    importance = JacobianImportance(reduction)
    importance.scores = summed.scores
    dependencies = graph(family, case)
    group = dependencies.get_pruning_group(case.model.join, tp.prune_conv_in_channels, list(range(10)))
    scores = summed.scores
    layers, present = torch.zeros(4, 10), torch.ones(4, 10, dtype=torch.bool)
    layers[0] = scores["join"].in_channels
    order = [item[0].target.module for item in group if next(item[0].target.module.parameters(), None) is not None]
    names = {id(module): name for name, module in case.model.named_modules()}
    assert {names[id(module)] for module in order} == {"join", "norm", "left", "right"}
    spans = {"join": slice(0, 10), "norm": slice(0, 10), "left": slice(0, 4), "right": slice(4, 10)}
    for place, module in enumerate(order):
        name = names[id(module)]
        layers[place], present[place] = 0, False
        layers[place, spans[name]] = scores[name].in_channels if name == "join" else scores[name].out_channels
        present[place, spans[name]] = True
    torch.testing.assert_close(importance(group), REDUCED[reduction](layers, present))


NORMALIZED: dict[Any, Callable[[Tensor], Tensor]] = {
    None: lambda s: s,
    "sum": lambda s: s / s.sum(),
    "mean": lambda s: s / s.mean(),
    "max": lambda s: s / s.max(),
    "standarization": lambda s: (s - s.min()) / (s.max() - s.min()),
    "gaussian": lambda s: (s - s.mean()) / s.std(),
    "sentinel_0.5": lambda s: s / s.sort().values[len(s) // 2],
    "lamp": lambda s: torch.stack([value / s[s >= value].sum() for value in s]),
}


@pytest.mark.parametrize("normalizer", NORMALIZED)
def test_normalizers(normalizer: str | None) -> None:
    family, case, summed = scored("flatten")
    dependencies = graph(family, case)
    group = dependencies.get_pruning_group(case.model.features[0], tp.prune_conv_out_channels, list(range(6)))
    importance = JacobianImportance(normalizer=normalizer)
    # Torch-Pruning adds 1e-8 to some denominators: scores of about 1 make that nothing.
    large = {
        name: obc.ChannelScores(*(None if side is None else side * 1e4 for side in (c.out_channels, c.in_channels)))
        for name, c in summed.scores.items()
    }
    importance.scores = large
    torch.testing.assert_close(importance(group), NORMALIZED[normalizer](summed(group) * 1e4))
    importance.scores = {
        name: obc.ChannelScores(*(None if side is None else side * 0 for side in (c.out_channels, c.in_channels)))
        for name, c in summed.scores.items()
    }
    assert not importance(group).any()


def test_a_callable_normalizer_gets_the_sums() -> None:
    family, case, summed = scored("flatten")
    group = graph(family, case).get_pruning_group(case.model.features[0], tp.prune_conv_out_channels, list(range(6)))
    importance = JacobianImportance(normalizer=torch.log)
    importance.scores = summed.scores
    assert torch.equal(importance(group), summed(group).log())


def test_scores_of_a_file_serve(tmp_path: Path) -> None:
    family, case, summed = scored("residual")
    summed.scores.save(tmp_path / "scores.safetensors")
    importance = JacobianImportance()
    importance.scores = obc.Scores.load(tmp_path / "scores.safetensors", case.model)
    group = graph(family, case).get_pruning_group(case.model.stem[0], tp.prune_conv_out_channels, list(range(6)))
    assert torch.equal(importance(group), summed(group))


def test_folded_groups_serve_every_group() -> None:
    """The paper's code adds up the groups of a grouped convolution's inputs; each in channel then has the sum."""
    family, case, _ = scored("grouped")
    importance = JacobianImportance()
    importance.score(case.model, case.batches, case.loss, fold_groups=True)
    folded = importance.scores["3"].in_channels
    assert folded.shape == (2,)
    group = graph(family, case).get_pruning_group(case.model[0], tp.prune_conv_out_channels, list(range(8)))
    expected = importance.scores["0"].out_channels + importance.scores["1"].out_channels + folded.repeat(4)
    torch.testing.assert_close(importance(group), expected)


def test_a_tied_weight_counts_once() -> None:
    case = models.tied()
    importance = JacobianImportance(strict=True)
    fill_score(importance, case)
    dependencies = tp.DependencyGraph().build_dependency(case.model, case.batches[0])
    group = dependencies.get_pruning_group(case.model.embedding, tp.prune_embedding_out_channels, list(range(8)))
    scores = importance.scores
    mix, norm, tied = scores["mix"], scores["norm"], scores["embedding"].out_channels
    torch.testing.assert_close(tied, scores["head"].in_channels)
    torch.testing.assert_close(importance(group), tied + mix.out_channels + mix.in_channels + norm.out_channels)


def test_keys_and_values_of_grouped_queries_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    family, case, importance = scored("decoder")
    with caplog.at_level("INFO", logger="obc"):
        make_pruner(family, case, importance).step()
    left_out = {record.args[0] for record in caplog.records if "no root indices" in record.msg}
    assert left_out == {"attention.key", "attention.value"}


@pytest.mark.slow
@pytest.mark.skipif(not OLDER, reason="OBC_TORCH_PRUNING_15 is not set: see the top of this file")
def test_older_version() -> None:
    """These files again, in a process that finds the older Torch-Pruning first."""
    path = os.pathsep.join([OLDER, *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OBC_TORCH_PRUNING_15": ""}
    version = [sys.executable, "-c", "import importlib.metadata as m; print(m.version('torch-pruning'))"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith("1.5."), f"OBC_TORCH_PRUNING_15={OLDER} holds Torch-Pruning {found}"
    files = [str(path) for path in Path(__file__).parent.glob("test_torch_pruning*.py")]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
