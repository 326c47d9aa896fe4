"""Equal widths of transformers models: only such as the config can express, through obc.prune and from_pretrained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Case, case, token_losses, tokens
from torch import Tensor, nn
from transformers_families import FAMILIES, deepseek_v2, deepseek_v3, language_model, output

import obc
from obc.integrations.transformers import TransformersStructure, load_pruned, save_pruned
from obc.selection import Costs
from obc.selection.task import Task
from obc.selection.uniform import permitted_widths, select_uniform

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "initializer_range": 0.1,
}
_DECODER = _SIZES | {"vocab_size": 31, "num_key_value_heads": 4, "use_cache": False}
# Heads stay here, so that feed-forward blocks have to give all that is asked for.
_ENCODER = _SIZES | {"intermediate_size": 1024, "num_hidden_layers": 2}


def bert() -> Case:
    import transformers as t

    config = t.BertConfig(vocab_size=31, max_position_embeddings=16, **_ENCODER)
    return case(lambda: t.BertForMaskedLM(config), tokens(31, 8), token_losses)


def vit() -> Case:
    import transformers as t

    config = t.ViTConfig(image_size=16, patch_size=8, num_labels=5, **_ENCODER)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4)) for _ in range(8)]

    def losses(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(pixel_values=batch[0]).logits, batch[1], reduction="none")

    return case(lambda: t.ViTForImageClassification(config), batches, losses)


MODELS = {
    "llama": lambda: language_model("Llama", **_DECODER),
    "qwen2": lambda: language_model("Qwen2", **_DECODER),
    "mistral": lambda: language_model("Mistral", **_DECODER),
    "bert": bert,
    "vit": vit,
}


@pytest.mark.sampled(members=3)
@pytest.mark.filterwarnings("ignore:.*rows:UserWarning")
@pytest.mark.parametrize("round_to", [None, 64])
@pytest.mark.parametrize("macs", [0.7, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_what_prune_leaves_is_read_back_by_from_pretrained(
    name: str, macs: float, round_to: int | None, tmp_path: Path
) -> None:
    family = MODELS[name]()
    structure = TransformersStructure(family.model, uniform=True)
    result = obc.prune(
        family.model, None, family.batches, family.loss, macs=macs, structure=structure, round_to=round_to
    )
    assert result.report.macs_after <= macs * result.report.macs_before
    assert structure.config_refused is None
    assert not any("save_pretrained" in warning for warning in result.report.warnings)
    family.model.save_pretrained(tmp_path)
    loaded = type(family.model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(family, loaded), output(family, family.model))
    feed_forward = {group.size for group in structure.groups if group.kind == "ffn"}
    assert feed_forward == {family.model.config.intermediate_size}
    if round_to:
        assert feed_forward.pop() % round_to == 0


@pytest.mark.filterwarnings("ignore:.*rows:UserWarning")
@pytest.mark.parametrize("build", [deepseek_v2, lambda: deepseek_v3(dense=0)], ids=["v2", "v3"])
def test_a_shared_expert_is_as_wide_as_the_others(build: Callable[[], Case], tmp_path: Path) -> None:
    """DeepSeek's config has one word for both."""
    family = build()
    structure = TransformersStructure(family.model, uniform=True)
    assert not any("uniform" in reason for reason in structure.left_out.values())
    obc.prune(family.model, None, family.batches, family.loss, params=0.7, steps=2, structure=structure)
    assert structure.config_refused is None
    family.model.save_pretrained(tmp_path)
    loaded = type(family.model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(family, loaded), output(family, family.model))
    widths = {group.size for group in structure.groups if group.kind in ("ffn", "expert_ffn")}
    assert widths == {family.model.config.moe_intermediate_size}
    assert widths <= {4, 8, 12}


def test_several_shared_experts_are_no_multiple_that_the_config_could_say() -> None:
    family = deepseek_v3(dense=0, n_shared_experts=2)
    structure = TransformersStructure(family.model, uniform=True)
    inner = [group for group in structure.groups if group.kind in ("ffn", "expert_ffn")]
    assert {group.size for group in inner} == {16, 32}
    assert structure.limits.widths == {group.name: (group.size,) for group in inner}
    assert "all 2 such groups keep their 32 units" in structure.left_out["model.layers.0.mlp.shared_experts.gate_proj"]


def test_numbers_of_heads_are_those_that_divide_the_hidden_size() -> None:
    sizes = _DECODER | {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}
    structure = TransformersStructure(language_model("Llama", **sizes).model, uniform=True)
    heads = [group.name for group in structure.groups if group.kind == "heads"]
    assert structure.limits.widths == dict.fromkeys(heads, (1, 2, 3, 4, 6))
    assert not structure.left_out
    assert TransformersStructure(structure.model).limits.widths == {}


def test_the_residual_stream_stays_divisible_by_every_number_of_heads() -> None:
    sizes = _DECODER | {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}
    model = language_model("Llama", **sizes).model
    structure = TransformersStructure(model, ("heads", "embedding"), uniform=True)
    limits = structure.limits
    embedding = next(group.name for group in structure.groups if group.kind == "embedding")
    assert limits.round_to[embedding] == 24  # of 2, 4, 6, 8 and 12 query heads
    assert embedding not in limits.widths
    structure.remove({embedding: torch.arange(24)})
    assert structure.config_refused is None
    structure.remove({group.name: torch.arange(2) for group in structure.groups if group.kind == "heads"})
    assert structure.config_refused is None
    assert (model.config.hidden_size, model.config.num_attention_heads) == (72, 8)


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_heads_stay_where_the_config_has_no_word_for_fewer(family: str) -> None:
    structure = TransformersStructure(FAMILIES[family]().model, uniform=True)
    heads = [group for group in structure.groups if group.kind == "heads"]
    assert structure.limits.widths == {group.name: (group.size,) for group in heads}
    assert list(structure.left_out) == [heads[0].name]
    assert f"all {len(heads)} such groups keep their {heads[0].size} units" in structure.left_out[heads[0].name]


@pytest.mark.sampled(members=1)
@pytest.mark.filterwarnings("ignore:.*rows:UserWarning")
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_widths_far_apart_are_not_overshot_on_the_way(allocation: str) -> None:
    """One step or eight give the same widths. Equal shares come close to what was requested."""
    found = []
    for steps in (1, 8):
        family = MODELS["llama"]()
        structure = TransformersStructure(family.model, uniform=True)
        options = {"structure": structure, "round_to": 64, "allocation": allocation}
        report = obc.prune(family.model, None, family.batches, family.loss, macs=0.7, steps=steps, **options).report
        found.append(report.widths)
        assert report.macs_after <= 0.7 * report.macs_before
        assert allocation == "global" or report.macs_after >= 0.69 * report.macs_before
    assert found[0] == found[1]


def test_shares_out_of_reach_name_what_is_reachable() -> None:
    family = bert()
    structure = TransformersStructure(family.model, uniform=True)
    with pytest.raises(ValueError, match=r"out of reach: 0\.\d+ remain .* such groups keep their 8 units"):
        obc.prune(family.model, None, family.batches, family.loss, macs=0.1, structure=structure)


@pytest.mark.filterwarnings("ignore:.*rows:UserWarning")
def test_free_widths_warn_that_save_pretrained_does_not_serve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = MODELS["llama"]()
    before = family.model.config.to_dict()
    structure = TransformersStructure(family.model)
    with caplog.at_level(logging.WARNING, logger="obc"):
        report = obc.prune(
            family.model, None, family.batches, family.loss, macs=0.7, steps=3, structure=structure
        ).report
    told = [warning for warning in report.warnings if "save_pretrained" in warning]
    assert told == structure.warnings
    assert len(told) == 1
    assert "layers keep different" in told[0]
    assert "save_pruned and load_pruned" in told[0]
    assert told[0] in caplog.text
    assert family.model.config.to_dict() == before
    save_pruned(family.model, structure.plan, tmp_path)
    assert torch.equal(output(family, load_pruned(tmp_path)), output(family, family.model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "bert"])
def test_the_config_is_never_that_of_an_earlier_step(name: str) -> None:
    """Once it can't express the widths any more, it is the unpruned model's again, in every module."""
    family = FAMILIES[name]()
    before = copy.deepcopy(family.model.config.to_dict())
    structure = TransformersStructure(family.model)
    said = [group.name for group in structure.groups if group.kind == "ffn" or name != "bert"]
    structure.remove(dict.fromkeys(said, torch.tensor([0])))
    assert structure.config_refused is None
    assert structure.warnings == []
    assert family.model.config.to_dict() != before
    family.model.config.use_cache = not before["use_cache"]
    structure.remove({said[-1]: torch.tensor([0])})
    assert structure.config_refused is not None
    assert family.model.config.to_dict() == before | {"use_cache": not before["use_cache"]}
    held = [vars(module)["config"] for _, module in family.model.named_modules() if "config" in vars(module)]
    readers = {block.reads_config for block in structure.blocks.values()} - {None}
    assert sum(config is family.model.config for config in held) == len(held) - len(readers)
    assert output(family, family.model).isfinite().all()


# --- selection among given widths ---------------------------------------------------------------------------------


def rows_of(**sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(32, size, generator=generator) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((8, 1, 1), [1, 2, 3, 4, 5, 6, 7, 8]),
        ((10, 3, 4), [4, 8, 10]),
        ((8, 2, 1, {1, 2, 4, 16}), [2, 4, 8]),
        ((8, 1, 1, ()), [8]),
        ((4, 9, 1), [4]),
    ],
)
def test_permitted_widths(arguments: tuple[Any, ...], expected: list[int]) -> None:
    assert permitted_widths(*arguments) == expected


def test_other_families_give_what_one_may_not() -> None:
    costs = Costs(["a", "h"], [12, 8], linear=torch.tensor([1.0, 1.0]), unit="macs")
    for widths, kept in (({"h": (2, 4, 8)}, {"a": 8, "h": 4}), ({"h": (8,)}, {"a": 4, "h": 8}), ({}, {"a": 7, "h": 5})):
        removed = select_uniform(Task(rows_of(a=12, h=8), (), costs, 8.0, "joint", widths=widths), [["a"], ["h"]])
        assert {"a": 12 - len(removed["a"]), "h": 8 - len(removed["h"])} == kept
    with pytest.raises(obc.selection.BudgetError, match="free at most 11 of the 12"):
        select_uniform(Task(rows_of(a=12, h=8), (), costs, 12.0, "joint", widths={"h": (8,)}), [["a"], ["h"]])
