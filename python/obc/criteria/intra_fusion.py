"""Intra-Fusion as a criterion: which units stay. The others are then fused into them, without data."""

from __future__ import annotations

from obc.criteria.magnitude import Magnitude
from obc.criteria.protocol import About


class IntraFusion(Magnitude):
    """Chooses the kept units by L1 magnitude, as in the paper's experiments; any criterion would work."""

    update = "fusion"

    def __init__(self) -> None:
        super().__init__(1)
        self.name = "intra_fusion"  # type: ignore[misc]
        self.about = About(  # type: ignore[misc]
            "Intra-Fusion",
            "arXiv 2402.07839; code alexandertheus/Intra-Fusion",
            "L1 magnitude; removed units are fused into kept ones by optimal transport of weights",
            "weights",
            differs="its code multiplies outputs by T itself, so that they grow with what they fuse: outputs='sum'",
            missing="merging of BatchNorms (its code merges them before; torch.nn.utils.fusion does), Gaussian "
            "mixtures as targets, fusion during training",
        )
