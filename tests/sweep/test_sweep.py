"""A part of the sweep over the model types of the transformers library: what the committed table says is found.

``make sweep`` runs all of it, and writes the table.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")

from sweep_model import Found, built, examine, model_types  # noqa: E402
from sweep_table import TITLES, counts, table  # noqa: E402
from transformers_families import FAMILIES as TINY  # noqa: E402
from transformers_families import speech_encoder  # noqa: E402

from obc.structures.transformers import TransformersStructure  # noqa: E402
from obc.structures.transformers.family import FAMILIES, Family  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "transformers_models.md"
CHOSEN = {
    "causal": (
        "afmoe bamba bloom cpmant ctrl deepseek_v3 falcon falcon_mamba gemma4_text gpt2 gpt_oss inkling_text jetmoe "
        "llama longcat_flash mamba mixtral modernbert-decoder olmo2 opt phi3 qwen3_next recurrent_gemma rwkv xlstm "
        "zamba zaya"
    ),
    "masked": "albert bert deberta funnel luke nystromformer",
    "seq2seq": "bart bigbird_pegasus switch_transformers t5",
    "image": "beit dinov2 mobilevit pvt siglip2 swin swinv2",
    "image-text": "aria blip gemma3 got_ocr2 qwen2_5_vl",
}
OWN = tuple(FAMILIES)  # those of obc: the pages whose examples register others have not run yet
JOBS = [(task, name) for task, names in CHOSEN.items() for name in names.split()]
# One of each kind of layers: feed-forward, experts, recurrent layers, encoder and decoder, pictures.
QUICK = {
    "causal": "afmoe bloom deepseek_v3 falcon_mamba gpt2 gpt_oss llama mixtral qwen3_next rwkv zamba",
    "masked": "bert deberta",
    "seq2seq": "bart t5",
    "image": "beit swin",
    "image-text": "blip gemma3",
}


def rows() -> dict[tuple[str, str], tuple[Counter[str], str]]:
    """(task, model type) -> (kind -> exact groups, the whole row) of the committed table."""
    found: dict[tuple[str, str], tuple[Counter[str], str]] = {}
    task = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            task = next(key for key, title in TITLES.items() if title == line.removeprefix("## "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if task and len(cells) == 5 and cells[0] not in ("model type", "---"):
            exact = re.findall(r"(?<!not run: )\b(\d+) (\w+)", cells[1])
            found[task, cells[0]] = Counter({kind: int(count) for count, kind in exact}), line
    return found


@pytest.mark.sampled(members=7)
@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        pytest.param(task, name, marks=[] if name in QUICK[task].split() else [pytest.mark.slow], id=f"{task}-{name}")
        for task, name in JOBS
    ],
)
def test_a_model_type_is_pruned_exactly_and_as_the_table_says(task: str, model_type: str) -> None:
    found = examine(task, model_type)
    assert found is not None
    assert not found.built
    assert not found.wrong
    committed, _ = rows().get((task, model_type), (Counter(), ""))
    assert not committed - Counter(found.kinds)  # no group of the table is missing; additional groups are accepted


def test_the_table_has_every_model_type_and_nothing_that_is_wrong() -> None:
    committed = rows()
    tasks = {task for task, _ in committed}
    assert {"causal", "masked", "seq2seq"} <= tasks
    if f"Version {transformers.__version__} of" in PAGE.read_text():
        assert set(committed) == {(task, name) for task in tasks for name in model_types(task)}
    assert not [row for _, row in committed.values() if "WRONG" in row]


def test_a_table_counts_what_is_found() -> None:
    found = [
        Found("causal", "a", kinds={"heads": 2, "ffn": 2}, error=1e-15),
        Found("causal", "b", kinds={"ffn": 1}, left_out={"layers.3.attn is | odd": 1}, unproved={"heads": 1}),
        Found("causal", "c", built="no such layer"),
        Found("causal", "d", wrong="it differs"),
        Found("causal", "e", kinds={"mamba": 2}),
    ]
    assert counts(found) == (
        "5 model types: 4 built, of which 3 have groups that are exact, 2 of them in attention (or another mixer) and "
        "in feed-forward blocks; 1 wrong, 1 not built."
    )
    lines = table(found).splitlines()
    assert "| a | 2 ffn, 2 heads | 1e-15 |  |  |" in lines
    assert "| b | 1 ffn, not run: 1 heads |  | layers.N.attn is / odd |  |" in lines
    assert "| c |  |  |  | no such layer |" in lines
    assert "| d |  |  | WRONG: it differs |  |" in lines


# Of families that none of the jobs needs.
FURTHER = [
    ("causal", "codegen"),
    ("masked", "convbert"),
    ("masked", "deberta-v2"),
    ("image", "efficientnet"),
    ("causal", "doge"),
    ("causal", "gemma3n_text"),
    ("causal", "gpt_bigcode"),
    ("seq2seq", "granite_speech"),
    ("causal", "granitemoeshared"),
    ("causal", "lfm2"),
    ("causal", "minimax"),
    ("causal", "moshi"),
]


class GatedByNumbers(nn.Module):
    """The feed-forward block of Mixtral's own code and of InternLM 2, which the library has under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class OfMetasCode(nn.Module):
    """The layers and attributes of attention in Meta's Llama, which the library has under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.n_local_heads, self.n_local_kv_heads, self.head_dim = 4, 2, 6
        self.wq, self.wk, self.wv = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12)
        self.wo = nn.Linear(24, 8)


def _found(model: nn.Module) -> Any:
    structure = TransformersStructure(model)
    slices = [(part.module, part.side, part.channels.tolist()) for group in structure.groups for part in group.slices]
    return slices, dict(structure.left_out)


@pytest.mark.slow
def test_every_family_finds_something_in_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it did not describe its layers, other groups would be found in a model of the tests or of the sweep."""
    untried = set(OWN)
    tiny = (make().model for make in TINY.values())
    for model in itertools.chain(
        [GatedByNumbers(), OfMetasCode(), speech_encoder("Wav2Vec2"), speech_encoder("Wav2Vec2Conformer")],
        tiny,
        itertools.starmap(built, [*FURTHER, *JOBS]),
    ):
        expected = _found(model)
        for name in sorted(untried):
            with monkeypatch.context() as patch:
                patch.setitem(FAMILIES, name, Family(name, kinds=FAMILIES[name].kinds))
                if _found(model) != expected:
                    untried.remove(name)
        if not untried:
            return
    assert not untried, f"no tiny model needs the families {sorted(untried)}: add one to tests/transformers_families.py"
