"""Writes docs/criteria.md, the table of all criteria, from what they say about themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obc.criteria import CRITERIA
from obc.selection.allocations import ALLOCATIONS

PAGE = Path(__file__).parent / "criteria.md"

# System -> the criterion, and the options or allocation that correspond to it.
WITH_CRITERION: dict[str, tuple[str, str]] = {
    "Optimal Brain Connection": ("jacobian", ""),
    "NViT": ("nvit", ""),
    "FastOBA": ("fastoba", ""),
    "NIRVANA": ("nirvana", ""),
    "GAPrune": ("gaprune", ""),
    "JBR": ("jbr", ""),
    "LLM-Pruner, element": ("llm_pruner_element", ""),
    "LLM-Pruner, vector": ("llm_pruner_vector", ""),
    "SlimGPT": ("slimgpt", ""),
    "ZipLM": ("obs", ""),
    "FLAP": ("flap", '`compensate="mean"`'),
    "Wanda-sp": ("wanda_sp", ""),
    "Minitron": ("minitron", ""),
    "CFSP": ("cfsp", ""),
    "REAP": ("reap", ""),
    "EAN": ("expert_norm", ""),
    "Z-code": ("expert_frequency", ""),
    "Intra-Fusion": ("intra_fusion", '`compensate="fusion"`'),
    "ShortGPT": ("block_influence", ""),
    "FlexiGPT, selection": ("block_influence", ""),
    "Unreasonable ineffectiveness of the deeper layers": ("angular_distance", '`allocation="window"`'),
    "EntroDrop": ("entropy", ""),
    "Skrr, skipping": ("beam", ""),
    "PAGCP": ("tolerance", ""),
    "MultiPruner, BlockPruner": ("masked", "`rounds`"),
    "HierarchicalPrune": ("masked", ""),
    "Oracle pruning": ("masked", ""),
    "L1 filters": ("l1", ""),
    "Network Slimming": ("bn_scale", ""),
    "FPGM": ("fpgm", ""),
    "WHC": ("whc", ""),
}

# System without a criterion of its own -> (what works, what does not and why).
ELSEWHERE: dict[str, tuple[str, str]] = {
    "OBS-Diff": (
        "`obs` with `Gram(weight=...)`: one weight per step",
        "fusing the ranks of two attention streams",
    ),
    "DarwinLM": ('`obs`, with `allocation="search"` for its evolution', "fine-tuning of every candidate"),
    "Týr-the-Pruner": ('`OBS(first_order=True)`, `allocation="search"`', "its weighted error accumulation"),
    "HARP": ('`flap` with `compensate="mean"`', "attention layers replaced by scaled values: no unit for that"),
    "LOP": ("`minitron` or `cfsp` ranks as it does", "ratios by tree search and a predictor trained on them"),
    "SAAP": (
        "`llm_pruner_element` and `llm_pruner_vector`",
        "their fusion, whose variances are not published",
    ),
    "GETA, HESSO": ("rows give w · g per unit", "a saliency inside training, with shrinking and bit widths"),
    "HAP": ("`fastoba` is related by Hessian products", "Hutchinson's trace, and implants for removed units"),
    "Reassessing layer pruning": ('`block_influence`, `allocation="tail"`', "its perplexity without each layer"),
    "GPTailor": ("nothing", "merges layers of several fine-tuned variants"),
    "L³Prune": ("nothing", "reads a contrastive loss off every layer"),
    "COMP": (
        '`compensate="ls"` solves more than its mask tuning',
        "its metrics, which are not published in full",
    ),
    "DiEP, CoFi, SepPrune, LAPP, movement pruning": ("nothing", "masks that are learned in training"),
    "PQ index": ("any score", "an allocation from the norms' quotient of a group's scores"),
    "Pruner-Zero, SparseLLM": ("nothing", "published for single weights"),
    "MINI-LLM": ("nothing", "its formula is not published in full"),
}

_HEAD = """# Criteria

`obc.prune(criterion=NAME)`; options go to the object: `criterion=obc.criteria.SlimGPT(...)`. Notation for unit u of a
group: W is the weight of a consumer or producer, x the input of a consumer, g a gradient, r a row. The least
important unit has the lowest score. This page is written by `python docs/criteria_table.py`.

"needs": *weights* only; *forward* passes; *gradients* of any loss, also without labels; *labels*: published with a
loss on labels, but any loss works.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *([_cell(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _named(thing: Any) -> str:
    """The name that ``obc.prune`` takes."""
    if thing is None:
        return "-"
    names = {made: name for name, made in ALLOCATIONS.items()}
    return f"`{thing if isinstance(thing, str) else names[type(thing)]}`"


def _systems() -> list[list[str]]:
    """Every system that has a criterion: its name, and what that does not cover."""
    about = {criterion.name: criterion.about for criterion in CRITERIA}
    lines = []
    for system, (name, options) in WITH_CRITERION.items():
        said = about[name]
        assert said is not None
        works = f"`{name}`" + (f", {options}" if options else "")
        lines.append([system, works, said.missing or "-"])
    return lines


def page() -> str:
    """The text of the page."""
    known = [(criterion, criterion.about) for criterion in CRITERIA if criterion.about is not None]
    all_of_them = [
        [f"`{one.name}`", about.system, f"`{about.formula}`", about.passes, about.kinds] for one, about in known
    ]
    published = [
        [
            f"`{one.name}`",
            about.source,
            ", ".join(f"`{need if isinstance(need, str) else need.name}`" for need in one.needs) or "-",
            _named(one.allocation),
            _named(one.update),
        ]
        for one, about in known
    ]
    differs = [[f"`{one.name}`", about.differs or "-", about.missing or "-"] for one, about in known]
    differs = [line for line in differs if line[1:] != ["-", "-"]]
    parts = [
        _HEAD,
        _table(["name", "system", "score of a unit", "needs", "units"], all_of_them),
        "## Where they come from\n\n`obc.prune` uses the allocation that a criterion was published with,\n"
        "unless you pass `allocation`. It uses the published update only if you pass it: `compensate=UPDATE`.\n",
        _table(["name", "source", "statistics", "allocation", "update"], published),
        "## Where the published code differs, and what is not covered\n",
        _table(["name", "published code", "not covered"], differs),
        f"## Systems of the field\n\n{len(WITH_CRITERION)} have a criterion here, tested against their formula:\n",
        _table(["system", "works", "does not, and why"], _systems()),
        "## Other systems\n\nThese have no criterion of their own here:\n",
        _table(["system", "what works", "what does not, and why"], [[name, *said] for name, said in ELSEWHERE.items()]),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
