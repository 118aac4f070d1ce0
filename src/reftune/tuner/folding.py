"""Which linear layers an edit can be folded into: by structure first, then by what a probe of the model shows."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..interventions.forms import Form
from .probing import Probe

CANNOT = "This ReFT adapter cannot be merged into the weights: "
KEEP = " Or keep the adapter: save_pretrained, and unload() for the base model without it."


@dataclass(frozen=True)
class Fold:
    """How the linear layer at `path` takes the edit: on its output or input, or, a constant, by a shift of its bias
    that reaches the edited state multiplied by `scale`."""

    path: str
    how: Literal["output", "input", "shift"]
    scale: float = 1.0


def find_folds(model: nn.Module, probe: Probe, site: str, form: Form) -> list[Fold]:
    """The folds of an affine edit at a site such as "model.layers.3.mlp.output": one, or one for each linear layer that
    reads an edited input. A ValueError where there is none."""
    path, _, where = site.rpartition(".")
    module = model.get_submodule(path)
    if is_linear(module):
        return [_usable(model, Fold(path, "output" if where == "output" else "input"))]
    inside = {f"{path}.{name}": child for name, child in module.named_modules() if is_linear(child)}
    if where == "input":
        readers = _readers(probe, path, module, inside)
        if not readers:
            raise ValueError(
                f"{CANNOT}no linear layer in '{path}' ({type(module).__name__}) reads its input as it comes: there is "
                "a norm or a residual before. component='attention_input' and 'mlp_input' can be merged where those "
                f"parts begin with linear layers, and the output of a linear layer can.{KEEP}"
            )
        return [_usable(model, Fold(name, "input")) for name in readers]
    seen = probe.outputs({**inside, path: module})
    states = seen.pop(path, [])
    if len(states) == 1:
        called = [
            name for name in reversed(seen) if len(seen[name]) == 1 and seen[name][0].numel() == states[0].numel()
        ]
        for name in called:
            if torch.equal(seen[name][0].reshape(states[0].shape), states[0]):
                return [_usable(model, Fold(name, "output"))]
        for name in called if form.is_constant else ():
            scale = probe.shift(inside[name], module)
            if scale is not None:
                return [_usable(model, Fold(name, "shift", scale))]
    what = "a constant edit" if form.is_constant else "an edit that depends on the state"
    raise ValueError(
        f"{CANNOT}{what} at '{site}' is no change of one linear layer, because what {type(module).__name__} gives out "
        "is not a linear layer's output (there is a residual, a norm, a gate or a choice of experts after it). "
        "What can be merged: component='mlp_output' or 'attention_output' where the block's part ends in a linear "
        "layer, component='<path of a linear layer>.output', and constant edits (intervention='lobireft') of the block "
        f"output where a linear layer is added to the residual, all with positions='all'.{KEEP}"
    )


def _readers(probe: Probe, path: str, module: nn.Module, inside: dict[str, nn.Module]) -> list[str]:
    """The linear layers inside that read the module's own input. That nothing else does, the merged model shows."""
    seen = probe.inputs_of({**inside, path: module})
    states = seen.pop(path, [])
    if len(states) != 1:
        return []
    same = states[0].numel()
    called = [name for name in seen if len(seen[name]) == 1 and seen[name][0].numel() == same]
    return [name for name in called if torch.equal(seen[name][0].reshape(states[0].shape), states[0])]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _usable(model: nn.Module, fold: Fold) -> Fold:
    """Refuse layers whose weights cannot simply be rewritten."""
    weight = model.get_submodule(fold.path).weight
    plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and weight.is_floating_point()  # type: ignore[union-attr]
    if not plain or weight.is_meta:  # type: ignore[union-attr]
        kind = "offloaded" if getattr(weight, "is_meta", False) else type(weight).__name__
        raise ValueError(
            f"{CANNOT}the weight of '{fold.path}' is quantised, sharded or offloaded ({kind}). Load the base whole, in "
            "bf16 or fp32, put the adapter on that and merge there."
        )
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(names) > 1:
        raise ValueError(
            f"{CANNOT}'{names[0]}' is the same tensor as '{names[1]}', so that folding the edit into one would change "
            f"the other.{KEEP}"
        )
    return fold
