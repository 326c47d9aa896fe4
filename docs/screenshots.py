"""The pictures of the page of a pruning that the docs show: ``make screenshots``. Needs playwright and a Chromium."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import obc

STATIC = Path(__file__).parent / "_static"
# name -> (width, height, colours)
PICTURES = {
    "report.png": (1000, 760, "light"),
    "report-dark.png": (1000, 760, "dark"),
    "report-phone.png": (390, 844, "light"),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def page() -> str:
    """The page of a small network that was trained on digits, pruned and compensated."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    batches = list(zip(images[:1200].split(16), labels[:1200].split(16), strict=True))

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def block(channels: int, wider: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64), *head)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(6):
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    result = obc.prune(model.eval(), images[:1], batches, loss_fn, macs=0.4, steps=4, compensate="ls", progress=False)
    return result.report.html()


def main() -> None:
    """Draw the page and take every picture."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        file.write_text(page(), encoding="utf-8")
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        for name, (width, height, colours) in PICTURES.items():
            tab = opened.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
            tab.goto(file.as_uri())
            tab.screenshot(path=STATIC / name)
            tab.close()
        opened.close()


if __name__ == "__main__":
    main()
