"""Scoring by the Jacobian Criterion."""

from obc.scoring.checkpoint import CheckpointError
from obc.scoring.coverage import Coverage
from obc.scoring.errors import InplaceError, SampleRowsError, ScoringError
from obc.scoring.estimate import MemoryEstimate, memory_estimate
from obc.scoring.label_free import LabelFreeLoss, label_free_loss
from obc.scoring.results.kept_rows import ChannelRows, KeptRows
from obc.scoring.results.report import Report
from obc.scoring.results.scores import ChannelScores, Scores, ScoresError
from obc.scoring.run import score
from obc.scoring.scorer import JacobianScorer

__all__ = [
    "ChannelRows",
    "ChannelScores",
    "CheckpointError",
    "Coverage",
    "InplaceError",
    "JacobianScorer",
    "KeptRows",
    "LabelFreeLoss",
    "MemoryEstimate",
    "Report",
    "SampleRowsError",
    "Scores",
    "ScoresError",
    "ScoringError",
    "label_free_loss",
    "memory_estimate",
    "score",
]
