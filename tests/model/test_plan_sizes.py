"""Plans know the sizes from before pruning: models of other widths or depths are refused, in files too."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import llama
from prunable import RECIPES
from torch import Tensor, nn
from transformers_families import FAMILIES, output

import obc
from obc import Kept, PlanError, PruningPlan
from obc.files import built
from obc.integrations.transformers import TransformersStructure, load_pruned, save_pruned
from obc.model.depth import Depth
from obc.structures.traced import TorchPruningStructure


class Kinds(nn.Module):
    """Layers that no recipe has: a recurrent one, an embedding, torch's attention, a parameter outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.lstm, self.head = nn.LayerNorm(8), nn.LSTM(8, 6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x) + self.position
        return self.head(self.lstm(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))[0])


def half(structure: TorchPruningStructure | TransformersStructure) -> PruningPlan:
    structure.remove({group.name: torch.arange(0, group.size // 2) for group in structure.groups})
    return structure.plan


def kinds() -> tuple[nn.Module, nn.Module, PruningPlan]:
    torch.manual_seed(0)
    model = Kinds().double().eval()
    pruned = copy.deepcopy(model)
    return model, pruned, half(TorchPruningStructure(pruned, torch.randint(9, (2, 5))))


def recipe(name: str) -> tuple[nn.Module, nn.Module, PruningPlan]:
    one = RECIPES[name].prune(2)
    return one.original, one.model, one.plan


def transformer() -> tuple[nn.Module, nn.Module, PruningPlan]:
    model = llama().model
    pruned = copy.deepcopy(model)
    return model, pruned, half(TransformersStructure(pruned))


def matched() -> tuple[nn.Module, nn.Module, PruningPlan]:
    one = RECIPES["grouped"].prune()
    return one.original, one.model, PruningPlan.from_models(one.state_dict, one.model)


def traced_twice() -> tuple[nn.Module, nn.Module, PruningPlan]:
    model = RECIPES["flatten"].model()
    pruned = copy.deepcopy(model)
    structure = TorchPruningStructure(pruned, RECIPES["flatten"].inputs())
    half(structure)
    return model, pruned, half(structure)


RECORDED = {
    **{name: lambda name=name: recipe(name) for name in RECIPES},
    "kinds": kinds,
    "transformer": transformer,
    "matched": matched,
    "traced-twice": traced_twice,
}


def sizes_of(model: nn.Module, name: str, kept: Kept) -> tuple[int, int | None]:
    """(out, in) of the unpruned model's layer, from what it says of itself."""
    if kept.dim is not None:
        return model.get_parameter(name).shape[kept.dim], None
    module = model.get_submodule(name)
    for out, inner in (
        ("out_features", "in_features"),
        ("out_channels", "in_channels"),
        ("hidden_size", "input_size"),
        ("embed_dim", "embed_dim"),
        ("num_features", "num_features"),
        ("embedding_dim", "embedding_dim"),
    ):
        if isinstance(getattr(module, out, None), int):
            return getattr(module, out), getattr(module, inner)
    return len(module.weight), None


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorder_writes_the_sizes_from_before(name: str) -> None:
    model, pruned, plan = RECORDED[name]()
    assert len(plan)
    for layer, kept in plan.items():
        out, inner = sizes_of(model, layer, kept)
        assert kept.out_size == (None if kept.out_channels is None else out), layer
        assert kept.in_size == (None if kept.in_channels is None else inner), layer
    plan.verify(model.state_dict(), pruned)


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", ["grouped", "flatten", "kinds", "transformer"])
def test_a_layer_of_another_size_is_refused(name: str) -> None:
    """Every entry of every kind of layer in turn; the model is unchanged."""
    model, pruned, plan = RECORDED[name]()
    state = model.state_dict()
    for layer, kept in plan.items():
        for side in ("out_size", "in_size"):
            if (size := getattr(kept, side)) is None:
                continue
            other = PruningPlan({**plan, layer: replace(kept, **{side: size + 1})}, plan.depth)
            message = rf"^{layer}\b.*made for {size + 1} channels where this has {size}; pass the model"
            for job in (
                lambda plan=other: plan.apply(model),
                lambda plan=other: plan.verify(state, pruned),
                lambda plan=other: plan.put_slices(state, copy.deepcopy(pruned)),
            ):
                with pytest.raises(PlanError, match=message):
                    job()
    assert all(value.shape == model.state_dict()[key].shape for key, value in state.items())


def test_a_wider_model_of_the_same_names_is_refused() -> None:
    def net(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))

    pruned, wide = net(8), net(16)
    plan = half(TorchPruningStructure(pruned, torch.randn(1, 3, 9, 9)))
    with pytest.raises(PlanError, match=r"^0\.weight: .*made for 8 channels where this has 16"):
        plan.apply(wide)
    batches = [torch.randn(2, 3, 9, 9) for _ in range(2)]
    for job in (
        lambda: obc.compensate(pruned, wide, plan, batches),
        lambda: obc.equivalent_pruning(pruned, wide.state_dict(), plan),
    ):
        with pytest.raises(PlanError, match="made for 8 channels where this has 16"):
            job()


class Deep(nn.Module):
    """Residual blocks of linear layers, in a list."""

    def __init__(self, depth: int, kind: type[nn.ModuleList | nn.Sequential]) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks) if kind is nn.ModuleList else nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_a_deeper_model_of_the_same_names_is_refused(kind: type[nn.ModuleList | nn.Sequential]) -> None:
    pruned, deep = Deep(2, kind), Deep(3, kind)
    plan = half(TorchPruningStructure(pruned, torch.randn(2, 4)))
    message = "^blocks: the plan was made for 2 blocks where .* has 3; pass the model"
    with pytest.raises(PlanError, match=message):
        plan.apply(deep)
    for job in (plan.verify, plan.put_slices):
        with pytest.raises(PlanError, match=message):
            job(deep.state_dict(), pruned)


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_a_list_with_empty_places_is_cut_like_others(kind: type[nn.ModuleList | nn.Sequential]) -> None:
    class WithGaps(Deep):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x if block is None else x + block(x)
            return x

    pruned, again = WithGaps(3, kind), WithGaps(3, kind)
    for model in (pruned, again):
        model.blocks._modules["1"] = None
    plan = half(TorchPruningStructure(pruned, x := torch.randn(2, 4)))
    plan.apply(again).load_state_dict(pruned.state_dict())
    assert again.blocks[0][0].weight.shape == (4, 4)
    assert torch.equal(again(x), pruned(x))


@pytest.mark.parametrize("kinds", [(), ("ffn", "layers")], ids=str)
def test_a_deeper_transformer_is_refused(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Also where no block was removed, so that only the list's length tells the models apart."""
    pruned = llama().model
    structure = TransformersStructure(pruned, kinds) if kinds else TransformersStructure(pruned)
    gone = {group.name: torch.arange(group.size // 2) for group in structure.groups if "layers.0" in group.name}
    structure.remove(gone | ({"model.layers.1": torch.tensor([0])} if kinds else {}))
    structure.compact()
    structure.plan.save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.depth.lists["model.layers"].size == 2
    config = copy.deepcopy(llama().model.config)
    config.num_hidden_layers = 4
    config.layer_types = None
    with pytest.raises(PlanError, match=r"^model\.layers: the plan was made for 2 blocks where the model has 4"):
        plan.apply(type(pruned)(config))
    plan.apply(llama().model)


def test_plans_are_put_together_only_if_they_follow_each_other() -> None:
    kept = torch.tensor([0, 2, 5])
    first = PruningPlan({"0": Kept(kept, out_size=6), "1": Kept(None, kept, in_repeat=2, in_size=12)})
    then = {"0": Kept(torch.tensor([1, 2]), out_size=3), "1": Kept(None, torch.tensor([1, 2]), 2, in_size=6)}
    both = PruningPlan(then).after(first)
    assert (both["0"].out_channels.tolist(), both["0"].out_size) == ([2, 5], 6)
    assert (both["1"].in_channels.tolist(), both["1"].in_repeat, both["1"].in_size) == ([2, 5], 2, 12)
    for layer, entry, message in (
        ("0", replace(then["0"], out_size=6), "made for 6 out channels, but the earlier plan leaves 3; pass the plan"),
        ("1", replace(then["1"], in_size=12), "made for 12 in channels, but the earlier plan leaves 6"),
        ("0", Kept(torch.tensor([3])), "made for at least 4 out channels, but the earlier plan leaves 3"),
    ):
        with pytest.raises(PlanError, match=f"^{layer}: this plan was {message}"):
            PruningPlan({layer: entry}).after(first)
    unknown = PruningPlan({"0": Kept(kept)})
    assert PruningPlan({"0": then["0"]}).after(unknown)["0"].out_size is None  # not 3, which the first step left
    untouched = PruningPlan({"2": Kept(kept, out_size=6)}).after(first)["2"]
    assert (untouched.out_channels.tolist(), untouched.out_size) == ([0, 2, 5], 6)


def test_depths_are_put_together_only_if_they_follow_each_other() -> None:
    two, three = ({"layers": {"size": size, "removed": [1], "outputs": 0}} for size in (2, 3))
    first, good, bad = (PruningPlan(depth=built({"lists": lists}, Depth)) for lists in (three, two, three))
    assert good.after(first).depth.lists["layers"].removed == (1, 2)
    with pytest.raises(PlanError, match=r"^layers: this plan was made for 3 blocks, but the earlier plan leaves 2"):
        bad.after(first)


OLD = """{"format": "obc.PruningPlan", "version": 1, "layers": {
    "0": {"out_channels": [0, 2], "in_channels": null, "in_repeat": 1, "out_blocks": 1, "dim": null, "in_dim": null},
    "2": {"out_channels": null, "in_channels": [0, 2], "in_repeat": 1, "out_blocks": 1, "dim": null, "in_dim": null}
}}"""


def test_files_from_before_the_sizes_were_recorded_still_work(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(OLD)
    old = PruningPlan.load(tmp_path / "plan.json")
    by_hand = PruningPlan({"0": Kept(torch.tensor([0, 2])), "2": Kept(in_channels=torch.tensor([0, 2]))})
    for width in (4, 6):  # without sizes nothing tells these apart
        model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
        weights = copy.deepcopy(model.state_dict())
        for plan in (old, by_hand):
            pruned = plan.apply(copy.deepcopy(model))
            assert torch.equal(pruned[0].weight, model[0].weight[[0, 2]])
            plan.verify(weights, pruned)
    old.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(OLD)  # what an older obc reads


def test_sizes_and_lengths_are_in_the_file(tmp_path: Path) -> None:
    plan = half(TorchPruningStructure(Deep(2, nn.ModuleList), torch.randn(2, 4)))
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["layers"]["blocks.0.0"]["out_size"] == content["layers"]["blocks.0.2"]["in_size"] == 8
    assert content["depth"]["lists"] == {"blocks": {"size": 2, "removed": [], "outputs": 0}}
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded.depth == plan.depth
    assert {name: vars(kept)["out_size"] for name, kept in loaded.items()} == {
        name: kept.out_size for name, kept in plan.items()
    }
    for wrong in (0, -1, 2.5, "8", True, 7):  # one channel below the last kept one, at most
        content["layers"]["blocks.0.0"] |= {"out_channels": [1, 7], "out_size": wrong}
        (tmp_path / "plan.json").write_text(json.dumps(content))
        with pytest.raises(PlanError, match="damaged pruning plan: out_size must be"):
            PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("size", [0, 2, 3.0, True])
def test_an_impossible_size_is_refused(size: object) -> None:
    for fields in ({"out_channels": torch.tensor([0, 2]), "out_size": size}, {"in_size": size}):
        if fields.get("in_size") != 2:
            with pytest.raises(PlanError, match=r"_size must be the number of channels before pruning, at least \d"):
                Kept(**fields)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_save_pruned_refuses_the_second_plan_alone(family: str, tmp_path: Path) -> None:
    """Counts alone would fit: the second step pruned every layer that the first one did."""
    case = FAMILIES[family]()
    original, plans = FAMILIES[family]().model.state_dict(), []
    for removed in ([0, 5], [1]):
        structure = TransformersStructure(case.model, ("ffn",))
        structure.remove(
            {group.name: torch.tensor(removed[: 2 - place % 2]) for place, group in enumerate(structure.groups)}
        )
        plans.append(structure.plan)
    with pytest.raises(PlanError, match=r"keeps \d+ of \d+ (out|in) channels, but the config says \d+; .*plan\.after"):
        save_pruned(case.model, plans[1], tmp_path)
    assert not list(tmp_path.iterdir())
    both = plans[1].after(plans[0])
    both.verify(original, case.model)
    save_pruned(case.model, both, tmp_path)
    assert torch.equal(output(case, load_pruned(tmp_path)), output(case, case.model))
    plans[1].save(tmp_path / "obc_plan.json")
    with pytest.raises(PlanError, match=r"keeps \d+ of \d+ (out|in) channels, but the config says"):
        load_pruned(tmp_path)
