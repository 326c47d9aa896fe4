"""Tiny transformers models from configurations: parity with the oracle, and nothing left unscored."""

from __future__ import annotations

import models
import oracle
import pytest
from models import TRANSFORMERS
from parity import assert_equal, assert_parity, error, expected_scores, score_in_a_loop

import obc

# Modules whose weights these models use without calling the modules: only their weight's gradient can be read.
FALLS_BACK = {
    "mamba": {f"backbone.layers.{layer}.mixer.{name}" for layer in (0, 1) for name in ("conv1d", "dt_proj")},
}


@pytest.mark.sampled(members=8)
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_scores_match_the_oracle(family: str, rows: str) -> None:
    case = TRANSFORMERS[family]()
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    assert_parity(scores, expected_scores(case, rows))


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_conv_linear_and_norm_layer_is_scored(family: str) -> None:
    case = TRANSFORMERS[family]()
    scores = obc.score(case.model, case.batches, case.loss)
    modules = oracle.scorable(case.model)
    assert set(modules) <= set(scores)
    fallen = set()
    for name, module in modules.items():
        how = str(scores.coverage[name])
        if how.startswith("weight gradient"):
            fallen.add(name)
        else:
            assert how.startswith("norm gradient" if oracle.is_norm(module) else "gate"), f"{name}: {how}"
    assert fallen == FALLS_BACK.get(family, set())


# Gemma's norms scale by 1 + weight: per sample, no gate can tell the weight's share from the one's.
@pytest.mark.parametrize("family", [name for name in TRANSFORMERS if name not in ("mamba", "gemma")])
def test_sample_rows_need_no_fallback(family: str) -> None:
    case = TRANSFORMERS[family]()
    scores = obc.score(case.model, case.batches, case.losses, rows="sample")
    assert all(str(scores.coverage[name]).startswith("gate") for name in oracle.scorable(case.model)), scores


def test_embeddings_have_out_channels_only_and_norms_too() -> None:
    case = models.llama()
    scores = obc.score(case.model, case.batches, case.loss)
    assert scores["model.embed_tokens"].out_channels.shape == (case.model.config.hidden_size,)
    assert scores["model.embed_tokens"].in_channels is None
    assert scores["model.norm"].in_channels is None


def test_tied_embedding_and_head_share_their_scores() -> None:
    case = models.llama_tied()
    scores = obc.score(case.model, case.batches, case.loss)
    rows = oracle.rows(case.model, case.batches, case.loss)
    embedding, _ = rows["model.embed_tokens"]
    _, head = rows["lm_head"]
    total = (embedding + head).square().sum(0)
    assert error(scores["model.embed_tokens"].out_channels, total) <= 1e-4
    assert error(scores["lm_head"].in_channels, total) <= 1e-4
    untied = [name for name in rows if name not in ("model.embed_tokens", "lm_head")]
    assert_parity(scores, expected_scores(case), untied)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    """transformers checkpoints in train mode only; these models have no dropout."""
    case = models.llama()
    plain = obc.score(case.model, case.batches, case.loss)
    case.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    case.model.train()
    scores = score_in_a_loop(obc.JacobianScorer(case.model), case)
    assert_equal(scores, plain)
