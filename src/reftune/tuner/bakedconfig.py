"""The config of a baked adapter: the edits of every site, as one `ReftConfig` that makes room for exactly those.

Two forms are tried: one expression for all layers, each term with rows of its own, and pyreft's list with an entry for
every site and set of tokens. Neither can hold `l2` of "f2+l2" beside an edit elsewhere; that is an error.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..interventions.forms import Form
from ..positions.overlap import TokenSet
from ..sites import find_sites
from .config import ReftConfig

if TYPE_CHECKING:
    from .model import ReftModel

Edits = dict[str, list[tuple[TokenSet, Form]]]
_ORDER = ("f", "l", "mid", "prompt", "all", "gen", "gen:", "gen/")


def baked_config(tuner: "ReftModel", adapters: list[str], edits: Edits) -> ReftConfig:
    """The config under which the edits fit; `adapters` are those they come from."""
    first = tuner.peft_config[adapters[0]]
    common = {
        "base_model_name_or_path": first.base_model_name_or_path,
        "revision": first.revision,
        "task_type": first.task_type,
        "inference_mode": first.inference_mode,
    }
    places = _places(tuner, adapters)
    one, ranks_differ = _one_expression(edits, places)
    if one is not None and not ranks_differ:
        return ReftConfig(**one, **common)
    entries = _entries(edits, places)
    if entries is not None:
        return ReftConfig(representations=entries, **common)
    if one is not None:
        return ReftConfig(**one, **common)
    raise ValueError(
        f"{' and '.join(map(repr, adapters))} cannot be baked into one adapter: they edit different places with "
        "prefixes and suffixes that share short prompts, or with different functions, and one config has no room for "
        "that. "
        "Compose them at run time instead (reftune.compose), and keep them together with reftune.save_composition."
    )


def _places(tuner: "ReftModel", adapters: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """Path of the ReftLayer → (layer, component) by which a config names it."""
    places = {}
    for adapter in adapters:
        config: Any = tuner.peft_config[adapter]
        for edit in config.edits():
            for site in find_sites(tuner.model, edit["layers"], edit["component"]):
                places[f"{site.path}.edit_{site.where}"] = (site.layer, edit["component"])
    return places


def _kind(form: Form) -> tuple[str, str | None]:
    return ("red" if form.diagonal is not None else "nodireft"), form.act_fn


def _one_expression(edits: Edits, places: dict[str, tuple[int | None, str]]) -> tuple[dict[str, Any] | None, bool]:
    """Arguments of a config with one expression, or None; and whether some sites would get rows they do not need."""
    forms = [form for site in edits.values() for _, form in site]
    sets = {tokens for site in edits.values() for tokens, _ in site}
    components = {places[path][1] for path in edits}
    if len(components) > 1 or len({_kind(form) for form in forms}) > 1:
        return None, False
    if any(not a.disjoint(b) for a in sets for b in sets if a != b):
        return None, False
    shared = len(sets) == 1
    terms = sorted({term for tokens in sets for term in tokens.terms}, key=lambda t: _ORDER.index(t.name))
    if len({term.name for term in terms}) < len(terms) or not (shared or all(len(s.terms) == 1 for s in sets)):
        return None, False
    expression = "+".join(map(str, terms))
    if any(TokenSet.of("+".join(map(str, tokens.terms)), expression) != tokens for tokens in sets):
        return None, False
    (component,) = components
    layers = sorted({layer for layer, _ in (places[path] for path in edits) if layer is not None})
    kind, act_fn = _kind(forms[0])
    arguments = {
        "r": max(1, *(form.rank for form in forms)) if kind != "red" else 1,
        "layers": layers or "mid",
        "component": component,
        "positions": expression,
        "share_weights": shared and len(terms) > 1,
        "intervention": kind,
        "act_fn": act_fn,
        "init_weights": act_fn is None,  # with a function no start is zero, which would be a warning
    }
    differ = len({form.rank for form in forms}) > 1 or len({len(site) for site in edits.values()}) > 1
    return arguments, differ and kind != "red"


def _entries(edits: Edits, places: dict[str, tuple[int | None, str]]) -> list[dict[str, Any]] | None:
    """pyreft's list, one entry for each edit in its order, or None."""
    entries = []
    for path, site in edits.items():
        layer, component = places[path]
        for tokens, form in site:
            positions = "+".join(map(str, sorted(tokens.terms, key=lambda t: _ORDER.index(t.name))))
            if TokenSet.of(positions, positions) != tokens:
                return None
            kind, act_fn = _kind(form)
            entries.append(
                {
                    "layer": layer,
                    "component": component,
                    "positions": positions,
                    "intervention": kind,
                    "act_fn": act_fn,
                    "init_weights": act_fn is None,
                    "low_rank_dimension": max(1, form.rank),
                }
            )
    return entries
