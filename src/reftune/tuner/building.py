"""From an edit of a config to the module at a site: one intervention, as precise and on the device as the base is."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..interventions import (
    Intervention,
    StackIntervention,
    SubspaceIntervention,
    Taken,
    intervention_class,
    taken_by,
)
from ..sites import Site
from . import compatibility


def build(
    edit: dict[str, Any], model: nn.Module, target: nn.Module, site: Site, taken: Taken | None = None
) -> Intervention:
    """The intervention of an edit at a site, out of the way of what is taken there."""
    width = compatibility.site_width(model, target, site)
    like = next((p for p in target.parameters() if p.is_floating_point()), None)
    given: Intervention | None = edit["given"]
    if given is not None:
        if width is not None and given.embed_dim != width:
            raise ValueError(
                f"The intervention edits hidden states of width {given.embed_dim}, but those at '{site}' have width "
                f"{width}: build it with embed_dim={width}."
            )
        module = copy.deepcopy(given)
    elif width is None:
        raise ValueError(
            f"The width of the hidden states at '{site}' is not told by the model: pass an intervention that "
            "knows it, LoreftIntervention(embed_dim=...)."
        )
    else:
        module = _make(edit, width)
    device = like.device if like is not None and not like.is_meta else None
    dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
    on_meta = any(p.is_meta for p in module.parameters())
    module = module.to(dtype=dtype) if on_meta else module.to(device, dtype)
    if taken is not None:
        stay_out_of(module, taken, str(site))
    return module


def _make(edit: dict[str, Any], width: int) -> Intervention:
    kind = edit["intervention"]
    settings = {
        "act_fn": edit["act_fn"],
        "dropout": edit["dropout"],
        "bias": edit["bias"],
        "init_weights": edit["init_weights"],
        **edit["intervention_kwargs"],
    }
    if edit.get("subspaces") is not None:
        return SubspaceIntervention(width, edit["subspaces"], kind, **settings)
    if edit.get("stack") is not None:
        return StackIntervention(width, edit["stack"], edit.get("between"), kind, **settings)
    if edit.get("nested"):
        settings["nested"] = edit["nested"]
    return intervention_class(kind)(embed_dim=width, low_rank_dimension=edit["r"], **settings)


def stay_out_of(module: Intervention, taken: Taken, site: str) -> None:
    """`orthogonal_to` at one site; errors name it."""
    method = getattr(module, "stay_out_of", None)
    if method is None:
        raise ValueError(
            f"orthogonal_to needs an intervention with rows of its own, of the low-rank family, but at '{site}' it is "
            f"a {type(module).__name__}."
        )
    try:
        method(taken)
    except ValueError as error:
        raise ValueError(f"At '{site}': {error}") from None


def taken_at(interventions: Iterable[Intervention], site: str) -> Taken:
    """`taken_by`; errors name the site."""
    try:
        return taken_by(interventions)
    except ValueError as error:
        raise ValueError(f"At '{site}': {error}") from None
