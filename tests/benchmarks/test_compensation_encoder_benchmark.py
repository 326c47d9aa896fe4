"""bench_compensation_encoder: every criterion removes the same share, and a row of a pair is of its own loss alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from transformers import BertConfig, BertModel

import obc
from benchmarks import bench_compensation_encoder as bench

WIDTH, LAYERS = 16, 2


class WordsOfOneLetter:
    """The part of a tokenizer that the benchmark calls: one token per word, its first letter."""

    def __call__(self, texts: list[str], padding: bool = True, return_tensors: str = "pt") -> dict[str, Tensor]:
        words = [[ord(word[0]) for word in text.split()] for text in texts]
        longest = max(map(len, words))
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in words])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture
def encoder() -> bench.Encoder:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        max_position_embeddings=16,
    )
    return bench.Encoder(BertModel(config), WordsOfOneLetter())


TEXTS = [f"{chr(97 + i % 26)} b {chr(97 + i * 5 % 26)} d {chr(97 + i * 7 % 26)} f" for i in range(24)]


def hidden(encoder: bench.Encoder, model: nn.Module) -> int:
    return sum(model.get_submodule(up).out_features for up, _ in encoder.feed_forward)


@pytest.mark.parametrize("labels", [True, False], ids=["contrastive", "label-free"])
def test_joint_selection_removes_the_shares_of_the_other_rows(encoder: bench.Encoder, labels: bool) -> None:
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    batches = encoder.pairs(TEXTS) if labels else [encoder.tokens(TEXTS)]
    losses = bench.contrastive_losses if labels else None
    shares = []
    for share, model, plan in bench.joint(encoder, batches, losses, seed=0):
        shares.append(share)
        assert hidden(encoder, model) == round(LAYERS * WIDTH * (1 - share))
        plan.verify(before, model)
    assert tuple(shares) == bench.SHARES
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.model.state_dict().items())


def test_layer_by_layer_removes_the_lowest_scores(encoder: bench.Encoder) -> None:
    scores = [torch.arange(WIDTH).float(), -torch.arange(WIDTH).float()]
    for share, _, plan in bench.by_layer(encoder, scores):
        kept = round(WIDTH * (1 - share))
        wanted = torch.arange(WIDTH - kept, WIDTH), torch.arange(kept)
        for (up, _), channels in zip(encoder.feed_forward, wanted, strict=True):
            torch.testing.assert_close(plan[up].out_channels, channels)


def test_contrastive_losses_are_the_terms_of_the_loss(encoder: bench.Encoder) -> None:
    (batch,) = encoder.pairs(TEXTS[: bench.PAIRS_PER_BATCH])
    losses = bench.contrastive_losses(encoder.model, batch)
    assert losses.shape == (bench.PAIRS_PER_BATCH,)
    torch.testing.assert_close(losses.mean(), bench.contrastive_loss(encoder.model, batch))


def test_a_row_of_a_pair_is_that_of_its_term(encoder: bench.Encoder) -> None:
    batches = encoder.pairs(TEXTS[: bench.PAIRS_PER_BATCH])
    rows = obc.score(
        encoder.model, batches, bench.contrastive_losses, rows="sample", keep_rows=True, progress=False
    ).rows
    for pair in (0, bench.PAIRS_PER_BATCH - 1):
        term = obc.score(
            encoder.model,
            batches,
            lambda model, batch, pair=pair: bench.contrastive_losses(model, batch)[pair],
            keep_rows=True,
            progress=False,
        ).rows
        for _, down in encoder.feed_forward:
            torch.testing.assert_close(rows[down].in_channels[pair], term[down].in_channels[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", bench.OTHERS)
def test_other_criteria_remove_the_shares_of_each_layer(encoder: bench.Encoder, name: str) -> None:
    for share, model, _ in bench.criteria(encoder, TEXTS, seed=0)[name]():
        widths = {model.get_submodule(up).out_features for up, _ in encoder.feed_forward}
        assert widths == {round(WIDTH * (1 - share))}


def test_other_criteria_come_in_the_order_of_the_layers(encoder: bench.Encoder) -> None:
    _, plan = next((model, plan) for share, model, plan in bench.criteria(encoder, TEXTS, seed=0)["L2"]())
    for names in encoder.feed_forward:
        up, down = (encoder.model.get_submodule(name).weight.detach() for name in names)
        norms = up.square().sum(1) + down.square().sum(0)
        kept = norms.topk(round(WIDTH * (1 - bench.SHARES[0]))).indices.sort().values
        torch.testing.assert_close(plan[names[0]].out_channels, kept)


def test_a_picture_of_rows_of_which_some_have_one_mode_only(tmp_path: Path) -> None:
    rows = [
        {"corpus": "docstrings", "sentences": 8, "seed": seed, "criterion": name, "share": share}
        | {"naive": 0.8, "ls": 0.9}
        | ({"seq": 0.95} if name == "JC" else {})
        for seed in (1, 2)
        for name in ("JC", "Taylor")
        for share in bench.SHARES
    ]
    bench.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
