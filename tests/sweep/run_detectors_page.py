"""Run the blocks of docs/detectors.md with ultralytics, a network of random weights and drawn images.

python tests/sweep/run_detectors_page.py

It needs what library_ultralytics.py names (``make sweep-libraries`` installs it), onnx, and torchvision's compiled
operators; without them, non-maximum suppression is replaced by the boxes with the highest scores.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision_operators import import_torchvision

PAGE = Path(__file__).parents[2] / "docs" / "detectors.md"
SMALL = {'"imgsz": 640': '"imgsz": 64', '"epochs": 30': '"epochs": 1, "workers": 0, "plots": False, "device": "cpu"'}


def highest(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Stands for torchvision's ``nms``."""
    return scores.sort(descending=True).indices[:5]


def draw(folder: Path) -> None:
    """16 images with one box each, and the file that lists them."""
    image: Any = importlib.import_module("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for number in range(16):
        pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.txt").write_text(f"{number % 4} 0.5 0.5 0.4 0.4\n")
    (folder / "image.png").write_bytes((folder / "images" / "0.png").read_bytes())
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [a, b, c, d]\n")


def parameters(model: nn.Module) -> int:
    """Their number."""
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Run the page in a folder of its own, and compare what the trained file holds with what was pruned."""
    import_torchvision()
    torchvision: Any = importlib.import_module("torchvision")
    try:
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (RuntimeError, NotImplementedError):
        torchvision.ops.nms = highest
    source = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    for usual, small in SMALL.items():
        assert usual in source, usual
        source = source.replace(usual, small)
    ultralytics: Any = importlib.import_module("ultralytics")
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        draw(Path(temporary))
        ultralytics.YOLO("yolov8n.yaml").save("yolov8n.pt")
        namespace: dict[str, Any] = {}
        exec(compile(source, str(PAGE), "exec"), namespace)
        before, after = parameters(ultralytics.YOLO("yolov8n.pt").model), parameters(namespace["detector"].model)
        assert after == parameters(namespace["result"].model) < before
        assert list(Path(temporary).glob("runs/**/best.onnx")), "no export"
        print(f"{before} parameters, {after} after pruning and training")
        os.chdir(PAGE.parent)


if __name__ == "__main__":
    main()
