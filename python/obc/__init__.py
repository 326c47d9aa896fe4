"""obc: structural pruning by Optimal Brain Connection (arXiv 2508.05521)."""

from obc import backends, equivalent, ops, quality, reference
from obc.backends import use_backend
from obc.distribution import obc_version
from obc.info import info
from obc.model.errors import PruningError
from obc.model.latency_table import LatencyTable
from obc.model.plain_layers import plain_layers
from obc.model.quantized import dequantize
from obc.pruning import PruningResult, prune
from obc.recovery import (
    Distillation,
    EquivalentPruning,
    Kept,
    PlanError,
    PruningPlan,
    RecoveryReport,
    compensate,
    equivalent_pruning,
    recalibrate_norms,
    recover,
)
from obc.scoring import ChannelRows, ChannelScores, Coverage, JacobianScorer, Scores, memory_estimate, score
from obc.selection import select
from obc.statistics import Statistics, collect
from obc.structures.latency import measure_latency
from obc.structures.memory import MemoryUse
from obc.structures.transformers import transformer_groups

__version__ = obc_version() or "0+unknown"  # imported from a source tree that is not installed

__all__ = [
    "ChannelRows",
    "ChannelScores",
    "Coverage",
    "Distillation",
    "EquivalentPruning",
    "JacobianScorer",
    "Kept",
    "LatencyTable",
    "MemoryUse",
    "PlanError",
    "PruningError",
    "PruningPlan",
    "PruningResult",
    "RecoveryReport",
    "Scores",
    "Statistics",
    "backends",
    "collect",
    "compensate",
    "dequantize",
    "equivalent",
    "equivalent_pruning",
    "info",
    "measure_latency",
    "memory_estimate",
    "ops",
    "plain_layers",
    "prune",
    "quality",
    "recalibrate_norms",
    "recover",
    "reference",
    "score",
    "select",
    "transformer_groups",
    "use_backend",
]
