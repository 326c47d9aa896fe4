"""Lets torchvision, and what imports it, be imported beside a torch that its wheel's operators were not built for."""

from __future__ import annotations

import sys

import torch

# Importing torchvision describes these to torch, which fails where its library can't be loaded. Networks that classify
# or segment images do not call them.
_DESCRIBED = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # an operator goes with the object that declared it


def import_torchvision() -> None:
    """Import torchvision, declaring operators of its compiled part where a wheel for another torch lacks it."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # an operator does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _DESCRIBED:
            library.define(schema)
        _libraries.append(library)
