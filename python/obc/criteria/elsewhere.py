"""Systems of the field that have no criterion of their own here: what of them works, and why the rest does not."""

from __future__ import annotations

# System -> (what works, what does not and why).
ELSEWHERE: dict[str, tuple[str, str]] = {
    "OBS-Diff": (
        "`obs` with `Gram(weight=...)`: a weight a step",
        "fusing the ranks of two attention streams",
    ),
    "DarwinLM": ('`obs`, with `allocation="search"` for its evolution', "fine-tuning of every candidate"),
    "Týr-the-Pruner": ('`OBS(first_order=True)`, `allocation="search"`', "its weighted error accumulation"),
    "HARP": ('`flap` with `compensate="mean"`', "attention layers replaced by scaled values: no unit says that"),
    "LOP": ("`minitron` or `cfsp` ranks as it does", "ratios by tree search and a predictor trained on them"),
    "SAAP": (
        "`llm_pruner_element` and `llm_pruner_vector`",
        "their fusion, whose variances are not published",
    ),
    "GETA, HESSO": ("rows give w · g per unit", "a saliency inside training, with shrinking and bit widths"),
    "HAP": ("`fastoba` is its kin by Hessian products", "Hutchinson's trace, and implants for what goes"),
    "MultiPruner, BlockPruner": (
        "`masked` with rounds for widths and heads",
        "blocks as units of obc.prune",
    ),
    "Reassessing layer pruning": ("`block_influence`", "removal of blocks; its finding is to drop the last quarter"),
    "GPTailor": ("nothing", "merges layers of several fine-tuned variants"),
    "L³Prune": ("nothing", "reads a contrastive loss off every layer"),
    "COMP": (
        '`compensate="ls"` solves more than its mask tuning',
        "its metrics, which are not published in full",
    ),
    "DiEP, CoFi, SepPrune, LAPP, movement pruning": ("nothing", "masks that are learned in training"),
    "Oracle pruning": ("`masked`", ""),
    "PQ index": ("any score", "an allocation from the norms' quotient of a group's scores"),
    "Pruner-Zero, SparseLLM": ("nothing", "published for single weights"),
    "MINI-LLM": ("nothing", "its formula is not published in full"),
}
