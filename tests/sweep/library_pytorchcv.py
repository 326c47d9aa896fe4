"""Networks of pytorchcv, one or two of each of its families, with half of their channels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from sweep_networks import Architecture, Inputs, drawn
from torch import nn

PACKAGES = ("pytorchcv",)
THINNER = 2
NAMES = """
bninception resnet10 resnetbc14b resnet18_wd4 preresnet10 preresnetbc14b
resnext14_16x4d seresnet10 seresnet26 sepreresnet10 seresnext50_32x4d senet16 resnestabc14 ibn_resnet50 ibnb_resnet50
ibn_resnext50_32x4d ibn_densenet121 airnet50_1x64d_r16 airnext50_32x4d_r2 bam_resnet18 cbam_resnet18 resattnet56
sknet50 scnet50 scneta50 regnetx002 regnety002 diaresnet10 diapreresnet10 pyramidnet101_a360 diracnet18v2 sharesnet18
sharesnet50 densenet121 condensenet74_c4_g4 sparsenet121 peleenet wrn50_2 drnc26 drnd22 dpn68 darknet_ref
darknet_tiny darknet53 channelnet revnet38 bagnet9 dla34 dla46c dla60x msdnet22 fishnet99 espnetv2_wd2
dicenet_wd2 hrnet_w18_small_v1 vovnet27s selecsls42 selecsls42b hardnet39ds hardnet68 xdensenet121_2 squeezenet_v1_1
squeezeresnet_v1_0 sqnxt23_w1 sqnxt23v5_w1 shufflenet_g1_w1 shufflenet_g3_w1 shufflenetv2_wd2 shufflenetv2b_wd2
menet108_8x1_g3 mobilenet_wd4 mobilenetb_wd4 fdmobilenet_wd4 mobilenetv2_wd4 mobilenetv2b_wd4 mobilenetv3_small_wd2
mobilenetv3_large_w7d20 igcv3_wd4 ghostnet mnasnet_b1 mnasnet_a1 mnasnet_small darts proxylessnas_cpu fbnet_cb xception
inceptionv3 inceptionv4 inceptionresnetv1 inceptionresnetv2 nasnet_4a1056 pnasnet5large spnasnet
efficientnet_b0 efficientnet_b0b efficientnet_edge_small_b mixnet_s nin_cifar10 resnet20_cifar10
preresnet20_cifar10 resnext20_16x4d_cifar10 seresnet20_cifar10 sepreresnet20_cifar10 pyramidnet110_a48_cifar10
densenet40_k12_cifar10 densenet40_k12_bc_cifar10 xdensenet40_2_k24_bc_cifar10 wrn16_10_cifar10 wrn20_10_1bit_cifar10
wrn20_10_32bit_cifar10 ror3_56_cifar10 rir_cifar10 msdnet22_cifar10 resdropresnet20_cifar10
shakeshakeresnet20_2x16d_cifar10 shakedropresnet20_cifar10 fractalnet_cifar10 diaresnet20_cifar10
diapreresnet20_cifar10 isqrtcovresnet18 resneta10 resnetd50b fastseresnet101b octresnet10_ad2
fcn8sd_resnetd50b_voc pspnet_resnetd50b_voc deeplabv3_resnetd50b_voc icnet_resnetd50b_cityscapes fastscnn_cityscapes
cgnet_cityscapes dabnet_cityscapes sinet_cityscapes bisenet_resnet18_celebamaskhq danet_resnetd50b_cityscapes
fpenet_cityscapes ctxnet_cityscapes lednet_cityscapes esnet_cityscapes edanet_cityscapes enet_cityscapes
erfnet_cityscapes linknet_cityscapes segnet_cityscapes unet_cityscapes sqnet_cityscapes espcnet_cityscapes
alphapose_fastseresnet101b_coco simplepose_resnet18_coco simplepose_mobile_mobilenetv2b_w1_coco
simplepose_mobile_mobilenetv3_small_w1_coco lwopenpose2d_mobilenet_cmupan_coco lwopenpose3d_mobilenet_cmupan_coco
ibppose_coco prnet centernet_resnet18_voc lffd20x5s320v2_widerface lffd25x8s560v1_widerface pfpcnet voca8flame
nvpattexp116bazel76 visemenet20 superpointnet jasper5x3 jasperdr10x5_en quartznet5x5_en_ls tresnet_m raft_small
"""
# Halved channels would not fit their groups, sums or constants.
_WHOLE = """
regnetx002 regnety002 sparsenet121 dpn68 espnetv2_wd2 hardnet68 menet108_8x1_g3 xception inceptionv3
seresnet20_cifar10 sepreresnet20_cifar10 pyramidnet110_a48_cifar10 cgnet_cityscapes dabnet_cityscapes
sinet_cityscapes espcnet_cityscapes nasnet_4a1056 icnet_resnetd50b_cityscapes
"""
WHOLE = set(_WHOLE.split())
# Size of images, where that is not 64; networks for CIFAR have 32.
_LARGE = """
scnet50 scneta50 inceptionv3 inceptionv4 inceptionresnetv1 inceptionresnetv2 sinet_cityscapes lffd20x5s320v2_widerface
"""
SIZES = dict.fromkeys(_LARGE.split(), 128) | {"msdnet22": 224}
_BACKBONE = {"backbone_out_channels": 2048}  # given, it is halved with the backbone
_FEATURES = {"from_audio": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "fcn8sd_resnetd50b_voc": _BACKBONE,
    "pspnet_resnetd50b_voc": _BACKBONE,
    "deeplabv3_resnetd50b_voc": _BACKBONE,
    "danet_resnetd50b_cityscapes": _BACKBONE,
    "jasper5x3": _FEATURES,
    "jasperdr10x5_en": _FEATURES,
    "quartznet5x5_en_ls": _FEATURES,
}


def _speech(batch: int, generator: torch.Generator) -> Any:
    return torch.randn(batch, 64, 96, generator=generator), torch.full((batch,), 96)


def _faces(*shape: int, count: tuple[int, ...] = ()) -> Inputs:
    """Sound, and whose face it moves."""
    return lambda batch, generator: (
        torch.randn(batch, *shape, generator=generator),
        torch.randint(4, (batch, *count), generator=generator),
    )


def _two_images(batch: int, generator: torch.Generator) -> Any:
    return tuple(torch.randn(batch, 3, 128, 128, generator=generator) for _ in range(2))


INPUTS: dict[str, Inputs] = {
    "superpointnet": drawn(1, 64, 64),
    "pfpcnet": drawn(1, 64, 64),
    "jasper5x3": _speech,
    "jasperdr10x5_en": _speech,
    "quartznet5x5_en_ls": _speech,
    "voca8flame": _faces(1, 16, 29),
    "visemenet20": _faces(8, 76, count=(76,)),
    "nvpattexp116bazel76": _faces(32, 32, 64),
    "raft_small": _two_images,
}


def _halved(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_halved(one) for one in value)
    return value // THINNER if isinstance(value, int) and value % THINNER == 0 and value >= 16 else value


def _thin(init: Callable[..., None], depth: list[int]) -> Callable[..., None]:
    """A constructor that gets fewer channels where it is not called by another one."""

    @functools.wraps(init)
    def thin(self: nn.Module, *args: Any, **given: Any) -> None:
        if not depth[0]:
            given = {
                key: _halved(value) if "channels" in key and key != "in_channels" else value
                for key, value in given.items()
            }
        depth[0] += 1
        try:
            init(self, *args, **given)
        finally:
            depth[0] -= 1

    return thin


@functools.cache
def _modules() -> list[ModuleType]:
    import pytorchcv.models as models

    names = [
        one.name for one in pkgutil.iter_modules(models.__path__) if not one.ispkg and "propainter" not in one.name
    ]
    return [importlib.import_module(f"pytorchcv.models.{name}") for name in names]


@contextlib.contextmanager
def _thinner() -> Iterator[None]:
    depth = [0]
    classes = {
        one
        for module in _modules()
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, nn.Module) and one.__module__ == module.__name__
    }
    with contextlib.ExitStack() as stack:
        for one in classes:
            if "__init__" in vars(one):
                stack.enter_context(mock.patch.object(one, "__init__", _thin(one.__init__, depth)))
        yield


def _build(name: str) -> nn.Module:
    make = next(getattr(module, name) for module in _modules() if hasattr(module, name))
    given = {"in_size": (_size(name),) * 2, "num_classes": 10}
    given = {key: value for key, value in given.items() if key in _parameters(make)}
    if name.startswith(("efficientnet", "nasnet")):  # which insist on the size that they were made for
        given.pop("in_size")
    with contextlib.nullcontext() if name in WHOLE else _thinner():
        model = make(**given, **OPTIONS.get(name, {}))
    pools = [] if "cifar" in name else [*model.named_modules()]
    for place, pool in pools:  # the last one, for images of 224 x 224
        if isinstance(pool, nn.AvgPool2d) and ("final" in place or max(nn.modules.utils._pair(pool.kernel_size)) > 6):
            model.set_submodule(place, nn.AdaptiveAvgPool2d(1))
    return model


def _size(name: str) -> int:
    return SIZES.get(name, 32 if "cifar" in name else 64)


def _parameters(make: Callable[..., nn.Module]) -> set[str]:
    """The parameters of the classes in the file of ``make``, which passes them on."""
    classes = [one for one in vars(inspect.getmodule(make)).values() if inspect.isclass(one)]
    own = [one for one in classes if one.__module__ == make.__module__]
    return {key for one in own for key in inspect.signature(one).parameters}


def architectures() -> Iterator[Architecture]:
    """One of each family, and a second where it is built otherwise."""
    for name in NAMES.split():
        size = _size(name)
        yield Architecture(name, functools.partial(_build, name), INPUTS.get(name, drawn(3, size, size)))
