"""TF32 is seen however it was allowed, also where torch refuses to tell by its older settings."""

from __future__ import annotations

import json
import subprocess
import sys

# One after another in one process; the last is torch's newer kind of setting, after which the older can't be read.
SETTINGS = {
    "pass": True,  # convolutions may by default
    "b.cudnn.allow_tf32 = False": False,
    "b.cuda.matmul.allow_tf32 = True": True,
    "b.cuda.matmul.allow_tf32 = False": False,
    "torch.set_float32_matmul_precision('high')": True,
    "b.cuda.matmul.fp32_precision = b.cudnn.conv.fp32_precision = 'ieee'": False,
}

PROGRAM = """
import json, sys, torch
from obc.model.autocast import tf32_is_allowed
found = []
for setting in json.loads(sys.argv[1]):
    exec(setting, {"torch": torch, "b": torch.backends})
    found.append(tf32_is_allowed())
print(json.dumps(found))
"""


def test_tf32_is_seen() -> None:
    """Runs in a separate process, because the settings are process-wide."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(SETTINGS))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert dict(zip(SETTINGS, json.loads(done.stdout), strict=True)) == SETTINGS
