"""Networks of ultralytics: every generation of YOLO at its smallest scale, all tasks of one, and RT-DETR."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from sweep_networks import Architecture, drawn
from torch import nn
from torchvision_operators import import_torchvision

PACKAGES = ("ultralytics", "torchvision", "opencv-python-headless", "pyyaml", "requests", "psutil", "pillow")
NAMES = """
yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n
yolov8n-cls yolov8n-seg yolov8n-pose yolov8n-obb yolo11n-seg yolo26n-seg yolo26n-pose
yolov8n-ghost yolov8n-p2 yolov8n-p6 yolov5n-p6 yolov8n-world rtdetr-resnet50
"""
TASKS = {"cls": "Classification", "seg": "Segmentation", "pose": "Pose", "obb": "OBB", "world": "World"}


def _network(name: str) -> nn.Module:
    import_torchvision()
    from ultralytics.nn import tasks

    task = TASKS.get(name.partition("-")[2], "RTDETRDetection" if name.startswith("rtdetr") else "Detection")
    made: Any = getattr(tasks, f"{task}Model")
    return made(f"{name}.yaml", ch=3, nc=4, verbose=False)


def architectures() -> Iterator[Architecture]:
    """Every network, on images of 64 or 128 pixels."""
    for name in NAMES.split():
        size = 128 if name.endswith("-p6") else 64
        yield Architecture(name, functools.partial(_network, name), drawn(3, size, size))
