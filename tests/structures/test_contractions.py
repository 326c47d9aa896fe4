"""Channels that only products of activations read: queries with keys, two towers, outer products, routed votes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.model.groups import ChannelGroup
from obc.structures.contractions import Contractions
from obc.structures.influence import Source, influences
from obc.structures.traced import TorchPruningStructure

SIZE = 8


class Net(nn.Module):
    """Tokens through a stem, a block of named layers, and a head."""

    def __init__(self, write: Callable[..., Tensor], **layers: nn.Module | nn.Parameter | int) -> None:
        super().__init__()
        self.stem, self.write, self.head = nn.Linear(6, 12), write, nn.Linear(12, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        y = self.write(self, self.stem(x).relu())
        return self.head(y.mean(1)) if y.shape[-1] == 12 else y


def lin(width: int = SIZE) -> nn.Linear:
    return nn.Linear(12, width)


def attended(net: Any, x: Tensor, scores: Tensor) -> Tensor:
    return x + net.out(scores.softmax(-1) @ net.v(x))


def embedded_gaussian(net: Any, x: Tensor) -> Tensor:
    """Non-local block: https://arxiv.org/abs/1711.07971."""
    return attended(net, x, net.q(x) @ net.k(x).transpose(1, 2))


def counted_width(net: Any, x: Tensor) -> Tensor:
    """The same as it is mostly written: one number is the width of all three."""
    q, k, v = (one(x).reshape(len(x), -1, net.inner) for one in (net.q, net.k, net.v))
    return x + net.out((torch.matmul(q, k.transpose(1, 2)) / x.shape[1]) @ v)


def with_norms(net: Any, x: Tensor) -> Tensor:
    """Each channel of the queries is normalised, and those of the keys together."""
    q = net.q_norm(net.q(x).transpose(1, 2)).transpose(1, 2)
    return attended(net, x, torch.bmm(q, net.k_norm(net.k(x)).transpose(1, 2)))


def cosine(net: Any, x: Tensor) -> Tensor:
    q, k = F.normalize(net.q(x), dim=-1), net.k(x)
    k = k / k.norm(dim=-1, keepdim=True)
    return attended(net, x, 5 * torch.einsum("bic,bjc->bij", q, k))


def fused(net: Any, x: Tensor) -> Tensor:
    q, k, v = net.q(x).chunk(3, -1)
    return x + net.out(F.scaled_dot_product_attention(q, k, v, scale=0.4))


def written_sum(net: Any, x: Tensor) -> Tensor:
    return x * (net.q(x) * net.k(x)).sum(-1, keepdim=True).sigmoid()


def similarity(net: Any, x: Tensor) -> Tensor:
    return x * F.cosine_similarity(net.q(x), net.k(x), dim=-1)[..., None]


def towers(net: Any, x: Tensor) -> Tensor:
    return F.normalize(net.q(x[:, 0]), dim=-1) @ F.normalize(net.k(x[:, 1]), dim=-1).t()


def gram(net: Any, x: Tensor) -> Tensor:
    """One layer's channels with themselves."""
    q = net.q(x)
    return x + (q @ q.mT).tanh() @ x


def features(net: Any, x: Tensor) -> Tensor:
    """Linear attention whose features are zero for a channel that is zero."""
    q, k, v = net.q(x).relu(), net.k(x).relu(), net.v(x)
    total = torch.einsum("bnd,bd->bn", q, k.sum(1)) + 0.1
    return x + net.out(torch.einsum("bnd,bde,bn->bne", q, torch.einsum("bnd,bne->bde", k, v), 1 / total))


def routed(net: Any, x: Tensor) -> Tensor:
    """Capsules: votes agree with their sum, https://arxiv.org/abs/1710.09829."""
    votes = net.q(x).unflatten(-1, (4, -1))
    logits = votes.new_zeros(votes.shape[:3])
    for _ in range(2):
        summed = (logits.softmax(-1)[..., None] * votes).sum(1)
        norm = (summed**2).sum(-1, keepdim=True)
        pose = summed * norm.sqrt() / (1 + norm)
        logits = logits + (votes * pose[:, None]).sum(-1)
    return net.out(pose.flatten(1))[:, None]


def outer(net: Any, x: Tensor) -> Tensor:
    """Bilinear pooling: https://arxiv.org/abs/1504.07889. Of every pair one factor can go."""
    y = (net.q(x).transpose(1, 2) @ net.z(x)).flatten(1)
    return net.out(y.sign() * (y.abs() + 1e-5).sqrt())


def attention_of(write: Callable[..., Tensor], **more: Any) -> Net:
    return Net(write, **{"q": lin(), "k": lin(), "v": lin(), "out": nn.Linear(SIZE, 12), **more})


def pair_of(write: Callable[..., Tensor], **more: Any) -> Net:
    return Net(write, **{"q": lin(), "k": lin(), **more})


QK = {("q", "out"), ("k", "out")}
VALUES = {("v", "out"), ("out", "in")}
NORMS = {"q_norm": nn.BatchNorm1d(SIZE), "k_norm": nn.LayerNorm(SIZE)}
# Name -> (model, what the group of the queries takes, its units, channels where gates read).
KINDS: dict[str, tuple[Callable[[], Net], set[tuple[str, str]], int, dict[tuple[str, str], int]]] = {
    "embedded gaussian": (lambda: attention_of(embedded_gaussian), QK, SIZE, {("q", "out"): 1}),
    "counted width": (
        lambda: attention_of(counted_width, inner=SIZE),
        QK | VALUES,
        SIZE,
        {("q", "out"): 1, ("out", "in"): 1},
    ),
    "with norms": (
        lambda: attention_of(with_norms, **copy.deepcopy(NORMS)),
        QK | {("q_norm", "out"), ("k_norm", "out")},
        SIZE,
        {("q_norm", "out"): 1},
    ),
    "cosine": (lambda: attention_of(cosine), QK, SIZE, {("q", "out"): 1}),
    "fused": (
        lambda: Net(fused, q=lin(3 * SIZE), out=nn.Linear(SIZE, 12)),
        {("q", "out"), ("out", "in")},
        SIZE,
        {("q", "out"): 1, ("out", "in"): 1},
    ),
    "written sum": (lambda: pair_of(written_sum), QK, SIZE, {("q", "out"): 1}),
    "similarity": (lambda: pair_of(similarity), QK, SIZE, {("q", "out"): 1}),
    "towers": (lambda: pair_of(towers), QK, SIZE, {("q", "out"): 1}),
    "gram": (lambda: Net(gram, q=lin()), {("q", "out")}, SIZE, {("q", "out"): 1}),
    "features": (lambda: attention_of(features), QK, SIZE, {("q", "out"): 1}),
    "routed": (
        lambda: Net(routed, q=lin(4 * SIZE), out=nn.Linear(4 * SIZE, 12)),
        {("q", "out"), ("out", "in")},
        SIZE,
        {("q", "out"): 4},
    ),
    "outer": (
        lambda: Net(outer, q=lin(), z=lin(), out=nn.Linear(SIZE * SIZE, 5)),
        {("q", "out"), ("out", "in")},
        SIZE,
        {("out", "in"): SIZE},
    ),
}


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(build: Callable[[], Net]) -> Net:
    torch.manual_seed(0)
    net = build().double().eval()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.LayerNorm)):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, 0, 0.3)  # type: ignore[arg-type]
    return net


def multiplied(net: Net, group: ChannelGroup, mask: Tensor, sides: dict[tuple[str, str], Tensor]) -> list[Any]:
    """Hooks that multiply channels of outputs and inputs by the entry of their unit in ``mask``."""
    handles = []
    for (name, side), channels in sides.items():
        module: Any = net.get_submodule(name)
        width = module.weight.shape[0 if side == "out" else 1]
        entries = mask[:, None].expand(channels.shape).flatten()
        factor = torch.ones(width, dtype=mask.dtype).index_copy(0, channels.flatten(), entries)
        factor = factor[:, None] if isinstance(module, nn.BatchNorm1d) else factor
        if side == "out":
            handles.append(module.register_forward_hook(lambda m, args, y, factor=factor: y * factor))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, args, factor=factor: (args[0] * factor,)))
    return handles


def group_of(structure: TorchPruningStructure) -> ChannelGroup:
    return next(g for g in structure.groups if any((p.module, p.side) == ("q", "out") for p in g.slices))


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", KINDS)
def test_channels_end_at_products_of_activations(name: str) -> None:
    """Truth: layers whose channels are multiplied by zero; for scores, autograd of a mask in their place."""
    build, members, size, gates = KINDS[name]
    net = built(build)
    structure = TorchPruningStructure(copy.deepcopy(net), tokens())
    group = group_of(structure)
    assert {(part.module, part.side) for part in group.slices} == members
    assert group.size == size
    assert {(part.module, part.side): part.channels.shape[1] for part in group.gates} == gates
    assert structure.proof is not None
    assert group.name in structure.proof.proved

    batches = [(tokens(seed), tokens(seed + 9).mean()) for seed in range(1, 4)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        y: Tensor = model(batch[0])
        return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() * batch[1]

    found = obc.score(net, batches, loss, keep_rows=True, progress=False).group([group], slices="gate")[group.name]
    expected = torch.zeros(size, dtype=torch.float64)
    for batch in batches:
        mask = torch.ones(size, dtype=torch.float64, requires_grad=True)
        handles = multiplied(net, group, mask, {(part.module, part.side): part.channels for part in group.gates})
        expected += torch.autograd.grad(loss(net, batch), mask)[0] ** 2
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))

    mask = torch.ones(size, dtype=torch.float64)
    for gone in ([size - 1, 1], [0]):
        left = torch.arange(size)[mask.bool()]
        mask[left[gone]] = 0
        structure.remove({group.name: torch.tensor(gone)})
    narrowed = {(part.module, part.side): part.channels for part in group.slices if "norm" not in part.module}
    if name == "with norms":  # the statistics of a norm over channels are those of the remaining ones
        stays = torch.arange(size)[mask.bool()]
        k_norm: Any = net.k_norm
        k_norm.forward = lambda k: torch.zeros_like(k).index_copy(
            2, stays, F.layer_norm(k[..., stays], (len(stays),), k_norm.weight[stays], k_norm.bias[stays], k_norm.eps)
        )
    multiplied(net, group, mask, narrowed)
    torch.testing.assert_close(structure.model(tokens(7)), net(tokens(7)), rtol=1e-10, atol=1e-12)


def scaled_by_width(net: Any, x: Tensor) -> Tensor:
    q = net.q(x)
    return attended(net, x, q @ net.k(x).mT * q.shape[-1] ** -0.5)


def scaled_inside(net: Any, x: Tensor) -> Tensor:
    return x + net.out(F.scaled_dot_product_attention(net.q(x), net.k(x), net.v(x)))


def softmax_over_channels(net: Any, x: Tensor) -> Tensor:
    return x + net.out(net.q(x).softmax(-1) @ (net.k(x).softmax(1).mT @ net.v(x)))


def mean_over_channels(net: Any, x: Tensor) -> Tensor:
    return attended(net, x, (net.q(x)[:, :, None] * net.k(x)[:, None]).mean(-1))


def never_zero(net: Any, x: Tensor) -> Tensor:
    q, k = F.elu(net.q(x)) + 1, F.elu(net.k(x)) + 1
    return x + net.out(q @ (k.mT @ net.v(x)) / (q @ k.sum(1)[..., None]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "write", [scaled_by_width, scaled_inside, softmax_over_channels, mean_over_channels, never_zero]
)
def test_products_that_depend_on_the_width_keep_it(write: Callable[..., Tensor]) -> None:
    """Truth: without channels that are zero they return something else."""
    net = built(lambda: attention_of(write))
    structure = TorchPruningStructure(copy.deepcopy(net), tokens())
    produced = {part.module for group in structure.groups for part in group.slices if part.side == "out"}
    assert {"q", "k"}.isdisjoint(produced)
    assert "v" in produced
    assert "q" in structure.left_out
    stays = torch.arange(SIZE - 2)
    masked, sliced = copy.deepcopy(net), copy.deepcopy(net)
    for name in ("q", "k"):
        for entry in ("weight", "bias"):
            whole = getattr(net.get_submodule(name), entry).detach()
            with torch.no_grad():
                getattr(masked.get_submodule(name), entry)[SIZE - 2 :] = 0
            setattr(sliced.get_submodule(name), entry, nn.Parameter(whole[stays]))
    assert not torch.allclose(masked(tokens(7)), sliced(tokens(7)), rtol=1e-6)


def test_layers_that_go_with_no_product_take_few_passes_more() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)

    def beside(net: Any, x: Tensor) -> Tensor:
        y = net.wide(x)
        return embedded_gaussian(net, x + net.narrow((y * y.roll(1, -1) + y.flip(-1)).relu()))

    net = attention_of(beside, wide=nn.Linear(12, 480), narrow=nn.Linear(480, 12)).eval()
    found, passes = {}, {}
    for names in ("qkv", ("q", "k", "v", "wide")):
        sources = {name: Source(name, SIZE if name != "wide" else 480) for name in names}
        found[len(names)], passes[len(names)] = influences(net, lambda one: one(x), sources, None, Contractions())
    assert not found[4]["wide"].inputs
    assert passes[4] - passes[3] <= 8  # six single channels, and all of them twice
    for name in "qkv":
        assert found[4][name].inputs.keys() == found[3][name].inputs.keys()
        assert all(torch.equal(one, found[3][name].inputs[key]) for key, one in found[4][name].inputs.items())
