"""The criteria that come with obc: one line each."""

from __future__ import annotations

from obc.criteria.activations import CFSP, FLAP, Minitron, WandaSP
from obc.criteria.compensated import KFAC, CompensatedJacobian
from obc.criteria.curvature import FastOBA
from obc.criteria.depth import AngularDistance, BlockInfluence
from obc.criteria.experts import REAP, ExpertFrequency, ExpertNorm
from obc.criteria.gradients import Fisher, LLMPruner, Nirvana, Taylor
from obc.criteria.magnitude import FPGM, WHC, BNScale, Magnitude, Random
from obc.criteria.masked import MaskedEvaluation
from obc.criteria.obs import OBS, SlimGPT
from obc.criteria.reconstruction import Reconstruction
from obc.criteria.registry import register
from obc.criteria.rows import GAPrune, Jacobian, NViT

CRITERIA = (
    Jacobian(),
    CompensatedJacobian(),
    KFAC(),
    Random(),
    Magnitude(1),
    Magnitude(2),
    BNScale(),
    FPGM(),
    WHC(),
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
    BlockInfluence(),
    AngularDistance(),
)

for criterion in CRITERIA:
    register(criterion.name, criterion)
