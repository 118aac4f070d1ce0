"""`SlimModule`: an nn.Module without tables of hooks until a hook is registered.

nn.Module keeps a dozen empty tables, 1.8 kB. That is nothing for a layer, but a tenth of a rank-4 adapter of a small
model, of which a server holds thousands.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_TABLES = {
    name: type(value) for name, value in nn.Module().__dict__.items() if isinstance(value, (OrderedDict, set))
}  # of hooks, and the names of buffers that are not saved


class _Empty(OrderedDict[Any, Any]):
    """What a reader of a table that is not there sees, one for all: it may be cleared, not written to."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("This module has no table of hooks yet. Add hooks by register_forward_hook and its like.")


_EMPTY = _Empty()


class SlimModule(nn.Module):
    """nn.Module in everything; `slim()` drops what is empty."""

    def slim(self) -> None:
        """Drop the empty tables of this module and of those within."""
        for module in self.modules():
            if isinstance(module, SlimModule):
                for name in _TABLES:
                    if not module.__dict__.get(name, True):
                        del module.__dict__[name]

    def __getattr__(self, name: str) -> Any:
        if name in _TABLES:  # loading one adapter reads the tables of all: they stay away
            return _EMPTY if _TABLES[name] is OrderedDict else self.__dict__.setdefault(name, _TABLES[name]())
        return super().__getattr__(name)


def _with_tables(register: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(register)
    def wrapped(self: SlimModule, *args: Any, **kwargs: Any) -> Any:
        for name, kind in _TABLES.items():
            self.__dict__.setdefault(name, kind())
        return register(self, *args, **kwargs)

    return wrapped


for _name in dir(nn.Module):
    if _name.endswith("_hook") and _name.lstrip("_").startswith("register_"):
        setattr(SlimModule, _name, _with_tables(getattr(nn.Module, _name)))


@torch.no_grad()
def pack(modules: Sequence[nn.Module]) -> None:
    """Put the frozen weights of an adapter into one block of memory, and its modules into their slim form.

    A tensor of its own costs an allocation that leaves gaps, and the bookkeeping of a gradient; a view costs neither.
    """
    kept: dict[Any, list[tuple[nn.Module, str, Tensor]]] = {}
    for top in modules:
        for module in top.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta and type(parameter) is nn.Parameter and type(parameter.data) is Tensor:
                    kept.setdefault((parameter.dtype, parameter.device), []).append((module, name, parameter))
    for members in kept.values():
        block = torch.cat([parameter.detach().reshape(-1) for _, _, parameter in members])
        start = 0
        for module, name, weight in members:
            view = block[start : start + weight.numel()].view(weight.shape).data  # with a count of changes of its own
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
            start += weight.numel()
    for top in modules:
        if isinstance(top, SlimModule):
            top.slim()
