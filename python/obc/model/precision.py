"""What float32 products are computed in."""

from __future__ import annotations

import torch


def tf32_is_allowed() -> bool:
    """Whether GPUs may multiply float32 with eleven bits (TF32), by whichever of torch's settings.

    cuDNN's convolutions may by default. The older settings (``allow_tf32``) can't be read once a newer one was made.
    """
    backends = torch.backends
    return "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
