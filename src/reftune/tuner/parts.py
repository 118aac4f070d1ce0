"""Parts of adapters: which of them train and act, what a new one must stay out of, and room for what a file holds."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..interventions import Intervention, LowRankIntervention, StackIntervention, SubspaceIntervention
from ..sites import Site
from .hooks import CHILD
from .layer import ReftLayer

if TYPE_CHECKING:
    from .config import ReftConfig
    from .session import Session


def others_at_sites(
    model: nn.Module, config: "ReftConfig", adapter_name: str, sites: Iterable[Site], known: Iterable[str]
) -> dict[tuple[str, str], list[Intervention]]:
    """The interventions that a new adapter must stay out of, by (path, where) of its sites; {} without orthogonal_to.

    An adapter that comes from a file has its directions in the file. Raises ValueError if an adapter is not there, or
    shares no site with the new one.
    """
    if not config.orthogonal_to or config.from_file:
        return {}
    known = [name for name in known if name != adapter_name]
    for name in config.orthogonal_to:
        if name not in known:
            raise ValueError(
                f"orthogonal_to names the adapter {name!r}, which this model does not have; it has "
                f"{', '.join(map(repr, known)) or 'none'}. Load it first: model.load_adapter(path, {name!r}), then "
                f"model.add_adapter({adapter_name!r}, config)."
            )
    found: dict[tuple[str, str], list[Intervention]] = {}
    shares = dict.fromkeys(config.orthogonal_to, False)
    for site in sites:
        layer = getattr(model.get_submodule(site.path), CHILD[site.where], None)
        if not isinstance(layer, ReftLayer):
            continue
        for name in config.orthogonal_to:
            interventions = layer.interventions(name)
            if interventions:
                shares[name] = True
                kept = found.setdefault((site.path, site.where), [])
                kept += [i for i in interventions if all(i is not other for other in kept)]
    for name, shared in shares.items():
        if not shared:
            raise ValueError(
                f"orthogonal_to names the adapter {name!r}, but it edits none of the places that {adapter_name!r} "
                "edits: there is nothing to stay out of. Give both the same layers and component, or leave it out."
            )
    return found


def make_room(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> Callable[[], None]:
    """Give the interventions of an adapter buffers for the directions that its file says they stay out of. What comes
    back takes them away again, for weights that prove unfit."""
    before: dict[LowRankIntervention, dict[str, Tensor | None]] = {}
    for key, tensor in state.items():
        if not key.endswith((".others_write", ".others_read")):
            continue
        path, _, name = key.removeprefix("base_model.model.").rpartition(".")
        for root in (model, getattr(getattr(model, "base_model", None), "model", None)):
            part = _part(root, path, adapter_name) if isinstance(root, nn.Module) else None
            if part is not None:
                before.setdefault(part, dict(part._buffers))
                part.set_others(**{name: torch.zeros(tensor.shape, device=part.R.device)})

    def undo() -> None:
        for part, buffers in before.items():
            part._buffers = buffers

    return undo


def _part(root: nn.Module, path: str, adapter_name: str) -> LowRankIntervention | None:
    """The intervention at a checkpoint's path, which does not have the adapter's name in it."""
    before, _, after = path.partition(".reft_")
    group, _, rest = after.partition(".")
    try:
        part = root.get_submodule(".".join(p for p in (before, f"reft_{group}", adapter_name, rest) if p))
    except AttributeError:
        return None
    return part if isinstance(part, LowRankIntervention) else None


def expect_others(interventions: Iterable[Intervention]) -> None:
    """These come from a file whose weights say what they stay out of: training without those is an error."""
    for intervention in interventions:
        for part in intervention.modules():
            if isinstance(part, LowRankIntervention):
                part.expects_others = True


def train_only(session: "Session", adapters: Iterable[str], subspaces: Any = None, stage: Any = None) -> None:
    """Of these adapters, train these subspaces or stages alone; with neither, everything."""
    if subspaces is not None and stage is not None:
        raise ValueError("train_only takes subspaces or stage, not both: an adapter has one of them.")
    every = _interventions(session, adapters)
    if subspaces is None and stage is None:
        for module in every:
            if isinstance(module, (SubspaceIntervention, StackIntervention)):
                module.train_only(None)
        return
    cls = SubspaceIntervention if subspaces is not None else StackIntervention
    what = "subspaces" if subspaces is not None else "stages (a stack)"
    for module in _of_kind(every, cls, what, adapters):
        module.train_only(subspaces if subspaces is not None else stage)


def use_subspaces(session: "Session", adapters: Iterable[str], names: Any) -> None:
    """Of these adapters, let these subspaces act wherever a call does not choose itself; None for all."""
    every = _interventions(session, adapters)
    for module in _of_kind(every, SubspaceIntervention, "subspaces", adapters):
        module.use(names)


def _interventions(session: "Session", adapters: Iterable[str]) -> list[Any]:
    return [module for name in adapters for module in session.interventions.get(name, ())]


def _of_kind(every: list[Any], cls: type, what: str, adapters: Iterable[str]) -> list[Any]:
    found = [module for module in every if isinstance(module, cls)]
    if not found:
        raise ValueError(f"Adapter {', '.join(map(repr, adapters))} has no {what}.")
    return found
