"""Baking: several adapters, with their weights, as one new adapter that computes the same.

    model.add_weighted_adapter(["style", "tone"], [1.0, 0.5], "both")                    # Σ wᵢ Δᵢ(h)
    model.add_weighted_adapter(["style", "tone"], [1.0, 0.5], "both", "sequence")        # one after the other
    model.add_weighted_adapter(["style", "tone"], [1.0, 0.5], "both", rank=4)            # the nearest of rank 4

At one site and on the same tokens the edits of the family add up to one h + Uᵀ f(V h + c), which is NodiReFT: its rows
are theirs stacked, so ranks add up. On other tokens each keeps its own rows. What has no such form is an error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..interventions.forms import Form, NoFormError, form_of
from ..positions.overlap import TokenSet
from .bakedconfig import baked_config
from .layer import ReftLayer

if TYPE_CHECKING:
    from .model import ReftModel

Edits = dict[str, list[tuple[TokenSet, Form]]]  # site path → its edits in order


@dataclass(frozen=True)
class Baked:
    """What `add_weighted_adapter` made: ranks and relative errors (see `Form.nearest`) per (site, tokens)."""

    adapter_name: str
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)
    errors: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest relative error of any edit; 0 where nothing was cut off."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no edit"
        exact = "exact" if self.error == 0 else f"largest relative error {self.error:.3g}"
        count = f"{len(self.ranks)} edit{'' if len(self.ranks) == 1 else 's'}"
        return f"adapter {self.adapter_name!r}: {count}, {shown}, {exact}"


def bake(
    tuner: "ReftModel",
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "sum",
    rank: int | None = None,
) -> Baked:
    """Add an adapter that edits as the given ones do together; see `ReftModel.add_weighted_adapter`."""
    _check(tuner, adapters, weights, adapter_name, combination_type, rank)
    chosen = {name: float(weight) for name, weight in zip(adapters, weights, strict=True) if weight != 0}
    edits = _combined(tuner, chosen, combination_type)
    ranks, errors = {}, {}
    for site, forms in edits.items():
        for number, (tokens, form) in enumerate(forms):
            key = (site.replace(".edit_", "."), str(tokens))
            if form.diagonal is not None and bool(form.down.any()):
                raise ValueError(
                    f"The edit at '{key[0]}' on {tokens} both scales every dimension (RED) and adds a low-rank edit, "
                    "and no kind does both. Compose the adapters at run time instead (reftune.compose)."
                )
            most = form.up.shape[1] if rank is None else rank
            errors[key] = 0.0
            if form.diagonal is None and form.rank > most:
                try:
                    form, errors[key] = form.nearest(most)
                except NoFormError as error:
                    raise ValueError(
                        f"rank={most} at '{key[0]}': {error}. Leave rank out, or choose a larger."
                    ) from None
                forms[number] = (tokens, form)
            elif form.diagonal is not None and rank is not None:
                raise ValueError(
                    f"rank={rank} at '{key[0]}': RED scales every dimension and has no rank. Leave rank out."
                )
            ranks[key] = form.rank if form.diagonal is None else 0
    config = baked_config(tuner, list(chosen), edits)
    mix = tuner.session.mix
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    tuner.session.mix = mix  # setting the active adapters anew ends it
    _fill(tuner.model, adapter_name, edits)
    return Baked(adapter_name, ranks, errors)


def _check(
    tuner: "ReftModel", adapters: Sequence[str], weights: Sequence[float], name: str, how: str, rank: int | None
) -> None:
    if how not in ("sum", "sequence"):
        near = {"cat": "That is 'sum' here.", "linear": "That is 'sum' here.", "svd": "Use 'sum' with rank=."}.get(
            how, ""
        )
        raise ValueError(f"combination_type must be 'sum' or 'sequence', but is {how!r}. {near}".rstrip())
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            f"Give one weight for each adapter: there are {len(adapters)} adapters, {len(weights)} weights."
        )
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise ValueError(f"There is no adapter {adapter!r}; this model has {sorted(tuner.peft_config)}.")
    if len(set(adapters)) != len(adapters):
        raise ValueError(f"An adapter is named twice in {list(adapters)}: give it once, with the sum of its weights.")
    if name in tuner.peft_config:
        raise ValueError(f"There is an adapter {name!r} already: delete it, or choose another adapter_name.")
    for adapter, weight in zip(adapters, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"The weight of adapter {adapter!r} must be a finite number, but is {weight!r}.")
        config = tuner.peft_config[adapter]
        if more := config.beside_edits():
            raise ValueError(f"Adapter {adapter!r} also trained {more}, and those cannot be added up.")
        if getattr(config, "lora", None):
            raise ValueError(f"Adapter {adapter!r} has a LoRA adapter with it, which is no edit: only edits are baked.")
    if not any(weights):
        raise ValueError("All weights are 0: that is the base model, and needs no adapter.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, but is {rank!r}.")


def _combined(tuner: "ReftModel", chosen: dict[str, float], how: str) -> Edits:
    edits: Edits = {}
    for path, layer in tuner.model.named_modules():
        if isinstance(layer, ReftLayer):
            for adapter, weight in chosen.items():
                for (positions, group), intervention in zip(
                    layer.groups.get(adapter, ()), layer.interventions(adapter), strict=True
                ):
                    try:
                        form = form_of(intervention).scaled(weight)
                        _add(edits.setdefault(path, []), TokenSet.of(group, positions), form, how)
                    except NoFormError as error:
                        raise _refused(adapter, path, error) from None
    return edits


def _add(edits: list[tuple[TokenSet, Form]], tokens: TokenSet, form: Form, how: str) -> None:
    """Put one more edit to those of a site: into the one on the same tokens, or beside them."""
    for number in reversed(range(len(edits))):
        there, before = edits[number]
        if there == tokens:
            after = [other for other, _ in edits[number + 1 :]]
            if not all(other.disjoint(tokens) for other in after):
                raise NoFormError(f"another edit comes between the two on {tokens}")
            edits[number] = (tokens, before.plus(form) if how == "sum" else before.then(form))
            return
        if how == "sum" and not there.disjoint(tokens):
            raise NoFormError(
                f"its tokens ({tokens}) and those of another edit there ({there}) are not the same but overlap, and "
                "within one adapter the later edit reads the earlier one, which a sum does not"
            )
    edits.append((tokens, form))


def _refused(adapter: str, path: str, why: object) -> ValueError:
    return ValueError(
        f"Adapter {adapter!r} cannot be baked with the others at '{path.replace('.edit_', '.')}': {why}. Compose them "
        "at run time instead (reftune.compose), and keep them together with reftune.save_composition."
    )


@torch.no_grad()
def _fill(model: nn.Module, adapter_name: str, edits: Edits) -> None:
    """Write the forms into the new adapter's interventions, zeros where a site has no edit on those tokens."""
    for path, layer in model.named_modules():
        if not isinstance(layer, ReftLayer) or adapter_name not in layer.groups:
            continue
        forms = dict(edits.get(path, []))
        for (positions, group), module in zip(
            layer.groups[adapter_name], layer.interventions(adapter_name), strict=True
        ):
            form, target = forms.get(TokenSet.of(group, positions)), module.state_dict()
            values: dict[str, Any] = {}
            if form is not None and form.diagonal is not None:
                values = {"s": form.diagonal + 1, "b": form.constant}
            elif form is not None:
                values = {"R": form.up, "W": form.down, "b": form.offset}
            for name, tensor in target.items():
                nothing = torch.full_like(tensor, float(name == "s"))  # RED without an edit: s = 1
                tensor.copy_(_padded(values[name], tensor) if form is not None else nothing)


def _padded(value: Tensor, like: Tensor) -> Tensor:
    """More rows of zeros, which edit nothing."""
    out = torch.zeros_like(like)
    out[: value.shape[0]] = value.to(like)
    return out
