"""A model's modules and tensors under the names that plans, scores and costs use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn


def joined(name: str, child: str) -> str:
    """The full name of a child; the model itself has an empty name."""
    return f"{name}.{child}" if name else child


def is_within(name: str, outer: str) -> bool:
    """Whether a module or tensor is ``outer`` or lies in it; everything lies in the model itself."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def outwards(name: str) -> Iterator[str]:
    """The name, then those of the modules around it, innermost first; the last is the model's own, which is empty."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def common(names: Iterable[str]) -> str:
    """The longest name that contains all names."""
    shared = []
    for words in zip(*(name.split(".") for name in names), strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module, under its first name: a module used twice has one entry in a plan."""
    return iter(model.named_modules(remove_duplicate=True))


def tensor_named(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    """The parameter or buffer of this full name."""
    owner, _, key = name.rpartition(".")
    tensor: Tensor = getattr(modules[owner], key)
    return tensor


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(module name, module, tensor name, tensor) of everything in a state dict, once per module."""
    for module_name, module in named_modules(model):
        yield from ((module_name, module, name, p.detach()) for name, p in module.named_parameters(recurse=False))
        yield from ((module_name, module, name, buffer) for name, buffer in saved_buffers(module))


def distinct_tensors(model: nn.Module, buffers: bool) -> Iterator[tuple[str, str, Tensor]]:
    """(module name, tensor name, tensor) of every parameter, and saved buffer; what modules share comes once."""
    seen: set[int] = set()
    for module_name, module in named_modules(model):
        for name, tensor in (*module.named_parameters(recurse=False), *(saved_buffers(module) if buffers else ())):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield module_name, name, tensor


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own buffers that are in its state dict."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer
