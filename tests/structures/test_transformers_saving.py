"""Pruned transformers models through files: from_pretrained if a config can express the widths, else load_pruned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers_families import FAMILIES, INEXPRESSIBLE_HEADS, every_other, output

import obc
from obc import PlanError
from obc.integrations.transformers import TransformersStructure, load_pruned, save_pruned


def halved(model: nn.Module, *kinds: str) -> TransformersStructure:
    """Every group at half its width, or at what must stay."""
    structure = TransformersStructure(model, kinds) if kinds else TransformersStructure(model)
    least = structure.limits.min_units
    structure.remove({g.name: torch.arange(min(g.size // 2, g.size - least[g.name])) for g in structure.groups})
    return structure


def uneven(model: nn.Module) -> TransformersStructure:
    """Different widths and channels in every group, unless a kernel forbids it."""
    structure = TransformersStructure(model)
    limits = structure.limits
    units = {}
    for index, group in enumerate(structure.groups):
        removable = every_other(group.size, limits.min_units[group.name])
        count = min(len(removable), (index + 1) * limits.round_to[group.name])
        units[group.name] = removable[:count]
    structure.remove(units)
    return structure


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_widths_round_trip(family: str, tmp_path: Path) -> None:
    case = FAMILIES[family]()
    structure = uneven(case.model)
    save_pruned(case.model, structure.plan, tmp_path)
    loaded = load_pruned(tmp_path)
    assert type(loaded) is type(case.model)
    assert torch.equal(output(case, loaded), output(case, case.model))
    assert list(loaded.state_dict()) == list(case.model.state_dict())


@pytest.mark.sampled(members=8)
@pytest.mark.parametrize("kinds", [(), ("query_heads", "ffn"), ("embedding",)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_applied_plan_also_sets_counts(family: str, kinds: tuple[str, ...]) -> None:
    """Numbers of heads and experts, in attributes or read from the config, become those of the pruned model."""
    case, plain = FAMILIES[family](), FAMILIES[family]()
    structure = halved(case.model, *kinds) if kinds else uneven(case.model)
    assert structure.plan.apply(plain.model) is plain.model
    assert torch.equal(output(case, plain.model), output(case, case.model))
    assert plain.model.config.to_dict() == case.model.config.to_dict()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - INEXPRESSIBLE_HEADS))
def test_equal_widths_round_trip_through_from_pretrained(family: str, tmp_path: Path) -> None:
    case = FAMILIES[family]()
    structure = halved(case.model)
    assert structure.config_refused is None
    case.model.save_pretrained(tmp_path)
    loaded = type(case.model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(case, loaded), output(case, case.model))
    parameters = {name: parameter.shape for name, parameter in loaded.named_parameters()}
    assert parameters == {name: parameter.shape for name, parameter in case.model.named_parameters()}


@pytest.mark.parametrize("family", sorted(INEXPRESSIBLE_HEADS))
def test_widths_that_no_config_can_say(family: str, tmp_path: Path) -> None:
    case = FAMILIES[family]()
    before = case.model.config.to_dict()
    structure = halved(case.model)
    assert "can't express the widths" in str(structure.config_refused)
    assert case.model.config.to_dict() == before
    feed_forward = FAMILIES[family]()
    assert halved(feed_forward.model, "ffn").config_refused is None
    feed_forward.model.save_pretrained(tmp_path)
    loaded = type(feed_forward.model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(case, loaded), output(case, feed_forward.model))


def test_different_widths_are_refused_by_name() -> None:
    case = FAMILIES["llama"]()
    structure = uneven(case.model)
    assert "layers keep different" in str(structure.config_refused)
    assert case.model.config.intermediate_size == 48


def test_widths_that_become_equal_again_are_said() -> None:
    case = FAMILIES["llama"]()
    structure = TransformersStructure(case.model, kinds=("ffn",))
    first, second = (group.name for group in structure.groups)
    structure.remove({first: torch.arange(8)})
    assert structure.config_refused is not None
    structure.remove({second: torch.arange(8)})
    assert structure.config_refused is None
    assert case.model.config.intermediate_size == 40
    assert case.model.model.layers[0].mlp.config is case.model.config


@pytest.mark.parametrize("save", ["pretrained", "pruned"])
@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_generation_with_a_cache_after_pruning_heads(family: str, save: str, tmp_path: Path) -> None:
    case = FAMILIES[family]()
    structure = halved(case.model, "heads") if save == "pretrained" else uneven(case.model)
    if save == "pretrained":
        case.model.save_pretrained(tmp_path)
        loaded = type(case.model).from_pretrained(tmp_path).eval()
    else:
        save_pruned(case.model, structure.plan, tmp_path)
        loaded = load_pruned(tmp_path)
    prompt = case.batches[0][:2, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = case.model.generate(prompt, use_cache=False, **options)
    for model in (case.model, loaded):
        assert torch.equal(model.generate(prompt, use_cache=True, **options), expected)


def test_heads_then_query_heads_and_feed_forward_round_trip(tmp_path: Path) -> None:
    """The plan of a second structure continues that of the first one."""
    case = FAMILIES["llama"]()
    original = FAMILIES["llama"]().model.state_dict()
    first = TransformersStructure(case.model, ("heads", "ffn"))
    first.remove({group.name: torch.tensor([1]) for group in first.groups if group.name.startswith("model.layers.0")})
    second = TransformersStructure(case.model, ("query_heads",), plan=first.plan)
    second.remove({second.groups[1].name: torch.tensor([0])})
    second.plan.verify(original, case.model)
    save_pruned(case.model, second.plan, tmp_path)
    assert torch.equal(output(case, load_pruned(tmp_path)), output(case, case.model))


def test_embedding_width_round_trip(tmp_path: Path) -> None:
    for family in ("llama-tied", "bert", "vit", "deepseek-v3"):
        case = FAMILIES[family]()
        structure = TransformersStructure(case.model, ("embedding",))
        structure.remove({structure.groups[0].name: torch.tensor([1, 4])})
        save_pruned(case.model, structure.plan, tmp_path / family)
        assert torch.equal(output(case, load_pruned(tmp_path / family)), output(case, case.model))


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    case = FAMILIES["llama-tied"]()
    save_pruned(case.model, uneven(case.model).plan, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_pruned(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_half_precision_keeps_its_dtype(tmp_path: Path) -> None:
    case = FAMILIES["llama"]()
    model = case.model
    for parameter in model.parameters():  # buffers, such as rotary frequencies, stay as from_pretrained makes them
        parameter.data = parameter.data.bfloat16()
    save_pruned(model, uneven(model).plan, tmp_path)
    loaded = load_pruned(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(output(case, loaded), output(case, model))


def test_values_may_change_after_pruning(tmp_path: Path) -> None:
    case = FAMILIES["bert"]()
    structure = uneven(case.model)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.mul_(1.1)
    save_pruned(case.model, structure.plan, tmp_path)
    assert torch.equal(output(case, load_pruned(tmp_path)), output(case, case.model))


def test_the_plan_in_the_folder_serves_compensation_later(tmp_path: Path) -> None:
    case = FAMILIES["llama"]()
    save_pruned(case.model, uneven(case.model).plan, tmp_path)
    obc.PruningPlan.load(tmp_path / "obc_plan.json").verify(
        FAMILIES["llama"]().model.state_dict(), load_pruned(tmp_path)
    )


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    case = FAMILIES["llama"]()
    save_pruned(case.model, uneven(case.model).plan, tmp_path)
    other = FAMILIES["llama"]()
    obc.PruningPlan(TransformersStructure(other.model).plan).save(tmp_path / "obc_plan.json")
    with pytest.raises(PlanError, match=r"config and plan make it \(.*\), the file has"):
        load_pruned(tmp_path)
    (tmp_path / "obc_plan.json").unlink()
    with pytest.raises(PlanError, match=r"has no obc_plan.json"):
        load_pruned(tmp_path)


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    case = FAMILIES["llama"]()
    save_pruned(case.model, uneven(case.model).plan, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="no class 'NoSuchModel'; pass model_class="):
        load_pruned(tmp_path)
    assert torch.equal(output(case, load_pruned(tmp_path, type(case.model))), output(case, case.model))
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match="was not written by save_pruned"):
        load_pruned(tmp_path, type(case.model))
    with pytest.raises(ValueError, match="Linear has no transformers config"):
        save_pruned(nn.Linear(2, 2), obc.PruningPlan(), tmp_path)


def test_a_plan_of_a_model_that_was_pruned_before_is_refused(tmp_path: Path) -> None:
    """Such a plan alone would make a folder that can't be loaded."""
    case = FAMILIES["llama"]()
    first = TransformersStructure(case.model)
    first.remove({first.groups[0].name: torch.tensor([1])})
    second = TransformersStructure(case.model)
    second.remove({second.groups[1].name: torch.tensor([0])})
    with pytest.raises(PlanError, match=r"config and plan make it .* the model has .* plan\.after"):
        save_pruned(case.model, second.plan, tmp_path)
    assert not list(tmp_path.iterdir())
    save_pruned(case.model, second.plan.after(first.plan), tmp_path)
    assert torch.equal(output(case, load_pruned(tmp_path)), output(case, case.model))
