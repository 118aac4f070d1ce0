"""Every key of a recipe as an option of `reftune train`, made from the dataclasses: `lr` is `--lr`.

`recipe_flags` gives the verb its options; `overrides` turns what was typed into `load_recipe`'s overrides.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import typer

from reftune.train.recipe_file import RecipeError, recipe_keys


def recipe_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """Put an option for every key in the place of the verb's `**flags`."""
    signature = inspect.signature(verb)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    made = []
    for section, item in recipe_keys():
        flag = "--" + (item.metadata["flag"] or item.name).replace("_", "-")
        switch = item.type is bool
        names = (f"{flag}/--no{flag[1:]}",) if switch else (flag,)
        option = typer.Option(
            None, *names, help=item.metadata["help"], rich_help_panel=section, metavar=None if switch else "VALUE"
        )
        made.append(
            inspect.Parameter(
                f"{section}__{item.name}",
                inspect.Parameter.KEYWORD_ONLY,
                default=option,
                annotation=(bool | None) if switch else (str | None),
            )
        )
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept] + made
    verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return verb


def overrides(pairs: list[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """`load_recipe`'s overrides from `--set key=value` and the options; the options win."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set takes KEY=VALUE, such as --set train.lr=1e-3, but got {pair!r}.")
        found[key.strip()] = value
    for name, value in flags.items():
        if value is not None:
            found[name.replace("__", ".", 1)] = value
    return found
