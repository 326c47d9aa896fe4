"""``obc prune --criterion`` with every criterion, on a model of every kind: it prunes, or says in a line why not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")
pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from obc import cli, criteria

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ENTRY = """
import torch
import transformers_families as families
from torch import nn
from torch.nn import functional as F


def cnn():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(3, (4,))) for _ in range(4)]
    return net, batches, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])


def _of(name):
    case = families.FAMILIES[name]()
    return case.model, case.batches, case.loss


def mixture():
    return _of("mixtral")


def llama():
    return _of("llama")


def vit():
    return _of("vit")
"""
KINDS = {
    "cnn": [],
    "mixture": ["--kinds", "expert_ffn", "experts", "heads"],
    "llama": ["--kinds", "ffn", "heads"],
    "vit": ["--kinds", "ffn", "heads"],
}
EXPERTS = ("reap", "expert_frequency", "expert_norm")
# Criterion -> the kinds of models that it does not serve, and what is said of it.
REFUSED = {
    **dict.fromkeys(EXPERTS, (("cnn", "llama", "vit"), "these groups have nothing to read 'experts' from")),
    **dict.fromkeys(("block_influence", "angular_distance", "entropy"), (tuple(KINDS), "it scores blocks")),
    "gaprune": (tuple(KINDS), "it compares two domains: pass criterion=obc.criteria.GAPrune(general=batches)"),
    "bn_scale": (("mixture", "llama", "vit"), "it scores channels behind a BatchNorm"),
    "cfsp": (("cnn",), "no residual blocks were found"),
    "token_jacobian": (("cnn",), "rows of tokens need layers that see the same positions"),
}
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("mixture", "llama", "vit")]


@pytest.fixture(autouse=True)
def _entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("every_kind.py").write_text(ENTRY)
    yield
    sys.modules.pop("every_kind", None)


def prune(kind: str, *options: str) -> int:
    arguments = [f"every_kind:{kind}", "--params", "0.85", "--steps", "1", "--out", "out", *options, *KINDS[kind]]
    return cli.main(["prune", *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", *SLOW])
def test_every_criterion_prunes_or_says_why_not(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in criteria.available():
        kinds, why = REFUSED.get(name, ((), ""))
        code = prune(kind, "--criterion", name)
        said = capsys.readouterr().err
        assert code == (2 if kind in kinds else 0), (name, said)
        if code:
            assert f"obc prune: the criterion '{name}'" in said
            assert why in said


ALLOCATIONS = [
    "global",
    "uniform",
    "equal",
    "two_classes",
    "two_classes:gamma=1",
    "log_profile:first=0.1,last=0.3",
    "search:generations=1,offspring=2,starts=uniform,metric=mse",
]


@pytest.mark.sampled
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("kind", ["cnn", "mixture"])
def test_every_allocation_serves(kind: str, allocation: str) -> None:
    assert prune(kind, "--criterion", "flap" if kind == "cnn" else "l1", "--allocation", allocation) == 0


@pytest.mark.parametrize("allocation", ["profile", "profile:by=cosine,shape=linear", "model.layers.0=0"])
def test_profiles_of_blocks_serve(allocation: str) -> None:
    assert prune("mixture", "--criterion", "flap", "--allocation", allocation) == 0
    widths = json.loads(Path("out/report.json").read_text())["widths"]
    losses = {name: before - now for name, (before, now) in widths.items()}
    assert any(losses.values())
    if "=0" in allocation:
        assert not any(loss for name, loss in losses.items() if name.startswith("model.layers.0."))


@pytest.mark.parametrize(
    ("allocation", "why"),
    [
        ("greedy", "allocation must be one of 'global', 'uniform', 'equal', 'profile'"),
        ("greedy:steps=1", "'greedy' is none of global, uniform, equal, profile"),
        ("search:depth=3", "search has no option 'depth=3'; it has generations=10, offspring=8"),
        ("search:generations", "search has no option 'generations'"),
        ("uniform:share=1", "uniform has no option 'share=1'; it has none"),
        ("search:generations=two", "search:generations must be a whole number, got 'two'"),
        ("search:generations=0", "search: generations must be at least 1, got 0"),
        ("search:compensated=1", "search:compensated must be one such as false, got '1'"),
        ("search:starts=best", "search: starts takes one or both of 'uniform' and 'global', got ('best',)"),
        ("two_classes:gamma=-1", "two_classes: gamma must be positive, got -1.0"),
        ("profile:by=norm", "profile: BlockProfile takes 'angle' or 'cosine'"),
        ("0=x", "0=x: a strength must be a number, got 'x'"),
        ("encoder=0.5", "allocation: no group is named 'encoder'; there are 0, 3"),
        ("0=-1", "a profile's strengths must be finite and not negative, got -1.0 for '0'"),
        ("profile", "no residual blocks were found"),
    ],
)
def test_allocations_that_cannot_be_say_why(allocation: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune("cnn", "--criterion", "l1", "--allocation", allocation) == 2
    said = capsys.readouterr().err
    assert said.startswith("obc prune: ")
    assert why in said


def test_a_search_whose_budget_is_out_of_reach_says_what_remains(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--criterion", "l1", "--allocation", "search:generations=1", "--params", "0.001"]
    assert prune("cnn", *options) == 2
    assert "out of reach" in capsys.readouterr().err
