"""Memory budgets: against the bytes of real state dicts and of the caches that transformers fill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers_families import FAMILIES, qwen2_moe

import obc
from obc.structures.memory import MemoryUse
from obc.structures.traced import TorchPruningStructure
from obc.structures.transformers import TransformersStructure


def saved_bytes(model: nn.Module, itemsize: int | None = None) -> int:
    """Bytes of the state dict; tensors that share their memory count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(
        tensor.numel() * (itemsize if itemsize and tensor.is_floating_point() else tensor.element_size())
        for tensor in tensors.values()
    )


def cache_bytes(model: Any, batch: int, length: int) -> int:
    """Bytes of the keys and values that the model keeps."""
    tokens = torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)


def halves(structure: Any) -> dict[str, Tensor]:
    least = structure.limits.min_units
    return {
        group.name: torch.arange(min(group.size // 2, group.size - least.get(group.name, 1)))
        for group in structure.groups
        if not group.is_depth
    }


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise, self.slopes = nn.Conv2d(16, 16, 3, groups=16), nn.PReLU(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.slopes(self.depthwise(self.norm(self.stem(x)).relu())).mean((2, 3)))


def test_what_no_group_changes_stays_the_same_down_to_one_channel() -> None:
    model = Net().eval()
    structure = TorchPruningStructure(model, torch.randn(2, 3, 8, 8))
    for width in (16, 1):
        structure.remove({"stem": torch.arange(16 - width)})
        assert structure.costs("parameters").constant == 10  # the head's bias
        assert structure.memory(MemoryUse()).constant == 4 * 10 + 8  # and the norm's count of batches


def test_weights_and_running_statistics_of_a_traced_model() -> None:
    model = Net().eval()
    structure = TorchPruningStructure(model, torch.randn(2, 3, 8, 8))
    for _ in range(2):
        assert structure.memory(MemoryUse()).total() == saved_bytes(model)
        assert structure.memory(MemoryUse(dtype=torch.float16)).total() == saved_bytes(model, 2)
        structure.remove({group.name: torch.arange(group.size // 2) for group in structure.groups})
    with pytest.raises(ValueError, match=r"cache of 8 tokens is known of transformers models.*length=0"):
        structure.memory(MemoryUse(length=8))


@pytest.mark.parametrize("family", ["llama", "gpt2", "moe", "opt"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_and_cache_of_a_language_model(family: str) -> None:
    case = qwen2_moe() if family == "moe" else FAMILIES[family]()
    structure = TransformersStructure(case.model)
    use = MemoryUse(length=7, batch=3)
    for _ in range(2):
        assert structure.memory(MemoryUse()).total() == saved_bytes(case.model)
        expected = saved_bytes(case.model) + cache_bytes(case.model, 3, 7)
        assert structure.memory(use).total() == expected
        half = MemoryUse(length=7, batch=3, dtype=torch.bfloat16)
        assert structure.memory(half).total() == saved_bytes(case.model, 2) + cache_bytes(case.model, 3, 7) / 2
        structure.remove(halves(structure))


def test_what_a_unit_frees() -> None:
    """Heads free their cache; channels of feed-forward blocks free weights alone."""
    case = FAMILIES["llama"]()
    structure = TransformersStructure(case.model)
    short, long = (structure.memory(MemoryUse(length=length)) for length in (0, 100))
    for group, less, more in zip(structure.groups, short.marginal(), long.marginal(), strict=True):
        width = case.model.config.head_dim or 0
        assert more - less == (2 * width * 100 * 4 if group.kind == "heads" else 0)


def test_whole_blocks_and_branches_free_their_cache() -> None:
    case = FAMILIES["llama"]()
    structure = TransformersStructure(case.model, ["ffn", "heads", "layers", "sublayers"])
    use = MemoryUse(length=9)
    assert structure.memory(use).total() == saved_bytes(case.model) + cache_bytes(case.model, 1, 9)
    structure.remove({"model.layers.1": torch.tensor([0])})
    assert structure.memory(use).total() == saved_bytes(case.model) + cache_bytes(case.model, 1, 9)
    structure.remove({"model.layers.0.self_attn": torch.tensor([0])})
    assert structure.memory(use).total() == saved_bytes(case.model)


def test_a_sliding_window_keeps_no_more_than_the_window() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=31, num_key_value_heads=2, sliding_window=6, **sizes)
    model = MistralForCausalLM(config).eval()
    structure = TransformersStructure(model)
    for length in (4, 6, 20):
        expected = saved_bytes(model) + cache_bytes(model, 1, length)
        assert structure.memory(MemoryUse(length=length)).total() == expected


def test_models_without_such_a_cache_are_refused() -> None:
    structure = TransformersStructure(FAMILIES["vit"]().model)
    assert structure.memory(MemoryUse()).total() == saved_bytes(structure.model)
    with pytest.raises(obc.PruningError, match=r"(?s)cache.*length=0"):
        structure.memory(MemoryUse(length=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": -1}, "length of MemoryUse must be an integer of at least 0, got -1"),
        ({"batch": 0}, "batch of MemoryUse must be an integer of at least 1, got 0"),
        ({"dtype": torch.int8}, "must be a floating one"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryUse(**options)
