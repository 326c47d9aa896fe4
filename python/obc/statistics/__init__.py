"""Streaming statistics of a model: everything that criteria need, from one run over the batches."""

from obc.statistics.blocks import Blocks, BlockSums, residual_blocks
from obc.statistics.by_block import ByBlock
from obc.statistics.errors import StatisticsError
from obc.statistics.experts import Experts, ExpertSums
from obc.statistics.gradient_moments import ChannelGradients, GradientMoments
from obc.statistics.gram import Gram, GramSum
from obc.statistics.memory import memory_estimate
from obc.statistics.moments import ChannelMoments, Moments
from obc.statistics.results import Statistics
from obc.statistics.rows import Rows
from obc.statistics.run import collect
from obc.statistics.weight_gradients import WeightGradients, WeightGradientSums

__all__ = [
    "BlockSums",
    "Blocks",
    "ByBlock",
    "ChannelGradients",
    "ChannelMoments",
    "ExpertSums",
    "Experts",
    "GradientMoments",
    "Gram",
    "GramSum",
    "Moments",
    "Rows",
    "Statistics",
    "StatisticsError",
    "WeightGradientSums",
    "WeightGradients",
    "collect",
    "memory_estimate",
    "residual_blocks",
]
