"""The criteria that come with obc: one line each."""

from __future__ import annotations

from obc.criteria.activations import CFSP, FLAP, Minitron, WandaSP
from obc.criteria.beam import BeamSearch
from obc.criteria.compensated import CompensatedJacobian
from obc.criteria.curvature import FastOBA
from obc.criteria.depth import AngularDistance, BlockInfluence, EntropyGain
from obc.criteria.experts import REAP, ExpertFrequency, ExpertNorm
from obc.criteria.gaprune import GAPrune
from obc.criteria.gradients import Fisher, LLMPruner, Nirvana, Taylor
from obc.criteria.intra_fusion import IntraFusion
from obc.criteria.jbr import JBR
from obc.criteria.kfac import KFAC
from obc.criteria.kfac_obs import KFACOBS
from obc.criteria.magnitude import FPGM, WHC, BNScale, Magnitude, Random
from obc.criteria.masked import MaskedEvaluation
from obc.criteria.nvit import NViT
from obc.criteria.obs import OBS, SlimGPT
from obc.criteria.reconstruction import Reconstruction
from obc.criteria.registry import register
from obc.criteria.rows import Jacobian
from obc.criteria.token_rows import TokenJacobian
from obc.criteria.tolerance import Tolerance

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

for criterion in CRITERIA:
    register(criterion.name, criterion)
