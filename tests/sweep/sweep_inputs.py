"""A batch that a tiny model of a task takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from sweep_configs import IMAGE, POSITIONS, VOCABULARY
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
    if task == "image-text" and model.config.model_type == "pix2struct":  # patches with their rows and columns
        return {**next(images_of(model)), "decoder_input_ids": ids[:, :8].clone()}
    if task == "image-text" and _needs_images(model):
        channels, size = 3, _image_size(model)
        return {"input_ids": ids, "pixel_values": torch.randn(2, channels, size, size, generator=generator).double()}
    if task == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :8].clone()}
    if "musicgen" in model.config.model_type:  # a row for every codebook
        ids = ids.repeat(model.config.num_codebooks, 1)
    return {"input_ids": ids}


def images_of(model: Any) -> Iterator[dict[str, Tensor]]:
    """What ``get_image_features`` of a model may take: its parameters tell apart some layouts of two images, not all.

    A batch of the task has no images, because how many places for them a text must have differs between models.
    """
    features = getattr(model, "get_image_features", None)
    if features is None and model.config.model_type != "pix2struct":
        return
    accepted = inspect.signature(features or model.forward).parameters
    config = getattr(model.config, "vision_config", None) or model.config
    generator, size, grid = torch.Generator().manual_seed(1), _image_size(model), 4
    patch = getattr(config, "patch_size", None) or getattr(config, "spatial_patch_size", 8)
    patch = patch if isinstance(patch, int) else int(patch[0])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    if "flattened_patches" in accepted:
        rows = torch.arange(1.0, 5).repeat(2, 1)[..., None]
        yield {"flattened_patches": torch.cat([rows, rows, random(2, 4, 3 * patch**2)], -1)}
    elif "image_grid_thw" in accepted:
        grids = {"image_grid_thw": torch.tensor([[1, grid, grid]] * 2)}
        if "image_merge_sizes" in accepted:
            grids["image_merge_sizes"] = torch.tensor([1, 1])
        for layout in ((6 * patch**2,), (3 * patch**2,), (3, patch, patch)):  # of two frames, of one
            yield {"pixel_values": random(2 * grid**2, *layout), **grids}
    elif "spatial_shapes" in accepted:
        mask, shapes = torch.ones(2, grid**2, dtype=torch.long), torch.tensor([[grid, grid]] * 2)
        patches = random(2, grid**2, 3 * patch**2)
        yield {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    else:
        sizes = {"image_sizes": torch.tensor([[size, size]] * 2)} if "image_sizes" in accepted else {}
        for layout in ((2,), (2, 1), (2, 3)):  # images, images of a sample, tiles of an image
            if len(layout) > 1 and "pixel_attention_mask" in accepted:
                sizes["pixel_attention_mask"] = torch.ones(*layout, size, size, dtype=torch.long)
            yield {"pixel_values": random(*layout, 3, size, size), **sizes}


def sounds_of(model: Any) -> Iterator[dict[str, Tensor]]:
    """What ``get_audio_features`` of a model may take: spectra of two sounds, with the bands first or last."""
    features = getattr(model, "get_audio_features", None)
    if features is None:
        return
    accepted = inspect.signature(features).parameters
    parts = [getattr(model.config, name, None) for name in ("audio_config", "encoder_config")]
    config = next((part for part in parts if part is not None), model.config)
    bands = next((size for key in ("num_mel_bins", "input_dim") if (size := getattr(config, key, None))), 80)
    generator = torch.Generator().manual_seed(2)
    for steps in (2 * POSITIONS, 96, 200):  # Whisper's encoders want as many as positions, others multiples
        masks = [key for key in ("input_features_mask", "feature_attention_mask") if key in accepted]
        for shape in ((2, bands, steps), (2, steps, bands)):
            spectra = {"input_features": torch.randn(*shape, generator=generator).double()}
            yield spectra | {key: torch.ones(2, steps, dtype=torch.long) for key in masks}


# Method of a model -> what it may take. It computes what the model would put into its text.
FEATURES = {"get_image_features": images_of, "get_audio_features": sounds_of}


def _needs_images(model: Any) -> bool:
    images = inspect.signature(type(model).forward).parameters.get("pixel_values")
    required = images is not None and images.default is inspect.Parameter.empty
    return required or model.config.model_type == "pp_formulanet"


def _image_size(model: Any) -> int:
    vision = getattr(model.config, "vision_config", None)
    size = getattr(model.config, "image_size", None) or getattr(vision, "image_size", IMAGE)
    return size if isinstance(size, int) else int(size[0])
