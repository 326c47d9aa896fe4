"""Systems of the field: their criterion in obc, or what works and why the rest does not."""

from __future__ import annotations

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
