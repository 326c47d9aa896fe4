"""obc: structural pruning by Optimal Brain Connection (arXiv 2508.05521)."""

from obc import backends, ops, reference
from obc.backends import use_backend
from obc.info import info
from obc.scoring import ChannelScores, JacobianScorer, Scores, score

__all__ = ["ChannelScores", "JacobianScorer", "Scores", "backends", "info", "ops", "reference", "score", "use_backend"]
