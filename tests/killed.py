"""Scoring runs that are killed at random times and started again, for test_checkpoint.py.

    python killed.py FOLDER KILLS ROWS WHERE LOSS

A process without threads forks each run and kills it with SIGKILL: every second one a random time after it began, in
the middle of anything, the others after some batches, so that each of them gets on. Every batch takes at least
``PAUSE``, and there are so many that no run comes to its end before the last kill.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import torch
from torch import Tensor, nn

import obc
from obc.scoring import label_free_loss

PAUSE, LONGEST_LIFE, MOST_BATCHES = 0.003, 0.06, 12


class Dataset:
    """Batches that can be indexed; each look-up draws from torch's generator, and notes its index."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.looked_up = batches, []

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        self.looked_up.append(index)
        x, labels = self.batches[index]
        return x + 0.1 * torch.randn_like(x), labels


def run(folder: Path, kills: int, rows: str, where: str, loss: str, checkpoint: bool, batch_done: int) -> None:
    """Score, write a byte to ``batch_done`` for every batch, and leave the result in ``folder``."""
    torch.manual_seed(3)
    case = models.residual_cnn()
    batches_of_a_life = LONGEST_LIFE / PAUSE + MOST_BATCHES
    repeats = int(kills * batches_of_a_life / models.BATCHES) + 2
    batches = Dataset(case.batches * repeats)
    label_free = label_free_loss(rows=rows, seed=5)

    def dropped(model: nn.Module, batch: Any) -> Tensor:
        """Losses that draw a mask in every row."""
        time.sleep(PAUSE)
        os.write(batch_done, b".")
        if loss == "label-free":
            return label_free(model, batch)
        x, labels = batch
        losses = case.losses(model, (x * (torch.rand_like(x) > 0.3), labels))
        return losses if rows == "sample" else losses.mean()

    dropped.seek = label_free.seek  # type: ignore[attr-defined]
    data: Any = batches if where != "host" else generated(batches)
    options: dict[str, Any] = {"checkpoint": folder / "checkpoint", "every": 2} if checkpoint else {}
    to = folder / "kept.rows" if where == "file" else where
    scores = obc.score(case.model, data, dropped, rows=rows, keep_rows=True, rows_to=to, progress=False, **options)
    scores.save(folder / "scores.safetensors")
    (folder / "looked_up.json").write_text(json.dumps(batches.looked_up))


def generated(batches: Dataset) -> Iterator[Any]:
    for index in range(len(batches)):
        yield batches[index]


def main(folder: Path, kills: int, rows: str, where: str, loss: str) -> None:
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    torch.set_num_threads(1)
    for name, checkpoint in (("unbroken", False), ("killed", True)):
        (folder / name).mkdir()
        random.seed(0)
        for life in range(kills + 1 if checkpoint else 1):
            read, batch_done = os.pipe()
            if (pid := os.fork()) == 0:
                run(folder / name, kills, rows, where, loss, checkpoint, batch_done)
                sys.stdout.flush()
                os._exit(0)
            if checkpoint and life < kills:
                if life % 2:
                    time.sleep(random.uniform(0, LONGEST_LIFE))
                else:
                    for _ in range(random.randint(3, MOST_BATCHES)):
                        os.read(read, 1)
                    time.sleep(random.uniform(0, PAUSE))
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            os.close(read)
            os.close(batch_done)
            print(f"{name}: {'killed' if os.WIFSIGNALED(status) else f'exit {os.WEXITSTATUS(status)}'}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
