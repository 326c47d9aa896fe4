"""The Python blocks of the pages run, in order, in one namespace a page."""

from __future__ import annotations

import copy
import importlib
import re
import sys
import types
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_seconds import counted_seconds
from torch import nn

import obc
from obc.structures.transformers import TransformersStructure

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of its first statement, source) of every fenced Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: found.start(1)].count("\n") + 1, found[1]) for found in _BLOCK.finditer(text)]


def run(page: Path, namespace: dict[str, Any]) -> None:
    for line, source in blocks(page):
        # Blank lines before the block: an error names the line of the page.
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tutorials/cnn", marks=pytest.mark.slow),
        *("tutorials/llm", "tutorials/recovery", "tutorials/own_loop"),
        *("statistics", "extending/criterion", "extending/transformer_family"),
    ],
)
def test_the_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # tutorials write files
    registry: Any = importlib.import_module("obc.criteria.registry")
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))  # a page registers a criterion
    page = ROOT / "docs" / f"{name}.md"
    assert len(blocks(page)) >= 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows are asked for, so that the test is short
        module = types.ModuleType("tutorial")  # so that its classes can be pickled
        monkeypatch.setitem(sys.modules, "tutorial", module)
        run(page, vars(module))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1, self.head = nn.Conv2d(3, 8, 3), nn.Sequential(_Block(), _Block()), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer1(self.stem(x)).mean((2, 3)))


def _given() -> dict[str, Any]:
    """What the pages on a network of convolutions speak of without making it."""
    torch.manual_seed(0)
    model = _Network().eval()
    batches = [(torch.randn(4, 3, 10, 10), torch.randint(0, 10, (4,))) for _ in range(10)]
    given = {"torch": torch, "obc": obc, "copy": copy, "model": model, "batches": batches, "original": model}
    given |= {"build_model": lambda: _Network().eval(), "layer": model.layer1[0].conv1}
    given["example_inputs"] = batches[0][0][:1]
    given["loss_fn"] = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    return given


@pytest.mark.parametrize("name", ["pruning", "scoring", "recovery", "torch_pruning"])
def test_a_guide_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, given the network and batches that it speaks of, as they were before earlier blocks changed them."""
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / f"{name}.md"
    namespace = _given()
    if name == "recovery":
        pruned, first = copy.deepcopy(namespace["model"]), namespace["batches"]
        namespace["plan"] = obc.prune(
            pruned, namespace["example_inputs"], first, namespace["loss_fn"], steps=1, progress=False
        ).plan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows are asked for, so that the test is short
        for line, source in blocks(page):
            if name == "recovery":
                namespace["pruned"] = copy.deepcopy(pruned)
            elif name == "pruning":
                namespace["model"] = _given()["model"]
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)


def _vision_language_model() -> Any:
    transformers = importlib.import_module("transformers")
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    vision_config = transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=16)
    config = transformers.LlavaConfig(vision_config=vision_config, text_config=text, image_token_index=60)
    return transformers.LlavaForConditionalGeneration(config).eval()


def _on_transformers(folder: Path) -> dict[str, Any]:
    """What the pages on transformers models speak of without making it."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=3)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": tokens} for tokens in torch.randint(0, 60, (16, 12)).split(2)]
    given = {"torch": torch, "obc": obc, "model": model, "batches": batches, "batch": batches[0], "path": folder}
    given |= {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "BitsAndBytesConfig")}
    given |= {"TransformersStructure": TransformersStructure, "folder": folder}
    given["loss_fn"] = lambda model, batch: model(**batch).logits.float().square().mean()
    return given


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("name", ["transformers", "large_models", "stored_models"])
def test_a_guide_on_transformers_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block; what it saves by ``save_pretrained``, ``from_pretrained`` loads."""
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")
    from gguf_files import write

    monkeypatch.chdir(tmp_path)
    namespace = _on_transformers(tmp_path)
    namespace["model"].save_pretrained(tmp_path)
    write(namespace["model"], tmp_path / "model-q4_0.gguf")
    saved = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows are asked for, so that the test is short
        for line, source in blocks(ROOT / "docs" / f"{name}.md"):
            fresh = _on_transformers(tmp_path)
            namespace["loss_fn"], namespace["batches"] = fresh["loss_fn"], fresh["batches"]
            if name == "transformers":
                namespace["scores"] = obc.score(fresh["model"], fresh["batches"], fresh["loss_fn"], progress=False)
                namespace["model"] = fresh["model"]
            elif "merge_and_unload" in source:
                peft = pytest.importorskip("peft", reason="peft is missing: pip install peft")
                namespace["model"] = peft.get_peft_model(fresh["model"], peft.LoraConfig(target_modules="all-linear"))
            elif "vision_tower" in source:
                namespace["model"] = _vision_language_model()
                tokens, image = torch.tensor([[5, 7, *[60] * 4, 9, 11]]), torch.randn(1, 3, 16, 16)
                namespace["batches"] = [{"input_ids": tokens, "pixel_values": image}] * 8
            exec(compile("\n" * (line - 1) + source, str(ROOT / "docs" / f"{name}.md"), "exec"), namespace)
            if "model.save_pretrained(" in source:
                model, batch = namespace["model"], namespace["batches"][0]
                again = type(model).from_pretrained("pruned", dtype=model.dtype).eval()
                assert torch.equal(again(**batch).logits, model(**batch).logits)
                saved += 1
    assert saved == {"transformers": 1, "large_models": 0, "stored_models": 2}[name]
    assert transformers.AutoConfig.from_pretrained(tmp_path).intermediate_size == 256


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, given the model and the batches that they speak of."""
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")
    from obc.integrations.transformers import load_pruned

    monkeypatch.chdir(tmp_path)
    prune, score, formula, language_model = (
        compile(code, "README.md", "exec") for _, code in blocks(ROOT / "README.md")
    )
    network = _Network().eval()
    batches = [(torch.randn(4, 3, 10, 10), torch.randint(0, 10, (4,))) for _ in range(10)]
    before = sum(parameter.numel() for parameter in network.parameters())
    given: dict[str, Any] = {"torch": torch, "model": network, "batches": batches, "example_inputs": batches[0][0]}
    exec(prune, given)
    assert sum(parameter.numel() for parameter in network.parameters()) < before
    exec(score, given)
    given["layer"] = network.get_submodule("layer1.0.conv1")
    exec(formula, given)
    torch.testing.assert_close(given["S"], given["scores"]["layer1.0.conv1"].out_channels, rtol=1e-3, atol=1e-9)

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    given["model"] = transformers.LlamaForCausalLM(config).eval()
    given["batches"] = [{"input_ids": torch.randint(0, 64, (2, 12))} for _ in range(8)]
    before = given["model"].num_parameters()
    exec(language_model, given)
    again = load_pruned("pruned")
    assert again.num_parameters() < before
    assert torch.equal(again(**given["batches"][0]).logits, given["model"](**given["batches"][0]).logits)


def test_the_page_on_budgets_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, given the models and batches that they speak of, and a timer that counts."""
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("obc.structures.latency._median", counted_seconds)
    tokens = [torch.randint(20, (2, 8)) for _ in range(6)]

    def language_model() -> dict[str, Any]:
        sizes = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=20, num_hidden_layers=3, **sizes)
        model = transformers.LlamaForCausalLM(config).eval()
        return {
            "model": model,
            "structure": TransformersStructure(model),
            "batch": {"input_ids": tokens[0]},
            "batches": tokens,
            "loss_fn": lambda model, batch: model(input_ids=batch, labels=batch).loss,
        }

    images = [(torch.randn(4, 3, 10, 10), torch.randint(0, 10, (4,))) for _ in range(10)]
    channels = (3, 32, 32, 32, 10)
    layers = [part for pair in pairwise(channels) for part in (nn.Conv2d(*pair, 3, padding=1), nn.ReLU())]
    network = {
        "model": nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(),
        "example_inputs": images[0][0],
        "batches": images,
        "loss_fn": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    }
    found = blocks(ROOT / "docs" / "budgets.md")
    assert len(found) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (_, code), given in zip(found, (language_model(), network, language_model()), strict=True):
            exec(compile(code, "budgets.md", "exec"), {"obc": obc, **given})
