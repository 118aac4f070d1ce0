"""Passes that do not say where a prompt ends: continuous batching, and guidance without a cache.

An edit of every token needs no prompt and is exact there; any other is refused, for it would reach the wrong tokens.
"""

import functools
from collections.abc import Iterable
from typing import Any

from ..positions.overlap import TokenSet

CONTINUOUS = "Continuous batching"


def check_everywhere(what: str, names: Iterable[str], layers: Iterable[Any]) -> None:
    """Raise ValueError, which begins with `what`, if an adapter has to know where a prompt begins or ends.

    names: the adapters in use; layers: the model's `ReftLayer`s.
    """
    names = list(names)
    for layer in layers:
        for name in names:
            partial = [p for p, group in layer.groups.get(name, ()) if not _everywhere(group, p)]
            coupled = [type(i).__name__ for i in layer.interventions(name) if i.couples_positions]
            if partial or coupled:
                found = f"positions={partial[0]!r}" if partial else f"{coupled[0]}, which couples a prompt's tokens"
                raise ValueError(
                    f"{what} does not tell which tokens are a prompt, and the adapter {name!r} has {found}. Use "
                    "generate() with its cache, or an adapter that edits every token alike (positions='all')."
                )


@functools.cache  # asked at every layer in every pass of continuous batching
def _everywhere(group: str, positions: str) -> bool:
    return TokenSet.of(group, positions).everywhere


def is_paged(cache: Any) -> bool:
    """Whether a pass belongs to continuous batching, whose cache is one for all requests.

    By the class's name, for importing the class would load all of continuous batching, and its place has changed.
    """
    return type(cache).__name__ == "PagedAttentionCache"
