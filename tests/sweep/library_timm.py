"""Networks of timm, one or two of each of its modules, with few blocks and small images."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from sweep_networks import Architecture
from torch import nn
from torchvision_operators import import_torchvision

import obc

PACKAGES = ("timm", "torchvision")
NAMES = """
beit_base_patch16_224 test_vit convnext_atto test_convnext2 efficientnet_b0 test_efficientnet mobilenetv3_small_050
mobilenetv4_conv_small mobilenetv4_hybrid_medium swin_tiny_patch4_window7_224 levit_128s regnety_002 regnetx_002
ghostnet_050 ghostnetv2_100 mobilevit_xxs mobilevitv2_050 edgenext_xx_small xcit_nano_12_p16_224 cait_xxs24_224
coat_lite_tiny coat_tiny efficientformer_l1 efficientformerv2_s0 fastvit_t8 poolformer_s12 caformer_s18 pvt_v2_b0
rdnet_tiny selecsls42 sequencer2d_s tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small visformer_tiny
volo_d1_224 hiera_tiny_224 sam2_hiera_tiny naflexvit_base_patch16_gap eva02_tiny_patch14_224 test_byobnet test_resnet
nest_tiny maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 gcvit_xxtiny
focalnet_tiny_srf davit_tiny crossvit_9_240 convit_tiny pit_ti_224 deit_tiny_distilled_patch16_224 mixer_s32_224
gmlp_ti16_224 resmlp_12_224 vit_relpos_small_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 mvitv2_tiny
tiny_vit_5m_224 nfnet_l0 test_nfnet dm_nfnet_f0 halonet26t lambda_resnet26t botnet26t_256 repvgg_a0 hrnet_w18_small
densenet121 dla34 dpn48b cspresnet50 cs3darknet_s darknet53 vovnet39a ese_vovnet19b_slim res2net50_14w_8s resnest14d
skresnet18 legacy_seresnet18 resnet18 resnetv2_18 resnetv2_50 rexnet_100 hardcorenas_a hgnet_tiny hgnetv2_b0
inception_v3 inception_v4 inception_resnet_v2 inception_next_atto lcnet_035 lcnetv2_small mambaout_femto
mobilenetv5_base repghostnet_050 repvit_m0_9 shvit_s1 starnet_s050 swiftformer_xs efficientvit_b0 efficientvit_m0
efficientvim_m1 fasternet_t0 iformer_t lowformer_b0 cpubone_b0_bfrobust csatv2 cspnext_tiny deepseek_vit_412m
gemma4_vit_167m qwen3_vit_88m nextvit_small nasnetalarge pnasnet5large samvit_base_patch16 vgg11_bn xception41
legacy_xception convmixer_768_32
"""
STANDARDISED = ("test_nfnet", "resnetv2_50x1_bit")
# Fewer blocks, in the ways in which the modules take them; the first that fits.
FEWER: tuple[dict[str, Any], ...] = ({"depth": 2}, {"depths": (1, 1, 1, 1)}, {"layers": (1, 1, 1, 1)}, {})
SIZE = 64
OF_ONE_SIZE = ("efficientformer_l1",)  # it takes images of the size that its biases are for, and does not say so
CLASSES = 7
_sizes: dict[str, tuple[int, ...]] = {}


def _build(name: str) -> nn.Module:
    import_torchvision()
    import timm

    channels, size, _ = timm.get_pretrained_cfg(name, allow_unregistered=True).input_size
    for images in ({},) if name in OF_ONE_SIZE else ({"img_size": SIZE}, {}):
        for fewer in FEWER:
            try:
                model: Any = timm.create_model(name, pretrained=False, num_classes=CLASSES, **images, **fewer)
            except (TypeError, AssertionError, ValueError, IndexError):  # an argument that this module does not take
                continue
            fixed = (name in OF_ONE_SIZE or model.pretrained_cfg.get("fixed_input_size")) and not images
            _sizes[name] = (channels, size, size) if fixed else (channels, SIZE, SIZE)
            return model
    raise AssertionError("no way to build it is known")


def _images(name: str, batch: int, generator: torch.Generator) -> Any:
    return torch.randn(batch, *_sizes[name], generator=generator)


def _plain(name: str) -> nn.Module:
    model = _build(name).eval()
    with torch.random.fork_rng():
        obc.plain_layers(model, _images(name, 2, torch.Generator().manual_seed(0)))
    return model


def architectures() -> Iterator[Architecture]:
    """One or two of each module; of some that standardise their weights also what `obc.plain_layers` makes of them."""
    for name in NAMES.split():
        yield Architecture(name, functools.partial(_build, name), functools.partial(_images, name))
    for name in STANDARDISED:
        yield Architecture(f"{name}:plain_layers", functools.partial(_plain, name), functools.partial(_images, name))
