"""Tensors with one value per channel, parameters and buffers, are cut with the channels that pass them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from random_wirings import zero_inputs

import obc
from obc.structures.memory import MemoryUse
from obc.structures.traced import TorchPruningStructure


class Holder(nn.Module):
    """Tensors, and what they do to 8 channels; names of buffers begin with ``b_``, of unsaved ones with ``n_``."""

    def __init__(self, does: Callable[[Any, Tensor], Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.does = does
        for name, tensor in tensors.items():
            if name.startswith(("b_", "n_")):
                self.register_buffer(name, tensor, persistent=name.startswith("b_"))
            else:
                setattr(self, name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def wide(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1, 1, 1)


def frozen_norm(net: Any, x: Tensor) -> Tensor:
    """The BatchNorm of DETR and of torchvision's detectors."""
    scale = wide(net.b_weight) * (wide(net.b_var) + 1e-5).rsqrt()
    return x * scale + (wide(net.b_bias) - wide(net.b_mean) * scale)


def own_norm(net: Any, x: Tensor) -> Tensor:
    return (x - wide(net.b_mean)) / (net.b_var + 1e-5).sqrt() * wide(net.weight) + wide(net.bias)


class Extended(nn.BatchNorm2d):
    """A BatchNorm with a further scale, and a table that has nothing to do with channels."""

    def __init__(self) -> None:
        super().__init__(8)
        self.register_buffer("scale", some(1, 8, 1, 1))
        self.register_buffer("table", torch.arange(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def counted(net: Any, x: Tensor) -> Tensor:
    net.b_count.mul_(1)  # tracing can't follow a buffer that a forward writes to
    return x * net.b_scale


def in_training(does: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda net, x: does(net, x) if net.training else x


def centred(net: Any, x: Tensor) -> Tensor:
    net.b_mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
    return x - wide(net.b_mean)


class Unscaled(nn.LayerNorm):
    """A norm over the channels without a weight, but with a buffer."""

    def __init__(self, persistent: bool) -> None:
        super().__init__(8, elementwise_affine=False)
        self.register_buffer("shift", some(8), persistent)

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x.movedim(1, -1)) + self.shift).movedim(-1, 1)


def some(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def four(**more: Tensor) -> dict[str, Tensor]:
    return {"b_bias": some(8), "b_mean": some(8), "b_var": some(8), **more}


# What lies behind each convolution of 8 channels.
KINDS: dict[str, Callable[[], nn.Module]] = {
    "frozen norm": lambda: Holder(frozen_norm, b_weight=some(8), **four()),
    "fresh frozen norm": lambda: Holder(
        frozen_norm, b_weight=torch.ones(8), b_bias=torch.zeros(8), b_mean=torch.zeros(8), b_var=torch.ones(8)
    ),
    "norm of its own": lambda: Holder(own_norm, weight=some(8), bias=some(8), b_mean=some(8), b_var=some(1, 8, 1, 1)),
    "extended norm": Extended,
    "scale (C, 1, 1)": lambda: Holder(lambda net, x: x * net.scale, scale=some(8, 1, 1)),
    "buffer (C, 1, 1)": lambda: Holder(lambda net, x: x * net.b_scale, b_scale=some(8, 1, 1)),
    "buffer (1, C, 1, 1)": lambda: Holder(lambda net, x: x + net.b_shift, b_shift=some(1, 8, 1, 1)),
    "buffer per position": lambda: Holder(lambda net, x: x + net.b_place, b_place=some(1, 8, 6, 6)),
    "parameter and buffer": lambda: Holder(
        lambda net, x: x * net.scale + net.b_shift, scale=some(1, 8, 1, 1), b_shift=some(1, 8, 1, 1)
    ),
    "quantiser": lambda: Holder(
        lambda net, x: ((x / wide(net.b_scale)).round() + wide(net.b_zero)) * wide(net.b_scale),
        b_scale=0.1 * some(8),
        b_zero=torch.arange(8),
        b_low=torch.zeros(8),
        b_on=torch.ones(1),
    ),
    "unsaved scale": lambda: Holder(lambda net, x: x * net.n_scale, n_scale=some(8, 1, 1)),
    "unsaved frozen norm": lambda: Holder(
        lambda net, x: x * wide(net.n_var) + wide(net.n_mean), n_mean=some(8), n_var=some(8)
    ),
    "unsaved and saved": lambda: Holder(
        lambda net, x: x * wide(net.b_scale) + wide(net.n_shift), b_scale=some(8), n_shift=some(8)
    ),
    "unsaved per position": lambda: Holder(lambda net, x: x + net.n_place, n_place=some(1, 8, 6, 6)),
    "training's mean": lambda: Holder(in_training(centred), b_mean=some(8)),
    "training's buffer": lambda: Holder(in_training(lambda net, x: x * wide(net.b_scale)), b_scale=some(8)),
    "training's unsaved": lambda: Holder(in_training(lambda net, x: x + net.n_shift), n_shift=some(1, 8, 1, 1)),
    "training's parameter": lambda: Holder(in_training(lambda net, x: x * net.scale), scale=some(1, 8, 1, 1)),
    "written to": lambda: Holder(counted, b_scale=some(1, 8, 1, 1), b_count=torch.zeros(2)),
}


class Net(nn.Module):
    """A convolution inside a residual branch, and two whose outputs are added."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.behind = nn.ModuleList(kind() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.behind[0](self.stem(x)))
        y = self.behind[2](self.outer(F.relu(self.behind[1](self.inner(x)))))
        return self.head(F.relu(x + y).mean((2, 3)))


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_exact(net: nn.Module, structure: TorchPruningStructure, run: Callable[[nn.Module], Tensor]) -> None:
    """Truth: what a layer loses of its inputs is zero there in the unpruned model."""
    masked = copy.deepcopy(net)
    for part, kept in structure.plan.items():
        if kept.in_columns is not None:
            layer: Any = masked.get_submodule(part)
            zero_inputs(layer, sorted(set(range(layer.weight.shape[1])) - set(kept.in_columns.tolist())))
    torch.testing.assert_close(run(structure.model), run(masked), rtol=1e-12, atol=1e-12)
    applied = structure.plan.apply(copy.deepcopy(net))
    applied.load_state_dict(structure.model.state_dict())
    torch.testing.assert_close(run(applied), run(structure.model), rtol=0, atol=0)


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_with_one_value_per_channel_are_cut_with_the_channels(kind: str) -> None:
    torch.manual_seed(0)
    net = Net(KINDS[kind]).double().eval()
    structure = TorchPruningStructure(copy.deepcopy(net), images())
    assert {group.name: group.size for group in structure.groups} == {"stem": 8, "inner": 8}
    assert structure.proof is not None
    assert not structure.proof.unproved
    parameters, memory = structure.costs("parameters"), structure.memory(MemoryUse())
    structure.remove({"stem": torch.tensor([1, 6]), "inner": torch.tensor([0, 3])})
    structure.remove({"inner": torch.tensor([5])})
    assert_exact(net, structure, lambda model: model(images()))
    assert_exact(net, structure, run_in_training)
    pruned, widths = structure.model, torch.tensor([6, 5])
    assert parameters.total(widths) == sum(parameter.numel() for parameter in pruned.parameters())
    saved = pruned.state_dict().values()
    assert memory.total(widths) == sum(tensor.numel() * tensor.element_size() for tensor in saved)
    structure.plan.verify(net.state_dict(), pruned)
    for key, tensor in (*net.behind[0].named_parameters(), *net.behind[0].named_buffers()):
        axes = [axis for axis, length in enumerate(tensor.shape) if length == 8]
        want = tensor.index_select(axes[0], torch.tensor([0, 2, 3, 4, 5, 7])) if axes else tensor
        torch.testing.assert_close(getattr(pruned.behind[0], key), want, rtol=0, atol=0)


def run_in_training(model: nn.Module) -> Tensor:
    """On a copy: training may write into buffers. The channels of a batch norm depend on their mean there, not here."""
    trained = copy.deepcopy(model).train()
    for norm in (module for module in trained.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()
    return trained(images())


@pytest.mark.parametrize("persistent", [True, False])
def test_a_norm_without_a_weight_but_with_a_buffer_has_the_new_size(persistent: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Unscaled(persistent), nn.ReLU(), nn.Conv2d(8, 5, 1)).double().eval()
    structure = TorchPruningStructure(copy.deepcopy(net), images())
    assert structure.proof is not None
    assert structure.proof.proved == ["0"]
    structure.remove({"0": torch.tensor([1, 6])})
    norm = structure.model[1]
    assert norm.normalized_shape == (6,)
    torch.testing.assert_close(norm.shift, net[1].shift[[0, 2, 3, 4, 5, 7]], rtol=0, atol=0)
    want = F.layer_norm(net[0](images())[:, [0, 2, 3, 4, 5, 7]].movedim(1, -1), (6,)) + norm.shift
    torch.testing.assert_close(structure.model[:2](images()), want.movedim(-1, 1))


def test_what_training_only_writes_keeps_the_layer() -> None:
    """No output shows which of its entries belong to which channels."""

    def watched(net: Any, x: Tensor) -> Tensor:
        net.b_mean.add_(x.detach().mean((0, 2, 3)))
        return x

    torch.manual_seed(0)
    net = Net(lambda: Holder(in_training(watched), b_mean=torch.zeros(8)))
    structure = TorchPruningStructure(net, images().float())
    assert not structure.groups
    assert "of the 8 units in 'behind.1': " in structure.left_out["inner"]


def test_a_buffer_with_two_dimensions_of_the_channels_length_keeps_the_layer() -> None:
    def centred(net: Any, x: Tensor) -> Tensor:
        if net.training:
            net.b_covariance.add_(torch.cov(x.detach().transpose(0, 1).flatten(1)))
        return x * net.scale

    torch.manual_seed(0)
    net = Net(lambda: Holder(centred, scale=some(8, 1, 1), b_covariance=torch.zeros(8, 8)))
    left_out = TorchPruningStructure(net, images().float()).left_out
    assert {"stem", "inner"} <= left_out.keys()
    assert "'behind.1.b_covariance'" in left_out["inner"]
    assert "(8, 8)" in left_out["inner"]


def test_a_product_with_a_buffer_keeps_the_layer() -> None:
    net = Net(lambda: Holder(lambda net, x: torch.einsum("oc,bchw->bohw", net.b_mix, x), b_mix=some(8, 8)))
    left_out = TorchPruningStructure(net, images().float()).left_out
    assert "a product outside layers with 'behind.1.b_mix'" in left_out["inner"]


def test_buffers_behind_an_operation_that_tracing_does_not_follow() -> None:
    """Every second channel comes first; running the model finds which entry belongs to which."""

    def shuffled(net: Any, x: Tensor) -> Tensor:
        return frozen_norm(net, x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), Holder(shuffled, b_weight=some(8), **four()), nn.ReLU(), nn.Conv2d(8, 5, 1)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 3))
    net = net.double().eval()
    structure = TorchPruningStructure(copy.deepcopy(net), images())
    assert next(group.name for group in structure.groups) == "0", structure.left_out
    structure.remove({"0": torch.tensor([1])})
    assert len(structure.model[1].b_mean) == 8 - structure.groups[0].slices[0].channels.shape[1]
    assert_exact(net, structure, lambda model: model(images()))


def test_frozen_statistics_are_neither_scored_nor_recalibrated() -> None:
    torch.manual_seed(0)
    net = Net(KINDS["frozen norm"])
    net.behind[2] = nn.BatchNorm2d(8)
    net(torch.randn(64, 3, 6, 6))
    before = copy.deepcopy(net.state_dict())
    batches = [(torch.randn(8, 3, 6, 6), torch.randint(5, (8,))) for _ in range(4)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    result = obc.prune(net, batches[0][0], batches, loss, macs=0.6, compensate=True)
    cut = [key for key in result.plan if key.startswith("behind.1.b_")]
    assert len(cut) == 4
    for key, kept in result.plan.items():
        if ".b_" in key:
            assert kept.out_channels is not None
            torch.testing.assert_close(result.model.state_dict()[key], before[key][kept.out_channels], rtol=0, atol=0)
    norm = result.model.behind[2]
    followed = norm.running_mean.clone()
    obc.recalibrate_norms(result.model, [(2 * images + 1, labels) for images, labels in batches])
    assert not torch.equal(norm.running_mean, followed)
    for key, kept in result.plan.items():
        if ".b_" in key:
            torch.testing.assert_close(result.model.state_dict()[key], before[key][kept.out_channels], rtol=0, atol=0)


def test_a_detector_of_transformers_with_frozen_norms() -> None:
    """DETR: every width of its backbone can be pruned, exactly."""
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[12, 16], depths=[1, 1], layer_type="bottleneck", out_features=["stage2"]
    )
    sizes = {"num_queries": 3, "d_model": 8, "encoder_layers": 0, "decoder_layers": 0, "num_labels": 2}
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, **sizes
    )
    torch.manual_seed(0)
    net = transformers.DetrForObjectDetection(config).double().eval()
    for key, buffer in net.named_buffers():
        if ".normalization." in key:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def run(model: nn.Module) -> Any:
        features, _ = model.model.backbone(pixels, torch.ones(1, 32, 32, dtype=torch.int64))[-1]
        return model.model.input_projection(features)

    structure = TorchPruningStructure(copy.deepcopy(net), pixels, forward_fn=lambda model, _: run(model))
    assert sorted(group.size for group in structure.groups) == [3, 3, 4, 4, 8, 12, 16], structure.left_out
    structure.remove({group.name: torch.tensor([0, 2]) for group in structure.groups})
    assert_exact(net, structure, run)
