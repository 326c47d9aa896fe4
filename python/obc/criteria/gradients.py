"""Criteria from weight times weight gradient: Taylor, Fisher, LLM-Pruner, NIRVANA."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from obc.criteria.masked_model import output_tensor
from obc.criteria.products import products
from obc.criteria.protocol import About, Criterion
from obc.criteria.slices import KINDS
from obc.criteria.units import mean_over, sum_over
from obc.model.arguments import one_of
from obc.model.groups import ChannelGroup
from obc.selection.allocation import TwoClasses
from obc.statistics.results import Statistics
from obc.statistics.weight_gradients import WeightGradients


class Taylor(Criterion):
    """S_u = mean over slices m of sum over w in W_m,u of |w g|, g the sum over batches of dL_n/dw.

    First-order Taylor as in Torch-Pruning's default, without its division by the group's mean (Molchanov et al.,
    arXiv 1906.10771, rank globally by it).
    """

    name = "taylor"
    about = About("Taylor (first order)", "arXiv 1906.10771", "mean over slices of sum |w g|", "labels", KINDS)
    needs = ("weight_gradients",)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the mean over the group's slices of the sum of |w g|."""
        return mean_over(found.first.abs().sum(1) for found in products(group, statistics, model))


class Fisher(Criterion):
    """S_u = sum over slices m, batches n and w in W_m,u of (w dL_n/dw)^2: the empirical Fisher's diagonal."""

    name = "fisher"
    about = About(
        "Fisher (diagonal)", "arXiv 1801.05787", "sum over slices and rows n of sum (w g_n)^2", "labels", KINDS
    )
    needs = (WeightGradients(square=True),)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the sum over the group's slices of the squares of w dL_n/dw."""
        return sum_over(found.second.sum(1) for found in products(group, statistics, model))


class LLMPruner(Criterion):
    """Taylor of LLM-Pruner (Ma et al., arXiv 2305.11627), summed over the group's slices m.

    "element":  S_u = sum_m sum over w in W_m,u of |w g|        with ``second_order``  |w g - 1/2 w^2 F|
    "vector":   S_u = sum_m |sum over w in W_m,u of w g|        the same
    with g the sum over batches of dL_n/dw, and F the mean over batches of (dL_n/dw)^2.

    Args:
        form: "element" or "vector".
        second_order: with the diagonal of the empirical Fisher for the Hessian; the paper's "element^2".

    Raises:
        ValueError: ``form`` has another value.
    """

    allocation = "uniform"

    def __init__(self, form: Literal["element", "vector"] = "element", second_order: bool = False) -> None:
        one_of("form", form, ("element", "vector"))
        self.form, self.second_order = form, second_order
        self.name = f"llm_pruner_{form}"  # type: ignore[misc]
        self.needs = (WeightGradients(square=second_order),)
        inner = "sum |w g|" if form == "element" else "|sum w g|"
        self.about = About(  # type: ignore[misc]
            f"LLM-Pruner ({form})",
            "arXiv 2305.11627",
            f"sum over slices of {inner}; second_order: w g - w^2 F / 2",
            "labels",
            KINDS,
            differs="published code averages F over samples; here over batches: pass batches of one sample",
            missing="LoRA after pruning: use any trainer",
        )

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the salience of each slice, by element or by vector, added over slices."""
        parts = []
        for found in products(group, statistics, model):
            salience = found.first - 0.5 * found.second / found.count if self.second_order else found.first
            parts.append(salience.abs().sum(1) if self.form == "element" else salience.sum(1).abs())
        return sum_over(parts)


class Nirvana(Criterion):
    """S_u = sum over slices m of sum over w in W_m,u of |w df/dw|, f a functional of the outputs without labels.

    NIRVANA (code: iDEA-iSAIL-Lab-UIUC/NIRVANA), from the neural tangent kernel under Adam. Attention and feed-forward
    units are ranked separately (:class:`obc.selection.allocation.TwoClasses`).

    Args:
        over: "sequence": f = mean over samples and logits of the maximum over the *sequence*, as in the published code.
            "vocabulary": the mean over tokens of the largest logit.
        gamma: feed-forward parameters removed for each of attention: 3.36 for Llama-3.1-8B, 3.0 for 3.2-3B.

    Raises:
        ValueError: ``over`` has another value.
    """

    name = "nirvana"
    about = About(
        "NIRVANA",
        "arXiv 2509.14230; code iDEA-iSAIL-Lab-UIUC/NIRVANA",
        "sum over slices of sum |w df/dw|, f without labels",
        "gradients",
        kinds="heads, feed-forward channels, experts",
        differs="its f takes the maximum over the sequence, not the vocabulary: over='sequence' (default)",
        missing="the choice of calibration data by KL, which its released script replaces by fixed seeds",
    )
    needs = ("weight_gradients",)

    def __init__(self, over: Literal["sequence", "vocabulary"] = "sequence", gamma: float = 3.36) -> None:
        one_of("over", over, ("sequence", "vocabulary"))
        self.over = over
        self.allocation = TwoClasses(gamma)

    def functional(self, output: Any) -> Tensor:
        """f of the model's output."""
        logits = output_tensor(output)
        if logits.dim() != 3:
            return logits.amax(-1).mean()
        return logits.amax(1).mean() if self.over == "sequence" else logits.amax(-1).mean()

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the sum over the group's slices of |w df/dw|."""
        return sum_over(found.first.abs().sum(1) for found in products(group, statistics, model))
