"""Criteria of whole residual blocks from their inputs and outputs. They need forward passes only."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from obc.criteria.protocol import About, Criterion
from obc.model.arguments import one_of
from obc.model.groups import ChannelGroup
from obc.statistics.blocks import Blocks, BlockSums, Tokens
from obc.statistics.results import Statistics


class BlockCriterion(Criterion):
    """A criterion of residual blocks: groups of kind "layers" with one unit each.

    Args:
        tokens: "all" or "last".
        span: score windows of this many consecutive blocks, named after their first.
    """

    def __init__(self, tokens: Tokens = "all", span: int = 1) -> None:
        self.needs = (Blocks(tokens, span),)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(1,) the score of the block that the group is; None for other groups."""
        if group.kind != "layers" or group.name not in statistics.blocks:
            return None
        return torch.tensor([self.of_blocks(statistics)[group.name]], dtype=torch.float64, device="cpu")

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
        """1 - E cos(x, y) over tokens."""
        return 1 - sums.cosine / sums.count


class AngularDistance(BlockCriterion):
    """d = E arccos(cos(x, y)) / pi over windows, at the last token (Gromov et al., arXiv 2403.17887).

    Args:
        tokens: "last" token, or "all".
        span: blocks from the window's input x to its output y.
    """

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
        """E arccos(cos(x, y)) / pi over windows."""
        return sums.angle / sums.count


class EntropyGain(BlockCriterion):
    """dH = H(y) - H(x), from histograms of every dimension (EntroDrop, Yang et al., arXiv 2504.03794).

    Entropy falls over the first blocks and rises afterwards; only blocks of the second stage are removed.

    Args:
        bins: number of bins of the histograms.
        spare: blocks that score one nat more than all others. "falling": all before the entropy first rises. "ends":
            the first two and the last, as in the released code. None: no blocks.

    Raises:
        ValueError: ``spare`` has another value.
    """

    name = "entropy"
    about = About(
        "EntroDrop",
        "arXiv 2504.03794; code SalesforceAIResearch/EntroDrop",
        "mean over batches of H(block output) - H(block input), H the sum of the dimensions' histogram entropies",
        "forward",
        kinds="blocks",
        differs="its code spares the first two blocks and the last by their number: spare='ends'",
        missing="estimates by nearest neighbours and Renyi's; attention layers alone",
    )

    def __init__(self, bins: int = 20, spare: Literal["falling", "ends"] | None = "falling") -> None:
        one_of("spare", spare, ("falling", "ends", None))
        self.needs = (Blocks(entropy_bins=bins),)
        self.spare = spare

    def of_block(self, sums: BlockSums) -> float:
        """H(y) - H(x), the mean over calls."""
        return (sums.output_entropy - sums.input_entropy) / max(sums.calls, 1)

    def of_blocks(self, statistics: Statistics) -> dict[str, float]:
        """The gain of every block; spared blocks score one above the highest."""
        gains = super().of_blocks(statistics)
        names, most = list(gains), max(gains.values(), default=0.0)
        spared = set(names[:2] + names[-1:]) if self.spare == "ends" else set()
        if self.spare == "falling":
            rising = next((place for place, name in enumerate(names) if gains[name] > 0), len(names))
            spared = set(names[:rising])
        return {name: most + 1.0 if name in spared else gain for name, gain in gains.items()}
