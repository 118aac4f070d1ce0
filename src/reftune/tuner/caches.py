"""What transformers calls a forward pass's cache: `cache` since 5.24, before it `past_key_values` or `cache_params`;
RWKV has a `state`.

A call may use an old name with a new version, which takes it and warns. Pure functions over names; no tensors.
"""

import inspect
from collections.abc import Callable
from typing import Any

NAMES = ("cache", "past_key_values", "cache_params", "state")


def cache_among(get: Callable[[str], Any]) -> Any:
    """The cache among a call's arguments, which `get` looks up by name; None if there is none."""
    return next((found for name in NAMES if (found := get(name)) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returned, or None. Fields alone are read: an old name as a property warns."""
    return cache_among(getattr(output, "__dict__", {}).get)


def cache_name(model: Any) -> str | None:
    """What the model's forward calls its cache; None if it takes none."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in NAMES if name in parameters), None)
