"""Scoring by the Jacobian Criterion."""

from obc.scoring.run import score
from obc.scoring.scorer import InplaceError, JacobianScorer, SampleRowsError, ScoringError
from obc.scoring.scores import ChannelScores, Scores, ScoresError

__all__ = [
    "ChannelScores",
    "InplaceError",
    "JacobianScorer",
    "SampleRowsError",
    "Scores",
    "ScoresError",
    "ScoringError",
    "score",
]
