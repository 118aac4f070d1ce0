"""Read a recipe from YAML with flags on top, and write the resolved one back, commented.

    recipe = load_recipe("emoji.yaml", {"lr": "1e-3", "reft.layers": "[3, 9]"})
    save_recipe(recipe, "runs/emoji/recipe.yaml")

An unknown key, at any level, is a `RecipeError` with the nearest known one; so is a value of the wrong type.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from reftune.train.recipe import Recipe
from reftune.train.yaml_file import RecipeError as RecipeError
from reftune.train.yaml_file import parse, read_text, yaml_package

T = TypeVar("T")


def load_recipe(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file (the defaults without one), with overrides by `section.key` or by `key` alone.

    Override values that are text are read as YAML where that fits, so that `"1e-3"`, `"null"` and `"[3, 9]"` mean what
    they say.
    """
    content: Any = {}
    if path is not None:
        content = _read_yaml(Path(path))
    for name, value in (overrides or {}).items():
        section, key = _find(name)
        part = content.get(section)
        if part is None:
            part = content[section] = {}
        if isinstance(part, dict):
            part[key] = _from_text(value, section, key) if isinstance(value, str) else value
    return from_dict(Recipe, content)


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as commented YAML, complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(to_yaml(recipe), encoding="utf-8")
    work.replace(path)


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, every key with its comment."""
    yaml = yaml_package()
    lines: list[str] = []
    for section in dataclasses.fields(recipe):
        part = getattr(recipe, section.name)
        lines.append(f"{section.name}:  # {(part.__doc__ or '').strip()}")
        for item in dataclasses.fields(part):
            text = yaml.safe_dump(
                getattr(part, item.name), default_flow_style=True, allow_unicode=True, width=float("inf")
            )
            value = text.removesuffix("\n").removesuffix("\n...")
            lines.append(f"  {item.name}: {value}".ljust(40) + f"  # {item.metadata['help']}")
    return "\n".join(lines) + "\n"


def recipe_keys() -> list[tuple[str, dataclasses.Field[Any]]]:
    """Every (section, field) of a recipe, in order."""
    return [
        (section.name, item)
        for section in dataclasses.fields(Recipe)
        for item in dataclasses.fields(typing.cast(Any, section.type))
    ]


def from_dict(cls: type[T], content: Any, where: str = "") -> T:
    """A dataclass from nested plain data, every key and type checked."""
    what = where or "A recipe"
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise RecipeError(f"{what} must be keys with values, but is {content!r}.")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise RecipeError(f"Unknown key {name!r}.{_nearest(str(key), where)}")
        hint = hints[key]
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        values[key] = from_dict(hint, value, name) if nested else _typed(value, hint, name)
    return cls(**values)


def _find(name: str) -> tuple[str, str]:
    """(section, key) of "train.lr" or of "lr"."""
    sections = {section.name for section in dataclasses.fields(Recipe)}
    keys = [(section, item.name) for section, item in recipe_keys()]
    section, dot, key = name.partition(".")
    if dot and section in sections and (section, key) in keys:
        return section, key
    if not dot:
        found = [pair for pair in keys if pair[1] == name]
        if len(found) == 1:
            return found[0]
    raise RecipeError(f"Unknown key {name!r}.{_nearest(key if dot else name, section if section in sections else '')}")


def _nearest(key: str, section: str) -> str:
    """Say " Did you mean ...?" over the keys of this section, then of all; else the keys of this section."""
    everywhere = {item.name: f"{sect}.{item.name}" for sect, item in recipe_keys()}
    here = [item.name for sect, item in recipe_keys() if sect == section]
    here = here or [field.name for field in dataclasses.fields(Recipe)]
    near = difflib.get_close_matches(key, here, n=1)
    if near:
        return f" Did you mean {section + '.' if section else ''}{near[0]}?"
    near = difflib.get_close_matches(key, everywhere, n=1)
    return f" Did you mean {everywhere[near[0]]}?" if near else f" Known here: {', '.join(here)}."


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as `hint` wants it, or a RecipeError. An int passes for a float, and so does YAML's text "1e-3"."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        kept, ok = _as(value, option)
        if ok:
            return kept
    raise RecipeError(f"{name} must be {_words(options)}, but is {value!r} ({type(value).__name__}).")


def _as(value: Any, hint: Any) -> tuple[Any, bool]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value, True
    if hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3, without a point, as text
            try:
                return float(value), True
            except ValueError:
                return value, False
        return (
            (float(value), True) if isinstance(value, int | float) and not isinstance(value, bool) else (value, False)
        )
    if hint is int:
        return value, isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal:
        # YAML 1.1 reads a bare no as False
        value = "no" if value is False and "no" in args else value
        return value, value in args
    if origin is list:
        return value, isinstance(value, list) and all(_as(item, args[0])[1] for item in value)
    if origin is dict:
        good = isinstance(value, dict) and all(
            _as(key, args[0])[1] and _as(item, args[1])[1] for key, item in value.items()
        )
        return value, good
    return value, isinstance(value, hint)


def _words(options: Iterable[Any]) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    several = {str: "texts", int: "whole numbers", float: "numbers"}
    words = []
    for option in options:
        if typing.get_origin(option) is Literal:
            words.append(" or ".join(map(str, typing.get_args(option))))
        elif typing.get_origin(option) is list:
            (item,) = typing.get_args(option)
            words.append(f"a list of {several[item]}" if item in several else "a list")
        elif typing.get_origin(option) is dict:
            words.append("keys with values")
        else:
            words.append(names.get(option, str(option)))
    return " or ".join(words)


def _from_text(text: str, section: str, key: str) -> Any:
    """A flag's text as YAML reads it where that fits the key, as a list of numbers (3,9,18), or as it stands."""
    yaml = yaml_package()
    hint = typing.get_type_hints(typing.get_type_hints(Recipe)[section])[key]
    forms = [text, f"[{text}]"] if "," in text else [text]
    for form in forms:
        try:
            value = yaml.safe_load(form)
            if isinstance(value, str) and form is not forms[-1]:
                continue  # "3,9,18" is text to YAML
            return _typed(value, hint, key)
        except (yaml.YAMLError, RecipeError):
            continue
    return text


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}. Give the path of a YAML file.")
    content = parse(read_text(path), str(path))
    if not isinstance(content, dict | types.NoneType):
        raise RecipeError(f"{path} must be keys with values (model:, data:, reft:, train:), but is {content!r:.80}.")
    return content or {}
