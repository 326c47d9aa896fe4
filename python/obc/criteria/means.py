"""Where the mean of what a consumer loses costs nothing: its bias takes it, or a BatchNorm behind it absorbs it."""

from __future__ import annotations

from obc.criteria.subject import Subject
from obc.criteria.units import consumers_of
from obc.model.absorbing import norms_behind
from obc.model.evaluation import evaluating
from obc.model.usable_batches import UsableBatches


def free_of_means(subject: Subject) -> set[str]:
    """Names of such consumers; the model runs once on one batch, if it has BatchNorms."""
    found = {one.name: one for group in subject.groups for one in consumers_of(group, subject.model)}
    layers = {name: one.module for name, one in found.items() if not one.has_bias and not one.routed}
    with_bias = {name for name, one in found.items() if one.has_bias}
    batch = next(iter(UsableBatches.of(subject.batches)), None) if layers else None
    if batch is None:
        return with_bias
    with evaluating(subject.model):
        absorbed = norms_behind(subject.model, layers, lambda: subject.forward_fn(subject.model, batch))
    return with_bias | absorbed.keys()
