"""A batch that a tiny model of a task takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sweep_configs import IMAGE, VOCABULARY
from torch import Tensor


def inputs_of(task: str, model: Any) -> dict[str, Tensor]:
    """A batch of two samples."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY - 2, (2, 16), generator=generator)
    if task == "image" and model.config.model_type == "imagegpt":  # colours of pixels
        return {"input_ids": ids}
    if task == "image" and model.config.model_type == "siglip2":  # patches of images of any shape
        vision = model.config.vision_config
        patches = torch.randn(2, 16, vision.num_channels * vision.patch_size**2, generator=generator).double()
        mask, shapes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4], [4, 4]])
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if task == "image":
        channels = getattr(model.config, "num_channels", 3)
        size = _image_size(model)
        return {"pixel_values": torch.randn(2, channels, size, size, generator=generator).double()}
    if task == "image-text" and _needs_images(model):
        channels, size = 3, _image_size(model)
        return {"input_ids": ids, "pixel_values": torch.randn(2, channels, size, size, generator=generator).double()}
    if task == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :8].clone()}
    if "musicgen" in model.config.model_type:  # a row for every codebook
        ids = ids.repeat(model.config.num_codebooks, 1)
    return {"input_ids": ids}


def _needs_images(model: Any) -> bool:
    images = inspect.signature(type(model).forward).parameters.get("pixel_values")
    required = images is not None and images.default is inspect.Parameter.empty
    return required or model.config.model_type == "pp_formulanet"


def _image_size(model: Any) -> int:
    vision = getattr(model.config, "vision_config", None)
    size = getattr(model.config, "image_size", None) or getattr(vision, "image_size", IMAGE)
    return size if isinstance(size, int) else int(size[0])
