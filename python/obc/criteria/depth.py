"""Criteria of whole residual blocks, from how similar their inputs and outputs are. Forward passes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from obc.criteria.protocol import About, Criterion
from obc.model.groups import ChannelGroup
from obc.statistics.blocks import Blocks, BlockSums, Tokens
from obc.statistics.results import Statistics


class BlockCriterion(Criterion):
    """A criterion of residual blocks: groups of kind "layers", of one unit each.

    Args:
        tokens: "all" or "last".
        span: score windows of so many consecutive blocks, under the name of their first.
    """

    def __init__(self, tokens: Tokens = "all", span: int = 1) -> None:
        self.needs = (Blocks(tokens, span),)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        if group.kind != "layers" or group.name not in statistics.blocks:
            return None
        return torch.tensor([self.of_block(statistics.blocks[group.name])], dtype=torch.float64)

    def of_block(self, sums: BlockSums) -> float:
        """The score of one block, or of one window."""
        raise NotImplementedError

    def of_blocks(self, statistics: Statistics) -> dict[str, float]:
        """The scores of all blocks, or windows, by name."""
        return {name: self.of_block(sums) for name, sums in statistics.blocks.items()}


class BlockInfluence(BlockCriterion):
    """BI = 1 - E cos(x, y) (ShortGPT, Men et al., arXiv 2403.03853; FlexiGPT)."""

    name = "block_influence"
    about = About(
        "ShortGPT, FlexiGPT, Minitron (depth): block influence",
        "arXiv 2403.03853",
        "1 - E cos(block input, block output)",
        "forward",
        kinds="blocks",
        differs="Reassessing's code takes one cosine of whole matrices",
        missing="FlexiGPT's weight sharing",
    )

    def of_block(self, sums: BlockSums) -> float:
        return 1 - sums.cosine / sums.count


class AngularDistance(BlockCriterion):
    """d = E arccos(cos(x, y)) / pi over windows, at the last token (Gromov et al., arXiv 2403.17887)."""

    name = "angular_distance"
    about = About(
        "Unreasonable ineffectiveness of the deeper layers; CFSP's coarse score",
        "arXiv 2403.17887",
        "E arccos(cos(window input, window output)) / pi at the last token; span= is the window",
        "forward",
        kinds="blocks",
        missing="QLoRA healing",
    )

    def __init__(self, tokens: Tokens = "last", span: int = 1) -> None:
        super().__init__(tokens, span)

    def of_block(self, sums: BlockSums) -> float:
        return sums.angle / sums.count
