"""Criteria: one score per unit of each group, the least important lowest.

Written for unit u of a group with slices m (what layer m loses with u), W_m,u the slice as a vector, r_m,u[n] =
W_m,u . dL_n/dW_m,u its row, x the input of a consumer. ``docs/criteria.md`` has the table of all.
"""

from obc.criteria.activations import CFSP, FLAP, Minitron, WandaSP
from obc.criteria.catalogue import CRITERIA
from obc.criteria.compensated import KFAC, CompensatedJacobian
from obc.criteria.curvature import FastOBA
from obc.criteria.depth import AngularDistance, BlockInfluence
from obc.criteria.experts import REAP, ExpertFrequency, ExpertNorm
from obc.criteria.gradients import Fisher, LLMPruner, Nirvana, Taylor
from obc.criteria.magnitude import FPGM, WHC, BNScale, Magnitude, Random
from obc.criteria.masked import MaskedEvaluation
from obc.criteria.obs import OBS, SlimGPT
from obc.criteria.protocol import About, Criterion, MeasuredCriterion, Subject
from obc.criteria.reconstruction import Reconstruction
from obc.criteria.registry import available, get, register
from obc.criteria.rows import GAPrune, Jacobian, NViT
from obc.criteria.scoring import group_scores, scores_from

__all__ = [
    "CFSP",
    "CRITERIA",
    "FLAP",
    "FPGM",
    "KFAC",
    "OBS",
    "REAP",
    "WHC",
    "About",
    "AngularDistance",
    "BNScale",
    "BlockInfluence",
    "CompensatedJacobian",
    "Criterion",
    "ExpertFrequency",
    "ExpertNorm",
    "FastOBA",
    "Fisher",
    "GAPrune",
    "Jacobian",
    "LLMPruner",
    "Magnitude",
    "MaskedEvaluation",
    "MeasuredCriterion",
    "Minitron",
    "NViT",
    "Nirvana",
    "Random",
    "Reconstruction",
    "SlimGPT",
    "Subject",
    "Taylor",
    "WandaSP",
    "available",
    "get",
    "group_scores",
    "register",
    "scores_from",
]
