"""Collection block by block: the sums of a run of the whole model, with one block's weights present at a time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import collected
import models
import pytest
import torch
import transformers_families as families
from safetensors.torch import save_file
from torch import Tensor, nn

import obc
from obc.statistics import Blocks, ByBlock, Gram, StatisticsError, memory, memory_estimate, residual_blocks
from obc.statistics.checkpoint import StatisticsCheckpoint
from obc.statistics.run import collect
from obc.statistics.sums import Sums

FAMILIES = ["mixtral", "qwen2-moe", "deepseek-v2", "opt"]
CASES: dict[str, Any] = {
    "llama": models.llama,
    "gemma": models.gemma,
    "gpt2": models.gpt2,
    "vit": models.vit,
    **{name: families.FAMILIES[name] for name in FAMILIES},
}


def forward(model: nn.Module, batch: Any) -> Any:
    return collected.forward(model, batch)


def names_of(name: str) -> list[str]:
    experts = ["experts"] if name in ("mixtral", "qwen2-moe", "deepseek-v2") else []
    return ["moments", "gram", "blocks", *experts]


def assert_same(one: obc.Statistics, other: obc.Statistics) -> None:
    assert one.collected == other.collected
    for name in one.collected:
        collected.assert_same(one, other, name, exact=False)
    assert one.coverage == other.coverage
    assert one.num_batches == other.num_batches


@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_the_whole_model(name: str) -> None:
    case = CASES[name]()
    before = [id(parameter) for parameter in case.model.parameters()]
    whole = collect(case.model, case.batches, statistics=names_of(name), forward_fn=forward)
    blocks = collect(case.model, iter(case.batches), statistics=names_of(name), forward_fn=forward, by_block=True)
    assert_same(blocks, whole)
    assert [id(parameter) for parameter in case.model.parameters()] == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in case.model.modules())


@pytest.mark.parametrize("states", ["host", "disk"])
def test_windows_micro_batches_and_states_on_disk(states: str, tmp_path: Path) -> None:
    case = models.seeded(lambda: _deep_llama())
    batches = [torch.randint(31, (4, 8)) for _ in range(3)]
    options = ByBlock(states=tmp_path if states == "disk" else "host")
    for statistics in ([Blocks(span=2)], [Blocks(span=3, tokens="last")], ["gram", Blocks(entropy_bins=8)]):
        whole = collect(case, batches, statistics=statistics, micro_batch=3)
        assert_same(collect(case, batches, statistics=statistics, micro_batch=3, by_block=options), whole)
    assert not list(tmp_path.iterdir())


def _deep_llama() -> nn.Module:
    import transformers

    sizes = dict(families._SIZES) | {"num_hidden_layers": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_padding_is_left_out(name: str) -> None:
    case = CASES[name]()
    lengths = torch.tensor([3, 8, 5, 1])
    mask = torch.arange(8) < lengths[:, None]
    padded = [{"input_ids": tokens[:4, :8].where(mask, 7), "attention_mask": mask.long()} for tokens in case.batches]
    whole = collect(case.model, padded, statistics=names_of(name))
    assert_same(collect(case.model, padded, statistics=names_of(name), by_block=True), whole)
    for found in whole.moments.values():
        assert found.count <= 3 * int(mask.sum())


def test_groups_limit_what_is_read() -> None:
    case = models.llama()
    groups = obc.transformer_groups(case.model, ["ffn"])
    got = collect(case.model, case.batches, statistics=["moments", "gram"], groups=groups, by_block=True)
    assert set(got.moments) == set(got.gram) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert_same(got, collect(case.model, case.batches, statistics=["moments", "gram"], groups=groups))


class Present:
    """Hooks in every module without children that note how many bytes of parameters are not on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.most = model, 0
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: Any) -> None:
        present = {p.data_ptr(): p.nbytes for p in self.model.parameters() if not p.is_meta}
        self.most = max(self.most, sum(present.values()))


def test_gram_matrices_get_the_memory_of_weights_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where sums are next to weights: what the refusal offers is enough, and the sums are the same."""
    model = models.seeded(_deep_llama)
    batches = [torch.randint(31, (4, 8)) for _ in range(3)]
    whole = collect(model, batches, statistics="gram")
    sums = memory_estimate(model, "gram")["gram"]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    held: list[nn.Module] = [model]

    def free(device: torch.device) -> int:
        return weights + sums * 3 // 5 - sum(p.nbytes for p in held[0].parameters() if p.device == device)

    monkeypatch.setattr(memory, "free_bytes", free)
    offered = r"put the model on the meta device and pass by_block=ByBlock\(weights=\.\.\., states=\.\.\.\)"
    for by_block in (False, True):
        with pytest.raises(StatisticsError, match=offered):
            collect(model, batches, statistics="gram", by_block=by_block)
    tensors = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    save_file(tensors, tmp_path / "weights.safetensors")
    held[0] = meta = copy.deepcopy(model).to("meta")
    options = ByBlock(device="cpu", weights=tmp_path, states=tmp_path)
    assert_same(collect(meta, batches, statistics="gram", by_block=options), whole)


def test_weights_from_files_are_present_one_block_at_a_time(tmp_path: Path) -> None:
    """A model without weights, and its weights in two files: as one that is larger than memory."""
    real = models.seeded(_deep_llama)
    batches = [torch.randint(31, (4, 8)) for _ in range(3)]
    tensors = {name: tensor.clone() for name, tensor in real.state_dict().items()}
    early = {name: tensor for name, tensor in tensors.items() if ".0." in name or ".1." in name}
    save_file(early, tmp_path / "model-1.safetensors")
    save_file({name: tensors[name] for name in tensors.keys() - early.keys()}, tmp_path / "model-2.safetensors")
    hollow = copy.deepcopy(real)
    for module in hollow.modules():
        for key, parameter in module._parameters.items():
            module._parameters[key] = None if parameter is None else nn.Parameter(parameter.to("meta"))
    present = Present(hollow)
    statistics = ["moments", "gram", "blocks"]
    got = collect(hollow, batches, statistics=statistics, by_block=ByBlock(weights=tmp_path))
    assert_same(got, collect(real, batches, statistics=statistics))
    assert all(parameter.is_meta for parameter in hollow.parameters())
    block_bytes = sum(p.nbytes for p in real.get_submodule("model.layers.0").parameters())
    outside = sum(p.nbytes for name, p in real.named_parameters() if "layers" not in name)
    assert present.most == outside + block_bytes
    stated = memory_estimate(hollow, statistics, by_block=ByBlock(weights=tmp_path))["weights"]
    assert stated == pytest.approx(outside + block_bytes, rel=0.01), "buffers aside"
    assert sum(p.nbytes for p in real.parameters()) > 2 * block_bytes + outside


def test_products_of_one_block_at_a_time_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    case, commit = models.llama(), Sums.commit
    held: list[int] = []

    def noting(self: Sums, batch: int) -> None:
        commit(self, batch)
        held.append(sum(spare.nbytes for spare in self._spare))

    monkeypatch.setattr(Sums, "commit", noting)
    collect(case.model, case.batches, statistics="gram", forward_fn=forward, by_block=True)
    config = case.model.config
    # What query, key and value read is one product, and what gate and up read is another.
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    block_bytes = 4 * (2 * width**2 + heads**2 + config.intermediate_size**2)
    assert held == [size for size in [block_bytes, block_bytes, 4 * width**2] for _ in case.batches]


def test_weights_that_are_missing_are_named_before_anything_runs(tmp_path: Path) -> None:
    real = models.seeded(_deep_llama)
    hollow = copy.deepcopy(real).to("meta")
    batches = [torch.randint(31, (2, 8))]
    with pytest.raises(StatisticsError, match=r"is on the meta device: pass ByBlock\(weights="):
        collect(hollow, batches, statistics="gram", by_block=True)
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(StatisticsError, match="is on the meta device: the files have no tensor of that name"):
        collect(hollow, batches, statistics="gram", by_block=ByBlock(weights=tmp_path))
    hollow.model.norm.weight = nn.Parameter(torch.ones(33, device="meta"))
    tensors = dict(real.state_dict())
    tensors |= dict(real.named_buffers())
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(StatisticsError, match=r"'model.norm.weight' of shape \(32,\), the model \(33,\)"):
        collect(hollow, batches, statistics="gram", by_block=ByBlock(weights=tmp_path))


class Shared(nn.Module):
    """The second block adds a further output of the first one, as with T5's position bias."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            bias = self.inner(x).sin() if bias is None else bias
            return x + bias, bias

    def __init__(self, passes: bool, changes: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(3)])
        self.passes, self.changes, self.twice = passes, changes, twice

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in [*self.blocks, *([self.blocks[0]] if self.twice else [])]:
            x, made = block(x, bias)
            bias = made if self.passes else None
            x = x * 2 if self.changes else x
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Shared(passes=True), "'blocks.1', run alone, does not return what it returns inside the model"),
        (lambda: Shared(False, changes=True), "changes what 'blocks.0' returns before it reaches 'blocks.1'"),
        (lambda: Shared(False, twice=True), "'blocks.0' runs more than once"),
    ],
)
def test_blocks_that_are_no_chain_are_refused(model: Any, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(StatisticsError, match=message):
        collect(model(), [torch.randn(2, 3, 4)], statistics="moments", by_block=True)


def test_tuples_of_blocks_are_handed_on() -> None:
    torch.manual_seed(0)
    model, batches = Shared(False), [torch.randn(2, 3, 4) for _ in range(2)]
    whole = collect(model, batches, statistics=["moments", "blocks"])
    assert_same(collect(model, batches, statistics=["moments", "blocks"], by_block=True), whole)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_run_that_was_stopped_goes_on(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.seeded(_deep_llama)
    batches = [torch.randint(31, (4, 8)) for _ in range(2)]
    whole = collect(model, batches, statistics=["moments", "blocks"], by_block=True)
    save, count = StatisticsCheckpoint.save, itertools.count()

    def stopping(self: Any, progress: Any) -> None:
        save(self, progress)
        if next(count) == place:
            raise KilledError

    path = tmp_path / "state"
    monkeypatch.setattr(StatisticsCheckpoint, "save", stopping)
    with pytest.raises(KilledError):
        collect(model, batches, statistics=["moments", "blocks"], by_block=True, checkpoint=path)
    monkeypatch.undo()
    again = collect(model, batches, statistics=["moments", "blocks"], by_block=True, checkpoint=path)
    for name in again.collected:
        collected.assert_same(again, whole, name)
    assert not path.exists()


def test_a_batch_that_is_not_finite_is_named() -> None:
    model = models.seeded(_deep_llama)
    model.lm_head.weight.data.fill_(1.0)
    embedding = model.model.embed_tokens.weight.data
    embedding[3] = float("nan")
    batches = [torch.full((2, 4), 5), torch.full((2, 4), 3)]
    with pytest.warns(UserWarning, match="batch 1: moments of .* is not finite"):
        got = collect(model, batches, statistics="moments", by_block=True)
    assert all(found.count == 8 for found in got.moments.values())


def no_batches() -> Iterator[Any]:
    yield from ()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "needs a loss": ({"statistics": "rows"}, "'rows' needs gradients"),
    "gradients": ({"statistics": "gradient_moments"}, "'gradient_moments' needs gradients"),
    "no options": ({"by_block": "cuda"}, "by_block must be a bool or obc.statistics.ByBlock"),
    "unknown block": ({"by_block": ByBlock(blocks=["x"])}, "no module 'x'"),
    "nested": ({"by_block": ByBlock(blocks=["model.layers.0", "model.layers.0.mlp"])}, "is inside"),
    "no folder": ({"by_block": ByBlock(states="/nowhere/at/all")}, "a folder that exists"),
    "no weights": ({"by_block": ByBlock(weights="/nowhere/at/all")}, "no file or folder"),
    "window": (
        {"statistics": [Blocks(span=2, modules=["model.layers.0.mlp", "model.layers.1"])]},
        "outside the blocks",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused(name: str) -> None:
    case = models.llama()
    options, message = REFUSED[name]
    with pytest.raises(StatisticsError, match=message):
        collect(case.model, case.batches, case.loss, **{"statistics": "gram", "by_block": True, **options})


def test_what_it_can_not_be_had_of() -> None:
    with pytest.raises(StatisticsError, match="no residual blocks were found"):
        collect(nn.Sequential(nn.Linear(3, 3)), [torch.ones(2, 3)], statistics="gram", by_block=True)
    case = models.llama()
    with pytest.raises(StatisticsError, match="batches is empty"):
        collect(case.model, no_batches(), statistics="gram", by_block=True)
    assert residual_blocks(case.model) == ByBlock().names(case.model)


def test_gram_weights_reach_experts() -> None:
    case = families.FAMILIES["mixtral"]()
    batches = [{"input_ids": tokens, "omega": torch.rand(tokens.shape)} for tokens in case.batches]
    options: dict[str, Any] = {
        "statistics": [Gram(weight=lambda batch: batch["omega"])],
        "forward_fn": lambda model, batch: model(batch["input_ids"]),
    }
    whole = collect(case.model, batches, **options)
    assert_same(collect(case.model, batches, **options, by_block=True), whole)
    experts = [found.count for name, found in whole.gram.items() if name.startswith("model.layers.0.mlp.experts[")]
    assert sum(experts) == pytest.approx(2 * sum(float(batch["omega"].sum()) for batch in batches), rel=1e-5)
