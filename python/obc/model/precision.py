"""The precision of float32 products."""

from __future__ import annotations

import torch


def tf32_is_allowed() -> bool:
    """Whether any of torch's settings lets GPUs multiply float32 with eleven bits (TF32).

    cuDNN's convolutions may by default. The older settings (``allow_tf32``) can't be read once a newer one was set.
    """
    backends = torch.backends
    return "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
