"""Criteria: one score per unit of each group, the least important lowest.

Notation: for unit u of a group, slice m is what layer m loses with u, W_m,u the slice as a vector, r_m,u[n] = W_m,u .
dL_n/dW_m,u its row, and x the input of a consumer. ``docs/criteria.md`` has the table of all criteria.
"""

from obc.criteria.activations import CFSP, FLAP, Minitron, WandaSP
from obc.criteria.compensated import CompensatedJacobian
from obc.criteria.curvature import FastOBA
from obc.criteria.depth import AngularDistance, BlockInfluence, EntropyGain
from obc.criteria.experts import REAP, ExpertFrequency, ExpertNorm
from obc.criteria.gaprune import GAPrune
from obc.criteria.gradients import Fisher, LLMPruner, Nirvana, Taylor
from obc.criteria.jbr import JBR
from obc.criteria.kfac import KFAC, KFACOBS
from obc.criteria.magnitude import FPGM, WHC, BNScale, IntraFusion, Magnitude, Random
from obc.criteria.masked import BeamSearch, MaskedEvaluation
from obc.criteria.nvit import NViT
from obc.criteria.obs import OBS, SlimGPT
from obc.criteria.protocol import About, Criterion, MeasuredCriterion, MeasuredRows
from obc.criteria.reconstruction import Reconstruction
from obc.criteria.registry import available, get, register
from obc.criteria.rows import Jacobian
from obc.criteria.scoring import group_scores, scores_from
from obc.criteria.subject import Subject
from obc.criteria.token_rows import TokenJacobian
from obc.criteria.tolerance import Tolerance

__all__ = [
    "CFSP",
    "CRITERIA",
    "FLAP",
    "FPGM",
    "JBR",
    "KFAC",
    "KFACOBS",
    "OBS",
    "REAP",
    "WHC",
    "About",
    "AngularDistance",
    "BNScale",
    "BeamSearch",
    "BlockInfluence",
    "CompensatedJacobian",
    "Criterion",
    "EntropyGain",
    "ExpertFrequency",
    "ExpertNorm",
    "FastOBA",
    "Fisher",
    "GAPrune",
    "IntraFusion",
    "Jacobian",
    "LLMPruner",
    "Magnitude",
    "MaskedEvaluation",
    "MeasuredCriterion",
    "MeasuredRows",
    "Minitron",
    "NViT",
    "Nirvana",
    "Random",
    "Reconstruction",
    "SlimGPT",
    "Subject",
    "Taylor",
    "TokenJacobian",
    "Tolerance",
    "WandaSP",
    "available",
    "get",
    "group_scores",
    "register",
    "scores_from",
]

# The criteria that come with obc.
CRITERIA = (
    Jacobian(),
    CompensatedJacobian(),
    TokenJacobian(),
    KFAC(),
    KFACOBS(),
    JBR(),
    Random(),
    Magnitude(1),
    Magnitude(2),
    BNScale(),
    FPGM(),
    WHC(),
    IntraFusion(),
    Taylor(),
    Fisher(),
    Reconstruction(),
    OBS(),
    SlimGPT(),
    FLAP(),
    WandaSP(),
    Minitron(),
    CFSP(),
    REAP(),
    ExpertFrequency(),
    ExpertNorm(),
    LLMPruner("element"),
    LLMPruner("vector"),
    Nirvana(),
    NViT(),
    GAPrune(),
    FastOBA(),
    MaskedEvaluation(),
    BeamSearch(),
    Tolerance(),
    BlockInfluence(),
    AngularDistance(),
    EntropyGain(),
)

for _criterion in CRITERIA:
    register(_criterion.name, _criterion)
