"""Models of the transformers library: their prunable groups, pruning without tracing, and saving.

structure = TransformersStructure(model, uniform=True)
result = obc.prune(model, None, batches, loss_fn, structure=structure, round_to=64)
model.save_pretrained(folder)              # uniform widths that the config can say
save_pruned(model, result.plan, folder)    # any widths; load_pruned(folder)
"""

from obc.structures.transformers.family import Family
from obc.structures.transformers.family import register as register_family
from obc.structures.transformers.saving import load_pruned, save_pruned
from obc.structures.transformers.structure import TransformersStructure, transformer_groups

__all__ = [
    "Family",
    "TransformersStructure",
    "load_pruned",
    "register_family",
    "save_pruned",
    "transformer_groups",
]
