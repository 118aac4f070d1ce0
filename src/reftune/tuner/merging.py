"""Folding adapters into the weights: `merge_and_unload()` where an edit is exactly a change of linear layers.

With y = W x + k the output of a linear layer and Δ(y) = M y + m an affine edit of every token's y:

    output   y + Δ(y) = (I + M) W x + (I + M) k + m
    input    W (x + Δ(x)) + k = W (I + M) x + W m + k, in each layer that reads x
    constant, further up: where shifting y by v shifts the edited state by αv, m/α goes into k

Everything is planned, checked on a probe and computed before any weight is touched; `folding` says which layer.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..interventions import Intervention
from ..interventions.forms import Form, NoFormError, form_of
from ..positions import Term, parse
from .folding import CANNOT, KEEP, Fold, find_folds
from .layer import ReftLayer
from .mix import How, Mix
from .probing import Probe, add_biases, bias_flags

if TYPE_CHECKING:
    from .model import ReftModel


class Merged:
    """The new weight and bias of one linear layer: computed in fp64, then kept in its dtype until they are put in."""

    def __init__(self, linear: Any, folds: list[tuple[Form, Fold]]) -> None:
        self.linear, self.transposed = linear, type(linear).__name__ == "Conv1D"
        weight = _wide(linear.weight)
        weight = weight.mT if self.transposed else weight
        bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else _wide(linear.bias)
        for form, fold in folds:
            weight, bias = _folded(weight, bias, _on(form, weight), fold)
        self.weight = (weight.mT if self.transposed else weight).to(linear.weight)
        self.bias = bias.to(linear.weight)

    @property
    def lacks_bias(self) -> bool:
        return self.linear.bias is None and bool(self.bias.any())

    @property
    def finite(self) -> bool:
        return bool(self.weight.isfinite().all() and self.bias.isfinite().all())

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange these with what is in the layer: once puts them in, twice puts everything back."""
        for name in ("weight", "bias"):
            there = getattr(self.linear, name)
            if there is not None:
                before = there.detach().clone()
                there.copy_(getattr(self, name))
                setattr(self, name, before)


def _folded(weight: Tensor, bias: Tensor, form: Form, fold: Fold) -> tuple[Tensor, Tensor]:
    """W (out, in) and k (out,) with one affine edit taken in."""
    if fold.how == "shift":
        return weight, bias + form.constant / fold.scale
    if fold.how == "output":
        change = form.up.mT @ (form.down @ weight)
        if form.diagonal is not None:
            change = change + form.diagonal[:, None] * weight
        return weight + change, bias + form(bias)
    change = (weight @ form.up.mT) @ form.down
    if form.diagonal is not None:
        change = change + weight * form.diagonal
    return weight + change, bias + weight @ form.constant


def merge(tuner: "ReftModel", adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Fold adapters into the base model's weights; the adapters themselves stay until they are unloaded.

    What is folded is what the model computes: its mix, else its active adapters one after the other, or those that
    `adapter_names` lists. Biases that the architecture has behind a config flag (`mlp_bias`, `attention_bias`) are
    added where an edit has a constant, all others zero. `safe_merge=True` refuses NaN and infinite results.

    Raises ValueError, with nothing changed, where the edit is not exactly a change of one linear layer.
    """
    model = tuner.model
    _check_base(model)
    if not tuner.session.enabled:
        raise ValueError(f"{CANNOT}its edits are switched off, so the model computes without them.{KEEP}")
    strengths, how = _strengths(tuner, adapter_names)
    _check_lora(tuner, strengths)
    named = None if adapter_names is None else list(strengths)  # else the active ones' modules are in use
    _check_whole(model, named or ())
    edits = _edits(tuner, strengths, how)
    probe = Probe(model, tuner.session)
    folds: dict[str, list[tuple[Form, Fold]]] = {}
    for site, form in edits:
        for fold in find_folds(model, probe, site, form):
            folds.setdefault(fold.path, []).append((form, fold))
    merged = {path: Merged(model.get_submodule(path), found) for path, found in folds.items()}
    if safe_merge:
        for path, new in merged.items():
            if not new.finite:
                raise ValueError(f"NaN or infinite values in the merged weights of '{path}': nothing was merged.")
    flags = _flags_for_biases(model, merged)
    with tuner.session.mixing(Mix(strengths, how)):
        wanted = probe.run() if merged and probe.possible else None
    without_biases = add_biases(model, flags)
    for new in merged.values():
        new.swap()
    try:
        if wanted is not None:
            _check_same(probe, wanted)
    except BaseException:
        for new in merged.values():
            new.swap()
        without_biases()
        raise
    _unwrap(model, named)


def _check_same(probe: Probe, wanted: Tensor) -> None:
    """The last check: the model without its adapters computes what it computed with them."""
    with probe.session_off():
        found = probe.run()
    off = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    if off <= (1e-3 if wanted.dtype in (torch.float32, torch.float64) else 0.2):  # halves round the new weights
        return
    raise ValueError(
        f"{CANNOT}on a random input the merged model differs from the adapter's by {off:.1e} of the largest output, so "
        f"that the layer found is not the one that the edit belongs to. The weights are as they were.{KEEP}"
    )


def _check_base(model: nn.Module) -> None:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        config: Any = getattr(model.config, "quantization_config", None)
        method = getattr(config, "quant_method", type(model).__name__)
        raise ValueError(
            f"{CANNOT}the base model is quantised ({getattr(method, 'value', method)}), and its weights cannot hold "
            "the edit exactly. Load the base in bf16 or fp32, put the adapter on that and merge there."
        )


def _edits(tuner: "ReftModel", strengths: dict[str, float], how: How) -> list[tuple[str, Form]]:
    """(site, form) of everything to be folded, the deepest modules first: there an edit comes before its parents'."""
    found = []
    for path, layer in tuner.model.named_modules():
        if not isinstance(layer, ReftLayer):
            continue
        form: Form | None = None
        for adapter, strength in strengths.items():
            for (_, group), intervention in zip(
                layer.groups.get(adapter, ()), layer.interventions(adapter), strict=True
            ):
                _check_positions(adapter, path, group)
                one = _affine(path, intervention).scaled(strength)
                form = one if form is None else form.plus(one) if how == "sum" else form.then(one)
        if form is not None:
            found.append((_site(path), form))
    return sorted(found, key=lambda edit: (-edit[0].count("."), edit[0].endswith(".output")))


def _affine(path: str, intervention: Intervention) -> Form:
    try:
        form = form_of(intervention)
    except NoFormError as error:
        raise ValueError(f"{CANNOT}at '{_site(path)}' {error}, so it is no affine edit.{KEEP}") from None
    if form.act_fn is not None:
        raise ValueError(
            f"{CANNOT}at '{_site(path)}' the source passes through act_fn={form.act_fn!r}, and a linear layer has no "
            f"such function. An edit without act_fn can be merged.{KEEP}"
        )
    return form


def _strengths(tuner: "ReftModel", adapter_names: list[str] | None) -> tuple[dict[str, float], How]:
    mix = tuner.session.state.mix or tuner.session.mix
    if adapter_names is None and mix is not None:
        return mix.active(), mix.how
    names = list(adapter_names if adapter_names is not None else tuner.active_adapters)
    unknown = [name for name in names if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"There is no adapter {unknown[0]!r}; this model has {sorted(tuner.peft_config)}.")
    return dict.fromkeys(names, 1.0), "sequence"


def _check_lora(tuner: "ReftModel", adapters: Iterable[str]) -> None:
    for name in adapters:
        if getattr(tuner.peft_config[name], "lora", None):
            raise ValueError(
                f"{CANNOT}{name!r} has a LoRA adapter with it. Merge that one into the base first, with PEFT, and put "
                f"the edits alone on the result.{KEEP}"
            )


def _check_positions(adapter: str, path: str, group: str) -> None:
    terms = parse(group)
    everywhere = Term("all") in terms or {Term("prompt"), Term("gen")} <= set(terms)
    if not everywhere:
        raise ValueError(
            f"{CANNOT}{adapter!r} edits some tokens only ({group} at '{_site(path)}'), and weights act on every token. "
            f"An adapter trained with positions='all' can be merged.{KEEP}"
        )


def _site(path: str) -> str:
    return path.replace(".edit_", ".")


def _flags_for_biases(model: nn.Module, merged: dict[str, Merged]) -> list[str]:
    """The config flags that give the layers the biases they need; found before anything changes."""
    lacking = [path for path, new in merged.items() if new.lacks_bias]
    flags = bias_flags(model, lacking) if lacking else []
    if flags is None:
        raise ValueError(
            f"{CANNOT}the edit has a constant, '{lacking[0]}' has no bias to hold it, and {type(model).__name__} has "
            'no config flag that would give it one. An adapter trained with bias="none" has no constant (loreft, '
            f"noreft, direft, nodireft, red).{KEEP}"
        )
    return flags


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # which has no fp64


def _on(form: Form, like: Tensor) -> Form:
    diagonal = None if form.diagonal is None else form.diagonal.to(like)
    return Form(form.up.to(like), form.down.to(like), form.offset.to(like), diagonal)


def _check_whole(model: nn.Module, names: Iterable[str]) -> None:
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and len(own := _among(wrapper, names)) > 1:
            raise ValueError(
                f"{CANNOT}{own[0]!r} and {own[1]!r} both trained '{path}', and the base model has it once. Name one "
                f"of them.{KEEP}"
            )


def _unwrap(model: nn.Module, names: Iterable[str] | None) -> None:
    """Modules trained whole (`modules_to_save`) take the place of the base model's: those in use, or `names`'."""
    for module in list(model.modules()):
        for child, wrapper in list(module.named_children()):
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                if names is not None:
                    wrapper.set_adapter(_among(wrapper, names), inference_mode=True)
                setattr(module, child, wrapper.unload_and_optionally_merge_module(True, False, None))


def _among(wrapper: Any, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in wrapper._get_available_adapters()]
